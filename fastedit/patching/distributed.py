"""Edits on a model that several processes train together.

Under DDP nothing is needed: masters are parameters like others. FSDP2 (`fully_shard`) would put them into the root's
group, and cast them with it if the model computes in bf16. So they are kept apart, in fp32:

    handle = fastedit.patch(model, fastedit.RED(), freeze=True)
    apart = fastedit.distributed.shard(handle, mesh)                 # before the optimizer is made
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, ignored_params=apart)
    fully_shard(model, mesh=mesh, ignored_params=apart)

With accelerate: `FullyShardedDataParallelPlugin(fsdp_version=2, ignored_modules=[model.fastedit])`.
"""

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

POLICIES = ("replicate", "shard")


def shard(handle, mesh, policy="replicate"):
    """Lay a handle's trainable masters out over a mesh of data-parallel processes, as DTensors in fp32.

    Gradients become the mean over the mesh, as under DDP and FSDP2. Values are those of the mesh's first process. Every
    process calls this before the optimizer is made, because the parameters are new objects. Afterwards forwards, `save`
    and `named_tensors` are collective.

    Args:
        mesh: a DeviceMesh, all of whose dimensions are data-parallel (HSDP: replicate, then shard).
        policy: "replicate": whole on each process. An edit is small, and only the gradients' all-reduce is
            communicated. "shard": split over the mesh's last dimension together with the optimizer's state, and
            gathered at use.

    Returns:
        The set of new parameters, for fully_shard's `ignored_params`.

    Raises:
        ValueError: an unknown policy, masters that are laid out already, or masters of LoReFT or a trainable rotation.
            Nothing has changed.
        RuntimeError: the handle was removed.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy is {policy!r}, expected one of {', '.join(POLICIES)}")
    handle._changeable()
    masters = [masters for _, _, masters in handle._each() if masters.trainable]
    bound = next((edit for edit, _, own in handle._each() if own in masters and edit.constrained), None)
    if bound is not None:
        raise ValueError(
            f"{type(bound).__name__} brings its basis back to orthonormal rows after a step, which needs whole masters on "
            "each process; train it under DDP"
        )
    for own in masters:
        for name, parameter in own._parameters.items():
            if isinstance(parameter, DTensor):
                raise ValueError(
                    f"{name} is a DTensor on {parameter.device_mesh} already: call shard once, before fully_shard"
                )
    last = Replicate() if policy == "replicate" else Shard(0)
    placements = [Replicate()] * (mesh.ndim - 1) + [last]
    new = set()
    for own in masters:
        for name, parameter in own._parameters.items():
            laid = distribute_tensor(parameter.detach(), mesh, placements)
            own._parameters[name] = torch.nn.Parameter(laid, requires_grad=parameter.requires_grad)
            new.add(own._parameters[name])
        own.whole = whole
    return new


def whole(parameter):
    """The full local tensor of a laid-out master, differentiable. The gradient is the mean over its mesh."""
    return _Whole.apply(parameter) if isinstance(parameter, DTensor) else parameter


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parameter):
        ctx.mesh, ctx.placements = parameter.device_mesh, parameter.placements
        return parameter.full_tensor().detach()

    @staticmethod
    def backward(ctx, grad):
        # a sum of shares: gloo has no mean, and FSDP2 divides first as well
        share = DTensor.from_local(grad / ctx.mesh.size(), ctx.mesh, [Partial()] * ctx.mesh.ndim, run_check=False)
        return share.redistribute(placements=ctx.placements)


def gathered(tensors):
    """{name: tensor} with every DTensor whole. All of its processes take part."""
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}


def writes(tensors):
    """Whether this process writes what `gathered` returned: the first of the mesh, or any if nothing is laid out."""
    meshes = [t.device_mesh for t in tensors.values() if isinstance(t, DTensor)]
    return not meshes or not any(meshes[0].get_coordinate())


def copy_into(own, tensor):
    """Copy a whole tensor that every process has into `own`, or into this process's part of it."""
    if isinstance(own, DTensor):
        tensor = tensor.to(own.device, own.dtype)
        tensor = distribute_tensor(tensor, own.device_mesh, own.placements, src_data_rank=None)
    own.copy_(tensor)
