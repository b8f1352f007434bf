from .ops.dispatch import *  # noqa: F403
