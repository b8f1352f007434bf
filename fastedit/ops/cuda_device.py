"""Whether a CUDA device can run the native kernels: one launch that does nothing, once per device, and its error.

The kernels are built for some architectures, and the module carries a CUDA runtime that the driver must serve. Without
this check the first edit on another kind of GPU would fail with a bare error number.
"""

import ctypes
import functools

import torch

try:
    from .. import _native
except ImportError:  # a pure-Python install
    _native = None

OLDEST = (8, 0)  # compute capability: kernels/cuda copies asynchronously


@functools.cache
def _library():
    """The native module's C functions of kernels/cuda/probe.cu. None if it has none."""
    if _native is None or not getattr(_native, "CUDA_ARCHITECTURES", ""):
        return None
    library = ctypes.CDLL(_native.__file__)
    for name in ("fastedit_cuda_error_name", "fastedit_cuda_error_string"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


def error_text(error, library=None):
    """`cudaErrorNoKernelImageForDevice (209): no kernel image is available for execution on the device`."""
    library = library or _library()
    name, text = (getattr(library, f"fastedit_cuda_error_{part}")(error).decode() for part in ("name", "string"))
    return f"{name} ({error}): {text}"


def version_text(number):
    return f"{number // 1000}.{number % 1000 // 10}"


def why_not(device, library=None, capability=None):
    """None if the native CUDA kernels run on `device` (a number), else the reason why they cannot."""
    library = library or _library()
    if library is None:
        return "the native module has no CUDA kernels"
    capability = capability or torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return f"compute capability {_dotted(capability)}, where the native CUDA kernels need {_dotted(OLDEST)} or newer"
    error = library.fastedit_cuda_probe(device)
    if not error:
        return None
    built, driver = (library.fastedit_cuda_version(of_driver) for of_driver in (0, 1))
    said = f"a first launch failed with {error_text(error, library)}"
    if driver < built // 1000 * 1000:  # minor versions serve each other
        return f"{said}; the driver serves CUDA {version_text(driver)}, the module was built with {version_text(built)}"
    architectures = getattr(_native, "CUDA_ARCHITECTURES", "")
    return (
        f"{said}; compute capability {_dotted(capability)}, kernels built for {architectures or 'no architecture'}: "
        f"install again with FASTEDIT_CUDA_ARCHITECTURES={capability[0]}{capability[1]}"
    )


@functools.cache
def why_not_here():
    """why_not of this process's current device, asked once, for the dispatch. None also if there is no device to ask.

    A launch creates a context of some hundred megabytes. So other devices are asked only if they are of another kind.
    """
    if not torch.cuda.is_available() or torch.version.hip:
        return None
    current = torch.cuda.current_device()
    kinds = {}
    for device in sorted(range(torch.cuda.device_count()), key=lambda i: i != current):
        kinds.setdefault(torch.cuda.get_device_capability(device), device)
    for device in kinds.values():
        if reason := why_not(device):
            return f"GPU {device}: {reason}" + ("; or hide it with CUDA_VISIBLE_DEVICES" if device != current else "")
    return None


def _dotted(capability):
    return ".".join(map(str, capability))
