from .ops.jax import *  # noqa: F403
