"""Patching: edits onto this model's instances, and every bit of the model back (DESIGN.md 5).

    handle = fastedit.patch(model, edits)
    ...
    handle.remove()

Edits live in one submodule, `model.fastedit`, one child a handle, so parameters(), state_dict(), Trainer and
the wrappers see them. Each (layer, site) has one `Site` holding the edits of all handles there, in order.
"""

import math
import sys
from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from .changes import advise_rate, optimizer_steps
from .edits import Edit
from .generating import check_lengths, check_mask
from .heads import heads
from .merging import MergeError, merge_handle
from .planning import device_at, plan, width_at
from .probes import readings
from .report import report
from .root import Root, mark_first, root_of
from .tenants import Assignment, Tenancy, check_count, check_tenant

RATES = "Published: RED 1e-3 to 2e-2, LoReFT and its kin 4e-4 to 4e-3, a vector 5e-4 or more."


def patch(model, edits, *, freeze=False, fused=True, tenants=None):
    """Put edits on a model, in place; returns the Handle that dials, saves, merges and removes them.

    Args:
        model: an nn.Module with a stack of layers (fastedit/families); on any device, meta included.
        edits: an Edit or a list of them: a stack, applied in order, after those of earlier handles.
        freeze: let only the edits train, and what is newly initialised: a task head, a pooler, a projector (fastedit/heads.py).
        fused: False keeps to the plain path, where an edit is an op of its own.
        tenants: a number of tenants to train in one batch: every tensor gets a leading tenant dimension, and forwards
            run inside `handle.assign` (fastedit/tenants.py).

    Raises:
        TypeError, ValueError: what cannot be patched, before anything on the model has changed.
    """
    return patch_as(Handle, model, edits, freeze, fused, tenants)


def patch_as(kind, model, edits, freeze=False, fused=True, tenants=None):
    """`patch`, with a Handle of another kind."""
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
    for name, value in (("freeze", freeze), ("fused", fused)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}, expected True or False")
    tenancy = None if check_count(tenants) is None else Tenancy(tenants)
    for edit in edits:
        if tenancy is not None and (edit.gate is not None or edit.is_probe or edit.stage is not None):
            what = "an edit behind a gate" if edit.gate is not None else f"a {type(edit).__name__}"
            raise ValueError(f"tenants have tensors of their own, and {what} has none: patch it apart, without tenants=")
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
    return kind(model, root, edits, members, freeze, fused, tenancy)


def handles(model):
    """The handles on a model, in the order they were patched; a copied model has handles of its own."""
    root = root_of(model)
    return [] if root is None else [handle for handle in root.handles.values() if isinstance(handle, Handle)]


class Handle:
    """The edits of one `patch` call on a model. Also a context manager: leaving it removes them."""

    def __init__(self, model, root, edits, members, freeze, fused, tenancy=None):
        self.tenancy = tenancy
        self.model, self.edits, self.freeze = model, edits, freeze
        self.removed, self._merged = False, None
        self.name = root.new_name()
        self._root, self._members, self._strength = root, members, 1.0
        for masters in [*(m for _, _, m in self._each()), *self._sensors()]:
            masters.fused = fused
        mark_first((layer, masters) for _, layer, masters in self._each())
        model._modules["fastedit"] = root
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

    def config(self):
        """One JSON-able description an edit, layers resolved; `fastedit.edit_config.from_config` reads it back."""
        return [
            {**edit.config(), "layers": [layer.index for layer, _ in members]}
            for edit, members in zip(self.edits, self._members, strict=True)
        ]

    def named_tensors(self, *, tenant=None):
        """{"0.layers.3.mlp.scale": tensor}: edit number, layer, site, name. The fp32 masters, detached.

        Of a handle with tenants all of them, (tenants, …), or one tenant's. Masters laid out over several processes are
        gathered: all of these call this together.
        """
        found = {name: tensor.detach() for name, tensor in self._named()}
        if any(type(tensor) is not torch.Tensor for tensor in found.values()):
            from . import distributed

            found = distributed.gathered(found)
        if tenant is None:
            return found
        check_tenant(tenant, self._tenants().count)
        return {name: tensor[tenant] for name, tensor in found.items()}

    def load_tensors(self, tensors):
        """Copy tensors into the masters, in place. `tensors` has exactly the names of `named_tensors`.

        Raises:
            KeyError, ValueError, TypeError: names, shapes, dtypes or values that do not fit; nothing changed.
        """
        self._changeable()
        if not isinstance(tensors, Mapping):
            raise TypeError(f"tensors is {tensors!r:.60}, expected a mapping from names to tensors")
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
        self._start = None
        with torch.no_grad():
            for name, tensor in tensors.items():
                if type(own[name]) in (torch.Tensor, nn.Parameter):
                    own[name].copy_(tensor)
                else:
                    from . import distributed

                    distributed.copy_into(own[name], tensor)

    def parameters(self):
        """The trainable masters."""
        return self._tree.parameters()

    def never_moved(self):
        """Whether the edits are to be trained and are still where they began; False where that is not known."""
        if self._start is None or not any(masters.trainable for _, _, masters in self._each()):
            return False
        now = self._sums()
        return now is not None and all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(self._start, now, strict=True))

    def _sums(self):
        """Two numbers a tensor, which tell whether any has moved; None where there is nothing to add up."""
        found = [tensor.detach() for _, tensor in self._named()]
        if any(type(t) is not torch.Tensor or t.device.type in ("meta", "mps") for t in found):
            return None  # mps has no fp64
        return [torch.stack([t.sum(dtype=torch.float64), t.square().sum(dtype=torch.float64)]) for t in found]

    def num_parameters(self):
        """How many numbers the edits hold, frozen ones included."""
        return sum(tensor.numel() for _, tensor in self._named())

    def print_trainable_parameters(self):
        """Print how many numbers train, of the edits and of the whole model, as PEFT's models do."""
        mine = sum(p.numel() for p in self.parameters() if p.requires_grad)
        model = [(p.numel(), p.requires_grad) for p in self.model.parameters()]
        total, trained = sum(n for n, _ in model), sum(n for n, needs in model if needs)
        print(
            f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / max(total, 1):.4f} || "
            f"of these edits: {mine:,d}"
        )

    @property
    def strength(self):
        """A factor on every edit's own strength, 1 as patched. Setting it needs no re-trace or recapture."""
        return self._strength

    @strength.setter
    def strength(self, value):
        if isinstance(value, (bool, str)):
            raise TypeError(f"strength is {value!r}, expected a number")
        try:
            value = float(value)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"strength is {value!r:.60}, expected a number") from None
        if not math.isfinite(value):
            raise ValueError(f"strength is {value}, expected a finite number")
        self._changeable()
        largest = max((abs(value * edit.strength) for edit in self.edits), default=0.0)
        if not largest <= torch.finfo(torch.float32).max:  # before the first dial is set: all of them or none
            raise ValueError(f"strength is {value}, which makes an edit's own strength {largest:g}: beyond what fp32 holds")
        with torch.no_grad():
            for edit, _, masters in self._each():
                masters.set_strength(value * edit.strength)
        self._strength = value

    def prompt(self, lengths):
        """How long the prompts are, for forwards on a filled cache: positions such as "generated" depend on it.

        lengths: real tokens, an int for every sequence or whole numbers (sequences,), of packed rows one per sequence in
        their order; None to take it back. For all handles of the model, in this thread and asyncio task. `generate` knows
        its own prompts and needs no telling.
        """
        self._alive()
        self._root.rows.lengths = check_lengths(lengths)

    def mask(self, mask):
        """Where edits with positions="mask" act, in the forwards and calls of `generate` from now on.

        mask: (sequences, columns), bool, or fp32 as a factor on the edit; columns behind it are not edited. None to take
        it back. For all handles of the model, in this thread and asyncio task.
        """
        self._alive()
        mask = check_mask(mask)
        self._root.rows.mask = mask if mask is None else mask.to(next(self._each())[2].dial.device)

    @property
    def readings(self):
        """What the probes among the edits read in this thread's last forward: a list of fp32 tensors, one a Probe.

        Each is (layers, batch, tokens, probes). Within a call of `generate` the forwards are joined by token, except
        under torch.compile. [] before the first forward; no gradient flows through them.
        """
        return readings(self._members)

    def save(self, folder, *, tenant=None):
        """Write the edits to a folder (fastedit.store), and the head or adapter that was trained along (fastedit.kept); of
        a handle with tenants one tenant's, as an ordinary edit.

        Over several processes (fastedit.distributed) all call this, and the first writes.
        """
        from . import store

        return store.save(self, folder, tenant=tenant)

    # --- tenants --------------------------------------------------------------------------------------------

    def assign(self, tenants):
        """A context inside which sequence i of a batch is edited by, and trains, tenants[i]; None or -1: by none.

        Args:
            tenants: one tenant a sequence, numbers from 0 (in `generate`, beams and samples of a sequence share its
                tenant). It holds as Bank.assign's does. Backward may follow outside; that of a checkpoint made by hand
                (torch.utils.checkpoint), which runs forwards again, belongs inside.

        Raises:
            ValueError: the handle has no tenants, or not that one.
        """
        return Assignment(self._tenants(), tenants)

    def tenant(self, tenant):
        """One tenant's edits as they are now: ordinary edits, to patch onto any model of this shape."""
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

    def report(self):
        """Each edit's site, path (fused, or plain and why), backend, parameters and bytes; print it."""
        return report(self)

    def explain(self, inputs):
        """Run a forward and tell which tokens of which rows were edited, by which edit, how strongly, behind which gate.

        Args:
            inputs: input_ids (batch, tokens), or a mapping with what the model's forward takes.

        Returns:
            An Explanation: print it for a table, `plot()` for a picture; `told` has the numbers. Probes and a Control are
            not in it.

        Raises:
            RuntimeError: the handle is removed or merged. TypeError: inputs without tokens.
        """
        from .explaining import explain

        return explain(self, inputs)

    # --- merge ----------------------------------------------------------------------------------------------

    @property
    def merged(self):
        """Whether the edits are in the weights now."""
        return self._merged is not None

    def merge(self, *, fp32=False):
        """Put the edits, at their strength now, into the weights of the linear maps they follow.

        While merged the model is an ordinary one: its state dict holds no edits, and `save_pretrained` saves
        the merged weights. An existing bias is changed. A missing one is added; where the config has a
        setting for it (Llama: mlp_bias, attention_bias) that is set, and zeros fill the biases it implies
        elsewhere, so that `from_pretrained` reloads it. T5, Mistral and Qwen2 have no such setting: a warning
        says so, and such a model runs but does not reload its new biases.

        Args:
            fp32: keep a layer in float32 where its own dtype would lose more than 2 % of the edit to rounding
                (reload such a model with dtype=torch.float32).

        Raises:
            MergeError: `block`, `embed` and `final` edits, quantised, adapted or tied weights, another handle's
                edits in front, or too much rounding; the model is as it was.
        """
        self._alive()
        if self.merged:
            raise MergeError("this handle is merged already")
        self._root.look()
        self._merged = merge_handle(self, fp32)
        self._deactivate()
        del self._root._modules[self.name]
        self._root.merged.append(self)

    def unmerge(self):
        """Put the original weights back, bit for bit, and the edits in force again.

        Raises:
            MergeError: not merged, not the last one merged there, or a module with merged weights was replaced since.
        """
        if not self.merged:
            raise MergeError("this handle is not merged")
        present = set(self.model.modules())
        if any(module not in present for module, *_ in self._merged.parameters):
            raise MergeError("a module that the edits were merged into was replaced since: what replaced it keeps them")
        later = self._root.merged[self._root.merged.index(self) + 1 :]
        if any(self._modules() & other._modules() for other in later):
            raise MergeError("another handle was merged behind this one; unmerge that first")
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
        """Those whose weights a merge changes: several sites may share one."""
        return {layer.at(edit.site) for edit, layer, _ in self._each()}

    # --- undo -----------------------------------------------------------------------------------------------

    def remove(self):
        """Give the model back bit for bit, a merge undone too. Doing it again does nothing."""
        if self.removed:
            return
        if self.merged:
            self.unmerge()
        self._deactivate()
        self._root.drop(self.model, self.name)
        self.removed = True

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.remove()

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
        """The gates that measure elsewhere than their edits act."""
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
        """Put the masters behind those that are at their sites already, or in front of them."""
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
