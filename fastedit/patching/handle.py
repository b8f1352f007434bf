"""Patching: edits go onto this model's instances, and the model comes back bit for bit (docs/design.md, 8).

    handle = fastedit.patch(model, edits)
    ...
    handle.remove()

Edits live in one submodule, `model.fastedit`, with one child per handle. So parameters(), state_dict(), Trainer and the
wrappers see them. Each (layer, site) has one `Site` with the edits of all handles there, in order.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ..arguments import check_flag
from ..edits.kinds import Edit
from ..ops.parameter_changes import advise_rate, optimizer_steps
from . import saving
from .eval_mode import check_data
from .heads import heads
from .layer_plan import device_at, plan, width_at
from .merge import MergeError, merge_handle
from .model_edits import Root, mark_first, root_of
from .probe_readings import Readings, readings
from .report import report
from .rows.generating import check_lengths, check_mask
from .rows.tenants import Assignment, Tenancy, check_count, check_tenant
from .under_way import MAKING, leave

if TYPE_CHECKING:
    from .explain import Explanation
    from .report import Report

RATES = "Published: RED 1e-3 to 2e-2, LoReFT and its kin 4e-4 to 4e-3, a vector 5e-4 or more."


def patch(
    model: nn.Module, edits: Edit | Sequence[Edit], *, freeze: bool = False, fused: bool = True, tenants: int | None = None
) -> Handle:
    """Put edits on a model, in place. Returns the Handle that dials, saves, merges and removes them.

    Args:
        model: an nn.Module with a stack of layers (fastedit/families), on any device, meta included.
        edits: an Edit or a list of them: a stack, applied in order, after those of earlier handles.
        freeze: let only the edits train, and newly initialized modules: a task head, a pooler, a projector
            (fastedit/patching/heads.py).
        fused: False keeps to the plain path, where an edit is an op of its own.
        tenants: a number of tenants to train in one batch. Every tensor gets a leading tenant dimension, and forwards
            run inside `handle.assign` (fastedit/patching/rows/tenants.py).

    Raises:
        TypeError, ValueError: something that cannot be patched, before anything on the model has changed.
        RuntimeError: a forward of the model is under way in another thread (also of load, load_tensors, merge, unmerge and
            remove).
    """
    return patch_as(Handle, model, edits, freeze, fused, tenants)


def patch_as(kind, model, edits, freeze=False, fused=True, tenants=None, fill=None):
    """`patch`, with another class of Handle. fill(handle) belongs to it: where that raises, the model is as it was."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {model!r:.60}, expected a torch.nn.Module, such as a transformers model")
    if not isinstance(edits, (Edit, list, tuple)):
        raise TypeError(f"edits is {edits!r:.60}, expected an Edit such as fastedit.RED(), or a list of them")
    edits = [edits] if isinstance(edits, Edit) else list(edits)
    for edit in edits:
        if not isinstance(edit, Edit):
            raise TypeError(f"edits holds a {type(edit).__name__}, expected an Edit such as fastedit.RED()")
    if not edits:
        raise ValueError("edits is empty: there is nothing to patch")
    check_flag("freeze", freeze), check_flag("fused", fused)
    tenancy = None if check_count(tenants) is None else Tenancy(tenants)
    for edit in edits:
        if tenancy is not None and (edit.gate is not None or edit.is_probe or edit.stage is not None):
            what = "an edit behind a gate" if edit.gate is not None else f"a {type(edit).__name__}"
            raise ValueError(f"tenants have tensors of their own, and {what} has none: patch it separately, without tenants=")
    with MAKING:
        root = root_of(model) or Root(model)
        with torch.inference_mode(False):
            members = [plan(edit, root.layers, tenancy) for edit in edits]
        root.check(
            (layer, e.site, width_at(layer, e.site), m.needs_plan or tenancy is not None, m.is_probe or m.gating is not None)
            for e, chosen in zip(edits, members, strict=True) for layer, m in chosen
        )  # fmt: skip
        sensors = [s for chosen in members for s in _shared(chosen).values()]
        root.check((s.layer, s.site, width_at(s.layer, s.site), True, True) for s in sensors)
        if fused:
            places = [(layer, e.site) for e, chosen in zip(edits, members, strict=True) for layer, _ in chosen]
            root.prove(places + [(sensor.layer, sensor.site) for sensor in sensors])
        with root.changing(model, "patch" if fill is None else "load"):
            handle = kind(model, root, edits, members, freeze, fused, tenancy)
            if fill is not None:
                try:
                    fill(handle)
                except BaseException:
                    handle.remove()
                    raise
            return handle


def handles(model: nn.Module) -> list[Handle]:
    """The handles on a model, in the order in which they were patched. A copied model has handles of its own."""
    root = root_of(model)
    return [] if root is None else [handle for handle in root.handles.values() if isinstance(handle, Handle)]


class Handle:
    """The edits of one `patch` call on a model. As a context manager it removes them on exit."""

    def __init__(self, model, root, edits, members, freeze, fused, tenancy=None):
        self.tenancy = tenancy
        self.model, self.edits, self.freeze = model, edits, freeze
        self.removed, self._merged = False, None
        self.name = root.new_name()
        self._root, self._members, self._strength = root, members, 1.0
        for masters in [*(m for _, _, m in self._each()), *self._sensors()]:
            masters.fused = fused
        mark_first((layer, masters) for _, layer, masters in self._each())
        root.put(model)
        root.handles[self.name] = self
        self._tree = self._build_tree()
        root.add_module(self.name, self._tree)
        try:
            self._activate()
            if freeze:
                self._freeze()
            advise_rate(self.parameters(), RATES)
            self._start, self.since = self._sums(), optimizer_steps()
        except BaseException:
            self.remove()
            raise

    # --- what it holds --------------------------------------------------------------------------------------

    def config(self) -> list[dict[str, Any]]:
        """One JSON-able description per edit, layers resolved. `fastedit.edits.config.from_config` reads it back."""
        return [
            {**edit.config(), "layers": [layer.index for layer, _ in members]}
            for edit, members in zip(self.edits, self._members, strict=True)
        ]

    def named_tensors(self, *, tenant: int | None = None) -> dict[str, torch.Tensor]:
        """{"0.layers.3.mlp.scale": tensor}: edit number, layer, site, name. The fp32 masters, detached.

        With tenants, a tensor has the shape (tenants, …). `tenant=` selects the tensors of one tenant. Masters laid out
        over several processes are gathered: all of these processes must call this.
        """
        found = {name: tensor.detach() for name, tensor in self._named()}
        if any(type(tensor) is not torch.Tensor for tensor in found.values()):
            from . import distributed

            found = distributed.gathered(found)
        if tenant is None:
            return found
        check_tenant(tenant, self._tenants().count)
        return {name: tensor[tenant] for name, tensor in found.items()}

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy tensors into the masters, in place. `tensors` has exactly the names of `named_tensors`.

        Raises:
            KeyError, ValueError, TypeError: names, shapes, dtypes or values that do not fit. Nothing has changed.
        """
        self._changeable()
        if not isinstance(tensors, Mapping):
            raise TypeError(f"tensors is {tensors!r:.60}, expected a mapping from names to tensors")
        check_data(self._tree, "to take an edit's tensors")
        own = dict(self._named())
        missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
        if missing or extra:
            raise KeyError(
                f"expected {len(own)} tensors and found {len(tensors)}; "
                f"missing: {', '.join(missing[:3]) or 'none'}; "
                f"not of this handle: {', '.join(map(str, extra[:3])) or 'none'}"
            )
        for name, tensor in tensors.items():
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{name} is {type(tensor).__name__}, expected a float32 tensor")
            if tensor.shape != own[name].shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(own[name].shape)}")
            if not tensor.is_floating_point():
                raise TypeError(f"{name} has dtype {tensor.dtype}, expected float32")
            if not tensor.isfinite().all():
                raise ValueError(f"{name} holds values that are NaN or infinite")
        with self._root.changing(self.model, "load_tensors"), torch.no_grad():
            self._changeable()
            self._start = None
            for name, tensor in tensors.items():
                if type(own[name]) in (torch.Tensor, nn.Parameter):
                    own[name].copy_(tensor)
                else:
                    from . import distributed

                    distributed.copy_into(own[name], tensor)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trainable masters."""
        return self._tree.parameters()

    def never_moved(self) -> bool:
        """Whether the edits should train and still have their initial values. False if that is not known."""
        if self._start is None or not any(masters.trainable for _, _, masters in self._each()):
            return False
        now = self._sums()
        return now is not None and all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(self._start, now, strict=True))

    def _sums(self):
        """Two numbers per tensor, which show whether any has moved. None if there is nothing to add up."""
        found = [tensor.detach() for _, tensor in self._named()]
        if any(type(t) is not torch.Tensor or t.device.type in ("meta", "mps") for t in found):
            return None  # mps has no fp64
        return [torch.stack([t.sum(dtype=torch.float64), t.square().sum(dtype=torch.float64)]) for t in found]

    def num_parameters(self) -> int:
        """How many numbers the edits hold, frozen ones included."""
        return sum(tensor.numel() for _, tensor in self._named())

    def print_trainable_parameters(self) -> None:
        """Print how many numbers train, in the edits and in the whole model, as PEFT's models do."""
        mine = sum(p.numel() for p in self.parameters() if p.requires_grad)
        model = [(p.numel(), p.requires_grad) for p in self.model.parameters()]
        total, trained = sum(n for n, _ in model), sum(n for n, needs in model if needs)
        print(
            f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / max(total, 1):.4f} || "
            f"of these edits: {mine:,d}"
        )

    @property
    def strength(self) -> float:
        """A factor on every edit's own strength, 1 as patched. Setting it needs no new trace or capture.

        It may be set while forwards are under way in other threads: each layer of such a forward has its edit at the old
        strength or at the new one, wholly.
        """
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        if isinstance(value, (bool, str)):
            raise TypeError(f"strength is {value!r}, expected a number")
        try:
            value = float(value)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"strength is {value!r:.60}, expected a number") from None
        except OverflowError:
            raise ValueError(f"strength is {value!r:.30}…, expected a finite number") from None
        if not math.isfinite(value):
            raise ValueError(f"strength is {value}, expected a finite number")
        largest = max((abs(value * edit.strength) for edit in self.edits), default=0.0)
        if not largest <= torch.finfo(torch.float32).max:  # before the first dial is set: all of them or none
            raise ValueError(f"strength is {value}, which makes an edit's own strength {largest:g}: beyond what fp32 holds")
        with self._root.dials, torch.no_grad():
            self._changeable()
            for edit, _, masters in self._each():
                masters.set_strength(value * edit.strength)
            self._strength = value

    def prompt(self, lengths: int | Sequence[int] | torch.Tensor | None) -> None:
        """Say how long the prompts are, for forwards on a filled cache. Positions such as "generated" depend on it.

        lengths: in real tokens: an int for every sequence, or whole numbers (sequences,). For packed rows one per
        sequence, in order. None takes it back. Holds for all handles of the model, in this thread and asyncio task.
        `generate` knows its own prompts and needs no call of this.
        """
        self._alive()
        self._root.rows.lengths = check_lengths(lengths)

    def mask(self, mask: torch.Tensor | Sequence[Sequence[float]] | None) -> None:
        """Say where edits with positions="mask" act, in all later forwards and calls of `generate`.

        mask: (sequences, columns), bool, or fp32 as a factor on the edit. Columns beyond it are not edited. None takes
        it back. Holds for all handles of the model, in this thread and asyncio task.
        """
        self._alive()
        mask = check_mask(mask)
        self._root.rows.mask = mask if mask is None else mask.to(next(self._each())[2].dial.device)

    @property
    def readings(self) -> Readings:
        """What the probes among the edits read in this thread's last forward: a list of fp32 tensors, one per Probe.

        Each is (layers, batch, tokens, probes). Within a call of `generate` the forwards are joined by token, except
        under torch.compile. [] before the first forward. No gradient flows through them.
        """
        return readings(self._members)

    def save(self, folder: str | os.PathLike[str], *, tenant: int | None = None) -> Path:
        """Write the edits to a folder (fastedit.store), with the head or adapter that was trained beside them.

        With tenants, `tenant=` selects the one to save, as an ordinary edit. Over several processes
        (fastedit.distributed) all call this, and the first one writes.
        """
        return saving.save(self, folder, tenant=tenant)

    def push_to_hub(
        self, repo: str, *, base_model: str | None = None, training: dict[str, Any] | None = None, private: bool | None = None,
        token: str | None = None, message: str = "Upload an edit", tenant: int | None = None,
    ) -> str:  # fmt: skip
        """Save the edits to a Hub repo "user/name", with a model card. `fastedit.load(model, "user/name")` reads them.

        Args:
            base_model, training, tenant: as of `fastedit.store.save`.
            private, token, message: as of huggingface_hub; a repo that is not there is made.

        Returns:
            The commit's address.

        Raises:
            ValueError: as `save`, or repo is no "user/name". OSError: the hub refused or could not be reached.
        """
        from .hub import push_handle

        return push_handle(
            self, repo, base_model=base_model, training=training, tenant=tenant, private=private, token=token, message=message
        )

    def plot(self, axes: Any = None) -> list[Any]:
        """Draw what the edits hold, a row per layer: scale − 1 and bias by feature, or the norms of low-rank factors.

        Returns matplotlib axes, one per picture; new ones for axes=None.
        """
        from ..plots.edits import draw

        return draw(self.named_tensors(), axes)

    # --- tenants --------------------------------------------------------------------------------------------

    def assign(self, tenants: Sequence[int | None] | torch.Tensor) -> Assignment:
        """A context in which tenants[i] edits sequence i of a batch and trains on it. None or −1: no tenant.

        Args:
            tenants: one tenant per sequence, numbered from 0. In `generate`, beams and samples of a sequence share its
                tenant. An assignment holds as Bank.assign's does. The backward may follow outside. The backward of a
                checkpoint made by hand (torch.utils.checkpoint) runs forwards again and belongs inside.

        Raises:
            ValueError: the handle has no tenants, or not that one.
        """
        return Assignment(self._tenants(), tenants)

    def tenant(self, tenant: int) -> list[Edit]:
        """One tenant's present edits, as ordinary edits. They can be patched onto any model of this shape."""
        mine = self.named_tensors(tenant=check_tenant(tenant, self._tenants().count))
        held = [{} for _ in self.edits]
        for number, (edit, members) in enumerate(zip(self.edits, self._members, strict=True)):
            for layer, masters in members:
                prefix = f"{number}.{layer.name}.{edit.site}."
                held[number][layer.index] = {name: mine[prefix + name].cpu() for name in masters.masters()}
        return [edit.holding(layers) for edit, layers in zip(self.edits, held, strict=True)]

    def _tenants(self):
        if self.tenancy is None:
            raise ValueError("this handle holds one edit for everyone: patch with tenants= to train several in a batch")
        return self.tenancy

    def report(self) -> Report:
        """Each edit's site, path (fused, or plain and why), backend, parameters and bytes. Print it."""
        return report(self)

    def explain(self, inputs: torch.Tensor | Mapping[str, Any]) -> Explanation:
        """Run a forward and say which tokens of which rows were edited, by which edit, how strongly, behind which gate.

        Args:
            inputs: input_ids (batch, tokens), or a mapping with what the model's forward takes.

        Returns:
            An Explanation. Print it for a table, call `plot()` for a picture; `told` has the numbers. Probes and a
            Control are not in it.

        Raises:
            RuntimeError: the handle is removed or merged. TypeError: inputs without tokens.
        """
        from .explain import explain

        return explain(self, inputs)

    # --- merge ----------------------------------------------------------------------------------------------

    @property
    def merged(self) -> bool:
        """Whether the edits are in the weights now."""
        return self._merged is not None

    def merge(self, *, fp32: bool = False) -> None:
        """Put the edits, at their present strength, into the weights of the linear maps they follow.

        While merged the model is an ordinary one: its state dict holds no edits, and `save_pretrained` saves the merged
        weights. A vector at `block` is then part of the FFN's output, which edits at `mlp` patched later act on. An existing
        bias is changed. A missing one is added; where the config has a setting for it (Llama: mlp_bias, attention_bias) that
        is set, and zeros fill the biases it implies elsewhere, so that `from_pretrained` reloads it. T5, Mistral and Qwen2
        have no such setting: a warning says so, and such a model runs but does not reload its new biases.

        Args:
            fp32: keep a layer in float32 if its own dtype would lose more than 2 % of the edit to rounding
                (reload such a model with dtype=torch.float32).

        Raises:
            MergeError: `final` edits; `block` edits but a vector whose layer adds its FFN's output as it is; `embed` edits
                but where a table's rows enter the first layer as they are; quantised, adapted or tied weights, another
                handle's edits in front, or too much rounding; the model is as it was.
        """
        check_flag("fp32", fp32)
        with self._root.changing(self.model, "merge"):
            self._alive()
            if self.merged:
                raise MergeError("this handle is merged already")
            self._root.look()
            self._merged = merge_handle(self, fp32)
            self._deactivate()
            del self._root._modules[self.name]
            self._root.merged.append(self)

    def unmerge(self) -> None:
        """Restore the original weights bit for bit, and put the edits in force again.

        Raises:
            MergeError: not merged, not the last one merged there, or a module with merged weights was replaced since.
        """
        with self._root.changing(self.model, "unmerge"):
            if not self.merged:
                raise MergeError("this handle is not merged")
            present = set(self.model.modules())
            if any(module not in present for module, *_ in self._merged.parameters):
                raise MergeError("a module that the edits were merged into was replaced since: its replacement keeps them")
            later = self._root.merged[self._root.merged.index(self) + 1 :]
            if any(self._modules() & other._modules() for other in later):
                raise MergeError("another handle was merged after this one; unmerge that one first")
            self._restore()
            self._root.add_module(self.name, self._tree)
            self._activate(in_front=True)

    def _restore(self):
        self._merged.undo()
        self._merged = None
        self._root.merged.remove(self)
        for edit, layer, masters in self._each():  # they did not follow the model while they were out of it
            masters.to(device_at(layer, edit.site))

    def _modules(self):
        """Those whose weights the merge changed: several sites may share one, and a config's flag reaches other layers."""
        return {module for module, *_ in self._merged.parameters}

    # --- undo -----------------------------------------------------------------------------------------------

    def remove(self) -> None:
        """Give the model back bit for bit. A merge is undone too. A second call does nothing."""
        self._leave()

    def _leave(self, patience=None):
        with self._root.turn:
            if self.removed:
                return
            with self._root.changing(self.model, "remove", patience=patience):
                if self.merged:
                    self.unmerge()
                self._deactivate()
                self._root.drop(self.model, self.name)
                self.removed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        """Remove the edits. Waits a minute for forwards that are under way in other threads.

        Raises:
            RuntimeError: one still is, and the edits are still in force. Beside an exception of the block it is a warning.
        """
        leave(self._leave, kind)

    def __repr__(self):
        state = (
            "removed"
            if self.removed
            else f"{self.num_parameters():,} parameters on {type(self.model).__name__}"
        )
        return f"<fastedit handle {self.name}: {self.edits}, {state}>"

    # --- how ------------------------------------------------------------------------------------------------

    def _alive(self):
        if self.removed:
            raise RuntimeError("this handle was removed from its model; patch again")

    def _changeable(self):
        self._alive()
        if self.merged:
            raise MergeError("the edits are merged into the weights; unmerge() first")

    def _each(self):
        """(edit, layer, masters) of every site."""
        for edit, members in zip(self.edits, self._members, strict=True):
            for layer, masters in members:
                yield edit, layer, masters

    def _named(self):
        fsdp = sys.modules.get("torch.distributed.fsdp")
        if fsdp is not None and isinstance(self.model, fsdp.FSDPModule):
            self.model.reshard()  # what the last forward has gathered is a copy, and not what trains
        for number, (edit, members) in enumerate(zip(self.edits, self._members, strict=True)):
            for layer, masters in members:
                yield from _under(f"{number}.{layer.name}.{edit.site}", masters)
            for name, sensor in _shared(members).items():
                yield from _under(f"{number}.{name}", sensor)

    def _sensors(self):
        """The gates that measure at another place than their edits."""
        return [sensor for members in self._members for sensor in _shared(members).values()]

    def _build_tree(self):
        """Nested containers, so that the names in state_dict() are those of `named_tensors`."""
        tree = nn.Module()
        for number, (edit, members) in enumerate(zip(self.edits, self._members, strict=True)):
            for layer, masters in members:
                at = tree
                for part in (str(number), *layer.name.split(".")):
                    if part not in at._modules:
                        at.add_module(part, nn.Module())
                    at = at._modules[part]
                at.add_module(edit.site, masters)
            for name, sensor in _shared(members).items():
                tree._modules[str(number)].add_module(name, sensor)
        return tree

    def _activate(self, in_front=False):
        """Put the masters after those that are at their sites already, or in front of them."""
        own = {}
        for sensor in self._sensors():
            own.setdefault((sensor.layer, sensor.site), []).append(sensor)
        for edit, layer, masters in self._each():
            own.setdefault((layer, edit.site), []).append(masters)
        there = {key: self._root.stack(*key) for key in own}
        self._root.change(self.model, {k: own[k] + there[k] if in_front else there[k] + own[k] for k in own})

    def _deactivate(self):
        own = {id(masters) for masters in [*(m for _, _, m in self._each()), *self._sensors()]}
        keys = {(layer, edit.site) for edit, layer, _ in self._each()} | {(s.layer, s.site) for s in self._sensors()}
        self._root.change(self.model, {key: [m for m in self._root.stack(*key) if id(m) not in own] for key in keys})

    def _freeze(self):
        for module in self.model.modules():  # what fully_shard has gathered for a forward is not what an optimizer is given
            if isinstance(module, FSDPModule):
                module.reshard()
        kept = {id(p) for module in (self._root, *heads(self.model)) for p in module.parameters()}
        for parameter in self.model.parameters():
            if parameter.requires_grad and id(parameter) not in kept:
                parameter.requires_grad_(False)
                self._root.frozen.append(parameter)


def _under(prefix, masters):
    """(name, tensor) of masters, and of the gates at their own site."""
    for name, tensor in masters.masters().items():
        yield f"{prefix}.{name}", tensor
    for name, sensor in masters.named_children():
        yield from _under(f"{prefix}.{name}", sensor)


def _shared(members):
    """{name: sensor} of an edit's gates at other sites."""
    gating = members[0][1].gating
    if gating is None:
        return {}
    return {f"gate{n}": sensor for n, sensor in enumerate(gating.sensors) if sensor.layer is not None}
