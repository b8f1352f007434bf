"""Which backend serves a call: a pure function of device type and dtypes, remembered.

CPU tensors go to the native cpu kernels. CUDA tensors go to the native cuda kernels if those are built and run on the
device (ops/cuda_device.py), else to Triton. Everything else, and everything a kernel cannot take, goes to the
reference. `FASTEDIT_BACKEND` (reference, cpu, cuda or triton) forces a backend, which then serves or raises. There is
no silent fallback.
"""

import functools
import importlib
import logging
import os
import types

import torch

from . import cuda_device, native

logger = logging.getLogger("fastedit")

BACKENDS = ("reference", "cpu", "cuda", "triton")
_KERNEL_DTYPES = {torch.float32, torch.bfloat16, torch.float16}


class BackendError(RuntimeError):
    """A forced or required backend cannot serve this call."""


@functools.cache
def load(name):
    """The backend: the op functions of fastedit.kernels.reference under the same names.

    `any_shape`: takes contiguous rows of any shape, not (rows, width) alone.
    """
    if name in ("cpu", "cuda"):
        reason = native.why_not(name)
        if reason:
            raise BackendError(reason)
        return native.backend(name)
    module = importlib.import_module(f"fastedit.kernels.{name}")
    return types.SimpleNamespace(__name__=name, any_shape=False, **{op: getattr(module, op) for op in module.__all__})


@functools.cache
def why_not(name):
    """None if the backend can be loaded, else the reason it cannot."""
    if name not in BACKENDS:
        return f"there is no backend {name!r}; the backends are {', '.join(BACKENDS)}"
    try:
        load(name)
    except (ImportError, BackendError) as error:
        return str(error)
    return cuda_device.why_not_here() if name == "cuda" else None


@functools.cache
def _announce(message):
    logger.warning(message)


class _Selection:
    """select(device_type, dtype, second_dtype=None, on_sum=False): the backend for rows of `dtype`, remembered.

    The rows are added to a stream of `second_dtype`, on `device_type`. Once the answer is a native backend, calls go
    there without asking here.
    """

    def __init__(self):
        self._remembered = functools.cache(_choose)

    def __call__(self, *key):
        backend = self._remembered(*key)
        if backend.__name__ == key[0]:
            native.serve(key[0], True)
        return backend

    def cache_clear(self):
        """Forget the answers, so that a changed FASTEDIT_BACKEND is seen."""
        for device_type in ("cpu", "cuda"):
            native.serve(device_type, False)
        self._remembered.cache_clear()


def _choose(device_type, dtype, second_dtype=None, on_sum=False):
    forced = os.environ.get("FASTEDIT_BACKEND")
    served = _served(device_type, dtype, second_dtype, on_sum)
    if forced:
        reason = why_not(forced) or _unfit(forced, device_type, served)
        if reason:
            raise BackendError(f"FASTEDIT_BACKEND={forced} cannot serve this call: {reason}")
        return load(forced)
    if device_type == "meta":
        return load("reference")
    wanted = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}.get(device_type, ())
    if wanted and served is not None:
        _announce(f"fastedit: reference backend for {served} on {device_type} (slower)")
        return load("reference")
    for name in wanted:
        if why_not(name) is None:
            if name == "triton" and cuda_device.why_not_here():
                _announce(f"fastedit: Triton kernels on {device_type}, because the native ones cannot run: {why_not('cuda')}")
            return load(name)
    if wanted:
        reasons = "; ".join(f"{name}: {why_not(name)}" for name in wanted)
        _announce(f"fastedit: reference backend on {device_type} (slower), because {reasons}")
    return load("reference")


def _served(device_type, dtype, second_dtype, on_sum):
    """None if the kernels take these dtypes, else the dtypes in words."""
    dtypes = {dtype, second_dtype or dtype}
    if device_type == "cpu" and dtypes == {torch.float16, torch.float32}:
        return "float16 + float32 rows"
    if dtypes <= _KERNEL_DTYPES and (len(dtypes) == 1 or (second_dtype == torch.float32 and not on_sum)):
        return None
    return " + ".join(sorted(str(d).removeprefix("torch.") for d in dtypes)) + " rows"


def _unfit(name, device_type, served):
    if name == "reference":
        return None
    if served is not None:
        return f"{served} are served by the reference alone"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    devices = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda", "cpu") if interpreted else ("cuda",)}[name]
    if device_type not in devices:
        return f"it takes tensors on {' or '.join(devices)}, not {device_type}"
    return None


select = _Selection()
