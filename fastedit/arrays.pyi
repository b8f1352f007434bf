from .ops.arrays import *  # noqa: F403
