from .patching.distributed import *  # noqa: F403
