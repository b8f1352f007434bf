from .training.recipes import *  # noqa: F403
