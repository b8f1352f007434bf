"""State dicts that torch.save wrote, from anybody: no code in them runs, and what the archive's own checksums say is checked."""

import pickle
import zipfile

import torch

from .sealed import Damaged, open_regular

LIMIT = 1 << 30  # of RED's on a 70B model, both vectors on five linear maps a layer: 20 MB

# What torch's restricted unpickler makes of damaged bytes, besides its own error.
_OF_UNPICKLING = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, MemoryError)


def read_archive(path):
    """The dict in a file of torch.save, on the CPU. Each of its tensors has the memory that it announces.

    Raises:
        Damaged: it is none, or was changed. FileNotFoundError: there is none.
    """
    try:
        with open_regular(path, LIMIT) as file:
            _check_zip(file)
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (Damaged, FileNotFoundError):
        raise
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, *_OF_UNPICKLING) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Damaged(f"is not a plain state dict of tensors ({reason:.120}); it was not executed") from None
    if not isinstance(state, dict):
        raise Damaged(f"holds a {type(state).__name__}, expected a state dict")
    for key, tensor in state.items():
        if isinstance(tensor, torch.Tensor) and _holds_less(tensor):
            raise Damaged(f"announces {tensor.numel():,} numbers in {key!s:.80} and holds fewer")
    return state


def _holds_less(tensor):
    return tensor.layout == torch.strided and tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()


def _check_zip(file):
    """Check that an archive's parts are whole and as they were written. torch checks neither checksums nor sizes."""
    try:
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
            if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or sum(p.file_size for p in parts) > LIMIT:
                raise Damaged("is a compressed archive, which torch.save does not write")
            damaged = archive.testzip()
    except Damaged:
        raise
    except Exception as error:  # zipfile's errors of damaged archives have no common base besides this
        raise Damaged(
            f"is not an archive of torch.save ({error!s:.80}); files of torch before 1.6 have no checksums: save again"
        ) from None
    if damaged is not None:
        raise Damaged(f"does not have the checksum of its part {damaged!r:.80}: changed or damaged")
