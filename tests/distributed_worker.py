"""Two processes on the CPU train and run a tiny Llama in every mode; the first prints what came out as JSON.

A program: `python -m torch.distributed.run --nproc-per-node 2 tests/distributed_worker.py FOLDER MODE...`. The modes
are the functions below; the figures are compared in test_distributed.py.
"""

import itertools
import json
import os
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import tiny_models as tiny
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fastedit as fe
from fastedit.patching.merge import MergeError

STEPS, RESUME_AT, BATCH, LENGTH = 5, 2, 4, 8


def edits():
    """What trains, and an edit that does not; RED rides alone on its add, the others fold at theirs."""
    vector = torch.linspace(-1, 1, tiny.WIDTH)
    return [fe.RED(), fe.DiReFT(2, layers=[1]), fe.NoReFT(2, site="attn"), fe.Steer(vector, strength=0.5)]


def constrained():
    """What is brought back onto its manifold after each step."""
    return [fe.LoReFT(2), fe.Rotate(torch.eye(2, tiny.WIDTH), 0.3, site="mlp", trainable=True)]


def model_and_handle(freeze=True, made=edits):
    model = tiny.build("llama", num_hidden_layers=2).train()
    return model, fe.patch(model, made(), freeze=freeze)


def batch(step):
    """(4, 8) token ids: the global batch of a step."""
    return torch.randint(3, tiny.VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(step))


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def alone(parts, freeze=True, made=edits):
    """The losses of one process at the same global batch, in `parts` accumulated parts; its handle's tensors."""
    model, handle = model_and_handle(freeze, made)
    optimizer, losses = optimizer_of(model), []
    for step in range(STEPS):
        shares = []
        for part in batch(step).chunk(parts):
            loss = loss_of(model, part) / parts
            loss.backward()
            shares.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(sum(shares)))
    return losses, handle.named_tensors()


def train(model, optimizer, steps, before_step=lambda step: None):
    """This process's part of every batch; the losses, averaged over the processes."""
    losses = []
    for step in steps:
        before_step(step)
        loss = loss_of(model, batch(step).chunk(dist.get_world_size())[dist.get_rank()])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        share = loss.detach() / dist.get_world_size()
        dist.all_reduce(share)
        losses.append(float(share))
    return losses


def sharded(model, handle, policy, dtype=None):
    """fully_shard on every layer and the model, the edits by the policy or with the rest (None)."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    apart = set() if policy is None else fe.distributed.shard(handle, mesh, policy=policy)
    options = {"mesh": mesh, "ignored_params": apart, "mp_policy": MixedPrecisionPolicy(param_dtype=dtype)}
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def wrapped(model, handle, how):
    if how == "ddp":
        return DistributedDataParallel(model)
    if how.startswith("edits_"):
        fe.distributed.shard(handle, init_device_mesh("cpu", (dist.get_world_size(),)), how.partition("_")[2])
        return model
    return sharded(model, handle, {"rest": None}.get(how, how))


def finish(folder, name, handle, losses, **more):
    """Save, load into a model of one process, and compare what they say."""
    place = folder / f"{name}-{dist.get_rank()}"  # each process its own folder, to see who writes
    handle.save(place)
    tensors = handle.named_tensors()
    dist.barrier()
    found = {
        "losses": losses, "wrote": place.exists(), "dtypes": sorted({str(t.dtype) for t in tensors.values()}),
        "finite": all(bool(t.isfinite().all()) for t in tensors.values()),
        "tensors": {n: t.double().sum().item() for n, t in tensors.items()},
    }  # fmt: skip
    if dist.get_rank() == 0:
        other = tiny.build("llama", num_hidden_layers=2)
        loaded = fe.load(other, place).named_tensors()
        found["saved"] = all(torch.equal(loaded[n], t) for n, t in tensors.items())
        found["says"] = float(loss_of(other, batch(99)).detach())
    return found | more


def trained(folder, how, freeze=True):
    """Train, save everything half way, train on; then a fresh model resumes from there."""
    point, curves = folder / f"checkpoint-{how}-{freeze}", []
    for resumed in (False, True):
        model, handle = model_and_handle(freeze)
        model = wrapped(model, handle, how)
        optimizer, state = optimizer_of(model), model.module if how == "ddp" else model

        def both(state=state, optimizer=optimizer):
            parts = get_state_dict(state, optimizer)
            return {"model": parts[0], "optimizer": parts[1]}

        def save(step, both=both):
            if step == RESUME_AT:
                dcp.save(both(), checkpoint_id=point)

        if resumed:
            found = both()
            dcp.load(found, checkpoint_id=point)
            set_state_dict(
                state, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"]
            )
            curves.append(train(model, optimizer, range(RESUME_AT, STEPS)))
        else:
            curves.append(train(model, optimizer, range(STEPS), save))
    with torch.no_grad():
        says = float(loss_of(model, batch(99)))
    laid = sorted({type(p).__name__ for p in handle.parameters()})
    found = finish(folder, how, handle, curves[0], resumed=curves[1], laid=laid, said=says)
    handle.strength = 0.0
    with torch.no_grad():
        found["off"] = float(loss_of(model, batch(99)))
    return found


def reference(folder):
    losses, _ = alone(1)
    parts, part_tensors = alone(2)
    whole_parts, _ = alone(2, freeze=False)
    sums = {n: t.double().sum().item() for n, t in part_tensors.items()}
    return {"whole": losses, "parts": parts, "all_parts": whole_parts, "tensors": sums}


def ddp(folder):
    return trained(folder, "ddp")


def on_a_manifold(folder):
    """LoReFT and a rotation that trains: under DDP as one process; laid out over several, refused."""
    losses, tensors = alone(2, made=constrained)
    model, handle = model_and_handle(made=constrained)
    model = DistributedDataParallel(model)
    found = {"alone": losses, "losses": train(model, optimizer_of(model), range(STEPS))}
    mine = handle.named_tensors()
    found["same"] = all(torch.equal(mine[name], tensor) for name, tensor in tensors.items())
    basis = mine["0.layers.1.block.write"].double()
    found["apart"] = float((basis @ basis.T - torch.eye(2)).abs().max())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model, handle = model_and_handle(made=constrained)
    found["refused"] = []
    for lay_out in (lambda: fe.distributed.shard(handle, mesh), lambda: fully_shard(model, mesh=mesh)):
        try:
            lay_out()
        except ValueError as error:
            found["refused"].append(str(error))
    return found


def edits_replicate(folder):
    """The edits laid out, the base whole on each process."""
    return trained(folder, "edits_replicate")


def edits_shard(folder):
    return trained(folder, "edits_shard")


def replicate(folder):
    return trained(folder, "replicate")


def shard(folder):
    return trained(folder, "shard")


def rest(folder):
    return trained(folder, "rest")


def base_too(folder):
    return trained(folder, "shard", freeze=False)


def bf16(folder):
    """The base computes in bf16, the masters stay as they are."""
    found = {}
    for how in ("replicate", "shard"):
        model, handle = model_and_handle()
        model = sharded(model, handle, how, torch.bfloat16)
        losses = train(model, optimizer_of(model), range(STEPS))
        found[how] = finish(folder, f"bf16-{how}", handle, losses)
    model, handle = model_and_handle()
    model = sharded(model, handle, None, torch.bfloat16)
    try:
        train(model, optimizer_of(model), range(1))
    except Exception as error:
        found["rest"] = f"{type(error).__name__}: {error}"
    return found


def patched_after(folder):
    """A model that fully_shard has wrapped already is patched, and unpatched."""
    model = tiny.build("llama", num_hidden_layers=2).train()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with torch.no_grad():
        before = loss_of(model, batch(99))
    handle = fe.patch(model, edits(), freeze=True)
    fe.distributed.shard(handle, mesh)
    losses = train(model, optimizer_of(model), range(STEPS))
    found = finish(folder, "after", handle, losses)
    handle.remove()
    with torch.no_grad():
        found["back"] = torch.equal(loss_of(model, batch(99)), before)
    return found


def accelerate_fsdp2(folder):
    """What accelerate's FSDP2 plugin does to a model; its Accelerator has no FSDP on the CPU."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    found = {}
    for precision in ("no", "bf16"):
        model, handle = model_and_handle()
        fe.distributed.shard(handle, init_device_mesh("cpu", (dist.get_world_size(),)))
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False,
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"], ignored_modules="fastedit",
        )  # fmt: skip
        if precision != "no":
            plugin.set_mixed_precision(precision)
        state = SimpleNamespace(fsdp_plugin=plugin)
        accelerator = SimpleNamespace(
            state=state, mixed_precision=precision, device=torch.device("cpu"), is_main_process=True
        )
        model = fsdp2_prepare_model(accelerator, model)
        losses = train(model, optimizer_of(model), range(STEPS))
        found[precision] = finish(folder, f"accelerate-{precision}", handle, losses)
        found[precision]["layers"] = all(isinstance(layer, FSDPModule) for layer in model.model.layers)
    return found


def refusal(call):
    try:
        call()
    except MergeError as error:
        return str(error)
    return None


def tensor_parallel(folder):
    """The family's own plan from transformers: column-wise in, row-wise out, sums reduced by its forwards."""
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    place = folder / "base"
    if dist.get_rank() == 0:
        tiny.build("llama", num_hidden_layers=2).save_pretrained(place)
    dist.barrier()
    ids = batch(99)
    one = LlamaForCausalLM.from_pretrained(place).eval()
    split = LlamaForCausalLM.from_pretrained(place, distributed_config=DistributedConfig(tp_plan="auto")).eval()
    wide = tiny.exact(one)
    found = {"sharded": isinstance(split.model.layers[0].mlp.down_proj.weight, DTensor)}
    for site, fused in itertools.product(("mlp", "attn", "block"), (True, False)):
        change = [fe.ScaleBias(torch.linspace(0.5, 1.5, tiny.WIDTH), torch.linspace(-1, 1, tiny.WIDTH), site=site)]
        says = []
        for model in (one, split, wide):
            handle = fe.patch(model, change, fused=fused)
            with torch.no_grad():
                says.append(model(ids).logits)
            if model is split:
                found["merge"] = [*found.get("merge", []), refusal(handle.merge)]
            handle.remove()
        eager, got, exact = says
        found[f"{site}, fused {fused}"] = [float((got.double() - exact).abs().max()), float((eager.double() - exact).abs().max()),
                       float(exact.abs().max())]  # fmt: skip
    return found


def main():
    folder, modes = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {}
    for mode in modes:
        try:
            results[mode] = globals()[mode](folder)
        except Exception:
            results[mode] = {"error": traceback.format_exc()[-3000:]}
            break  # the other process may wait for this one
        dist.barrier()
    (folder / f"results-{dist.get_rank()}.json").write_text(json.dumps(results))
    if any("error" in r for r in results.values()):
        os._exit(1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
