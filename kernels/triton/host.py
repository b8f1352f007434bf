"""From torch tensors to launches: devices, output tensors and the form as the kernels take it."""

import contextlib

import torch

# Fused multiply-adds by choice, not by Triton's default (which changes in 3.10). Two stages of loads keep the
# backward of rank 64 within 47 KB of shared memory.
COMPILE_OPTIONS = {"enable_fp_fusion": True, "num_stages": 2}


def warp_size():
    return 64 if torch.version.hip else 32


def _on_device_of(tensor):
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def run(kernel, launch, device_of, *args, **options):
    """Launch on device_of's GPU, whichever is current."""
    if launch.programs:
        with _on_device_of(device_of):
            kernel[(launch.programs,)](*args, num_warps=launch.num_warps, **COMPILE_OPTIONS, **options)


def stream(tensor):
    """Rows with adjacent elements; a copy only where they are not. None stays None."""
    if tensor is None or tensor.stride(1) == 1:
        return tensor
    return tensor.contiguous()


def row_stride(tensor):
    return 0 if tensor is None else tensor.stride(0)


def dense(tensor):
    return None if tensor is None else tensor.contiguous()


def slot_count(*parameters):
    """Slots in the bank: the parameters' first dimension."""
    return next((p.shape[0] for p in parameters if p is not None), 1)


def kernel_form(scale, bias, read, offset, write, slot, coefficient, gate=None, rule=None, want_z=False):
    """(form arguments of the kernels, rank): rank 0 where neither the rows nor z need the projection."""
    rank = 0 if read is None or (write is None and not want_z) else read.shape[-2]
    slots = 1 if slot is None else slot_count(scale, bias, read, offset, write, gate)
    if rank == 0:
        read = offset = write = None
    parameters = [dense(p) for p in (scale, bias, read, offset, write, slot, coefficient, gate, rule)]
    return (*parameters, slots, rank), rank


def shared(coefficient):
    """Whether one coefficient serves every row."""
    return coefficient is not None and coefficient.numel() == 1


def empty_z(like, rank, want_z):
    if not (want_z and rank):
        return None
    return torch.empty((like.shape[0], rank), dtype=torch.float32, device=like.device)
