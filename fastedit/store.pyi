from .patching.edit_folder import *  # noqa: F403
