"""Calls of what takes a model, with arguments right and wrong; a refusal leaves the model as it was, bit for bit.

Each target is a call that is right; one to three of its arguments are replaced by others: right ones as well (`also`), or
JUNK. What is served is judged by the target: a patched model by plain hooks (verifying/reference.py), others by what they
return; and the model must come back, bit for bit, when it is over.
"""

import contextlib
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import fastedit as fe
from fastedit.verifying.reference import Reference

from ..readers import DEPTH, WIDTH, model
from . import drawing as st
from .ops import JUNK, REFUSALS, said, says_enough

IDS = [[3, 7, 11, 2], [5, 5, 1]]
PROMPT = torch.tensor([IDS[0]])
VECTOR = torch.linspace(-1, 1, WIDTH)

LAYERS = (None, 0, -1, 1, [0, 1], range(2), slice(0, 1), "1", np.arange(2), [99], -9, "nope", [], [0, 0], 1.5, torch.tensor([1]))
SITES = ("block", "mlp", "attn", "q", "k", "v", "ffn_in", "embed", "final", "ffn", "MLP")
POSITIONS = (None, "all", "prompt", "generated", "first 2", "last 1", "first 2 + last 1", "last", "first -1", "mask", "first 1e9")
NUMBERS = (0, 1, 0.5, -2, 1e-30, 1e30, 1e39, torch.tensor(0.5), np.float64(0.25))
FLAGS = (True, False)
TENSORS = (
    VECTOR, VECTOR.double(), VECTOR.numpy(), VECTOR.tolist(), VECTOR.expand(DEPTH, WIDTH), VECTOR[:-1], VECTOR.expand(7, WIDTH),
    VECTOR.bfloat16(), VECTOR.int(), VECTOR * float("nan"), {0: VECTOR}, {0: VECTOR, 1: VECTOR}, {5: VECTOR}, {}, VECTOR[:0],
    torch.zeros(WIDTH), VECTOR.to("meta"), VECTOR.to_sparse(), VECTOR * 1e38, torch.ones(1, 1, 1, WIDTH),
)  # fmt: skip
COUNTS = (None, 1, 2, 0, -1, 7, 2.0, True)
FOLDERS = ("edit", "nothing here", ".", "/dev/null", Path("edit"), "edit/edit.json", "\0", "a" * 300)
DATA = (
    IDS, [[3]], [], [[]], [["a"]], [[99]], [[-1]], [[1.5]], "text", ["text"], [[3] * 300], {"input_ids": PROMPT},
    [{"input_ids": PROMPT}],
)  # fmt: skip
EDITS = ("red", "steer", "gated", "low-rank", "several", "probe", "kept norm", "empty", "doubled", "model", "class")


@dataclass
class Target:
    """run(world, **given): calls, judges what came and undoes it; False for wrong numbers. also: {argument: other values}."""

    run: callable
    base: dict
    also: dict = field(default_factory=dict)


class World:
    """A model with a saved edit beside it, made once."""

    def __init__(self, folder):
        self.model, self.folder = model(), Path(folder)
        with fe.patch(self.model, fe.Steer(VECTOR, site="mlp")) as handle:
            handle.save(self.folder / "edit")
        self.before = state(self.model)
        self.logits = said_by(self.model)

    def changed(self):
        return difference(self.before, state(self.model))


def said_by(llama):
    with torch.no_grad():
        return llama(PROMPT).logits


def state(llama):
    """What a refusal must not change: classes, hooks, attributes, modes and every bit."""
    found = {}
    for name, module in llama.named_modules():
        hooks = [len(value) for key, value in vars(module).items() if key.endswith("_hooks") and hasattr(value, "__len__")]
        found[f"module {name}"] = (type(module), module.training, sorted(vars(module)), hooks)
    for name, tensor in [*llama.named_parameters(), *llama.named_buffers()]:
        bits = tensor.detach().clone()
        found[f"tensor {name}"] = (id(tensor), tensor.requires_grad, tensor.grad is None, bits)
    found["config"] = llama.config.to_dict()
    return found


def difference(before, after):
    if before.keys() != after.keys():
        return f"other parts: {sorted(before.keys() ^ after.keys())[:3]}"
    for name, one in before.items():
        other = after[name]
        same = one[:3] == other[:3] and torch.equal(one[3], other[3]) if name.startswith("tensor") else one == other
        if not same:
            return f"{name} differs: {str(one)[:200]} and {str(other)[:200]}"
    return None


def edits_of(kind, world):
    steer = fe.Steer(VECTOR, site="mlp")
    gate = fe.Gate(VECTOR, threshold=0.1, kind="cosine")
    return {
        "red": fe.RED(), "steer": steer, "gated": fe.Steer(VECTOR).when(gate), "low-rank": fe.LoReFT(2, layers=[1]),
        "several": [fe.RED(), steer, fe.Ablate(VECTOR)], "probe": fe.Probe(VECTOR), "kept norm": fe.Steer(VECTOR, keep_norm=True),
        "empty": [], "doubled": [steer, steer], "model": world.model, "class": fe.Steer,
    }[kind]  # fmt: skip


def agrees(world, handle):
    """The patched model's logits against plain hooks, and that it comes back when the handle goes."""
    try:
        found, slow = said_by(world.model)[0], Reference(handle)
    finally:
        handle.remove()
    exact = slow.logits(world.model, {"input_ids": PROMPT}, PROMPT.shape[1])
    return bool(torch.allclose(found, exact, rtol=1e-3, atol=1e-4 * float(exact.nan_to_num().abs().max()), equal_nan=True))


def patch(world, edits, **given):
    made = edits_of(edits, world) if isinstance(edits, str) and edits in EDITS else edits
    handle = fe.patch(world.model, made, **given)
    if given.get("tenants") is not None:
        handle.remove()
        return True
    return agrees(world, handle)


def edit(kind):
    """An edit of one's own making, then patched: `kind` with arguments by name."""

    def run(world, **given):
        return agrees(world, fe.patch(world.model, getattr(fe, kind)(**given)))

    return run


def gate(world, **given):
    return agrees(world, fe.patch(world.model, fe.Steer(VECTOR).when(fe.Gate(**given))))


def load(world, folder, **given):
    path = world.folder / folder if isinstance(folder, (str, Path)) and not str(folder).startswith("/") else folder
    return agrees(world, fe.load(world.model, path, **given))


def red_checkpoint(world, path, **given):
    return agrees(world, fe.load_red_checkpoint(world.model, path, **given))


def handle(world, strength, prompt, mask, tensors, merge):
    with fe.patch(world.model, [fe.Steer(VECTOR, site="mlp"), fe.Steer(VECTOR, site="mlp", positions="mask")]) as held:
        held.mask(torch.ones(1, 4))
        before = said_by(world.model)
        held.mask(None)
        try:
            held.strength = strength
            held.prompt(prompt)
            held.prompt(None)
            held.mask(mask)
            held.mask(None)
            if tensors is not None:
                held.load_tensors(tensors)
        except Exception:
            held.mask(torch.ones(1, 4))
            if held.strength == 1.0 and not torch.equal(said_by(world.model), before):
                return False
            raise
    with fe.patch(world.model, fe.Steer(VECTOR, site="mlp")) as held:
        edited = said_by(world.model)
        held.merge(fp32=merge)
        same = torch.allclose(said_by(world.model), edited, rtol=1e-3, atol=1e-3)
    return same


def bank(world, capacity, sites, layers, rank, positions, gates, name, edits, names, strengths):
    held = fe.Bank(world.model, capacity, sites=sites, layers=layers, rank=rank, positions=positions, gates=gates)
    try:
        held.add(name, edits_of(edits, world) if isinstance(edits, str) and edits in EDITS else edits)
        with held.assign(names, strengths):
            found = said_by(world.model)
        return bool(torch.isfinite(found).all()) and torch.allclose(said_by(world.model), world.logits, atol=1e-5)
    finally:
        held.close()


def capture(world, data, layers, site, at, batch_size, max_length, sinks):
    found = fe.capture(
        world.model, None, data, layers=layers, site=site, at=at, batch_size=batch_size, max_length=max_length, sinks=sinks
    )
    return all(int(found[layer].count.sum()) > 0 and found[layer].mean().isfinite().all() for layer in found)


def contrast(world, positive, negative, method, layers, site, at, centre, held_out, batch_size):
    made = fe.contrast(
        world.model, None, positive, negative, method=method, layers=layers, site=site, at=at, centre=centre, held_out=held_out,
        batch_size=batch_size, probe="mass-mean",
    )  # fmt: skip
    width = world.model.config.intermediate_size if site == "ffn_in" else WIDTH
    return all(made[layer].isfinite().all() and made[layer].shape[-1] == width for layer in made)


def calibrate(world, edits, prompts, target_kl, tolerance, largest, new_tokens, batch_size):
    made = edits_of(edits, world) if isinstance(edits, str) and edits in EDITS else edits
    dose = fe.calibrate(
        world.model, made, prompts, target_kl=target_kl, tolerance=tolerance, largest=largest, new_tokens=new_tokens,
        batch_size=batch_size,
    )  # fmt: skip
    return abs(dose.kl - target_kl) <= 1.01 * tolerance * target_kl


def sweep(world, doses, layers, unit, site, control, seed):
    directions = fe.Directions({0: VECTOR, 1: -VECTOR}, {layer: {"norm": 1.0, "residual": 2.0} for layer in (0, 1)}, {})
    made = fe.sweep(
        world.model, directions, lambda llama: said_by(llama)[0, -1, :3], doses=doses, layers=layers, unit=unit, site=site,
        control=control, seed=seed,
    )  # fmt: skip
    return len(made.cells) >= 1


def verify(world, edits, inputs, modes, new_tokens, seed):
    made = edits_of(edits, world) if isinstance(edits, str) and edits in EDITS else edits
    return not any(row.verdict == "wrong" for row in fe.verify(
        world.model, made, inputs, modes=modes, new_tokens=new_tokens, seed=seed).rows)  # fmt: skip


def adopt(world, positions, fused):
    fe.adopt(world.model, positions=positions, fused=fused).remove()
    return True


WHERE = {"site": SITES, "layers": LAYERS, "positions": POSITIONS, "strength": NUMBERS, "keep_norm": FLAGS}
_WHERE = {"site": "mlp", "layers": None, "positions": None, "strength": 1.0, "keep_norm": False}
AT = ("last token", "first token", "all tokens", "mean", "last 4", "last 0", "response", "suffix", "last", "span")
TARGETS = {
    "patch": Target(
        patch, {"edits": "red", "freeze": False, "fused": True, "tenants": None}, {"edits": EDITS, "tenants": COUNTS},
    ),
    "Steer": Target(edit("Steer"), {"vectors": VECTOR, **_WHERE}, {"vectors": TENSORS, **WHERE}),
    "Ablate": Target(edit("Ablate"), {"directions": VECTOR, **_WHERE}, {"directions": TENSORS, **WHERE}),
    "ScaleBias": Target(
        edit("ScaleBias"), {"scale": VECTOR, "bias": None, **_WHERE, "trainable": True},
        {"scale": TENSORS, "bias": (*TENSORS, False), **WHERE},
    ),
    "LowRank": Target(
        edit("LowRank"), {"read": VECTOR[None], "offset": None, "write": VECTOR[None], **_WHERE},
        {"read": TENSORS, "offset": (torch.ones(1), torch.ones(2)), "write": TENSORS, **WHERE},
    ),
    "LoReFT": Target(edit("LoReFT"), {"rank": 2, **_WHERE}, {"rank": (1, 16, 17, 64, 65, 0, 2.0), **WHERE}),
    "Clamp": Target(
        edit("Clamp"), {"direction": VECTOR, "value": 1.0, **_WHERE}, {"direction": TENSORS, "value": NUMBERS, **WHERE},
    ),
    "Gate": Target(
        gate, {"condition": VECTOR, "threshold": 0.1, "kind": "dot", "decide": "token", "sharpness": None, "layer": None},
        {"condition": TENSORS, "threshold": (*NUMBERS, [0.1, 0.2], {0: 0.1, 1: 0.1}), "kind": ("cosine", "cast", "cos"),
         "decide": ("prompt", "prompt mean", "row"), "sharpness": NUMBERS, "layer": (0, 1, "0", 9)},
    ),
    "load": Target(load, {"folder": "edit", "freeze": False, "head": True}, {"folder": FOLDERS}),
    "load_red_checkpoint": Target(red_checkpoint, {"path": "nothing", "freeze": False}, {"path": FOLDERS}),
    "handle": Target(
        handle, {"strength": 1.0, "prompt": 2, "mask": torch.ones(1, 4, dtype=torch.bool), "tensors": None, "merge": False},
        {"strength": NUMBERS, "prompt": ([2], [2, 3], 0, -1, torch.tensor([2]), [1.5], [[2]]), "merge": FLAGS,
         "mask": (torch.ones(1, 4), torch.ones(4), torch.full((1, 4), float("nan")), [[True] * 4], torch.ones(1, 0)),
         "tensors": ({}, {"x": VECTOR})},
    ),
    "Bank": Target(
        bank, {"capacity": 2, "sites": ("mlp",), "layers": None, "rank": 0, "positions": False, "gates": False, "name": "a",
               "edits": "steer", "names": ["a"], "strengths": None},
        {"capacity": COUNTS, "sites": (("mlp", "block"), "mlp", (), ("nope",), SITES), "layers": LAYERS, "rank": (1, 2, 65, -1),
         "name": ("", "a/b", "x" * 300, "\n"), "edits": EDITS, "strengths": (0.5, [0.5], [0.5, 1], [1e39], torch.ones(1)),
         "names": ([None], ["b"], ["a", "a"], [["a"] * 4], "a", [3], [fe.Stack("a", "a")])},
    ),
    "capture": Target(
        capture, {"data": IDS, "layers": None, "site": "block", "at": "last token", "batch_size": 16, "max_length": None,
                  "sinks": None},
        {"data": DATA, "layers": LAYERS, "site": SITES, "at": AT, "batch_size": COUNTS, "max_length": COUNTS, "sinks": NUMBERS},
    ),
    "contrast": Target(
        contrast, {"positive": IDS, "negative": [[9, 1, 4], [8, 6]], "method": "mean", "layers": None, "site": "block",
                   "at": "last token", "centre": False, "held_out": 0.5, "batch_size": 16},
        {"positive": DATA, "negative": DATA, "method": ("pca", "probe", "lda"), "layers": LAYERS, "site": SITES, "at": AT,
         "centre": FLAGS, "held_out": NUMBERS, "batch_size": COUNTS},
    ),
    "calibrate": Target(
        calibrate, {"edits": "steer", "prompts": IDS, "target_kl": 1e-4, "tolerance": 0.1, "largest": 64.0, "new_tokens": None,
                    "batch_size": 16},
        {"edits": EDITS, "prompts": DATA, "target_kl": NUMBERS, "tolerance": NUMBERS, "largest": NUMBERS, "new_tokens": COUNTS,
         "batch_size": COUNTS},
    ),
    "sweep": Target(
        sweep, {"doses": [1.0], "layers": None, "unit": "strength", "site": "block", "control": False, "seed": 0},
        {"doses": ([], [0.5, 1], [1e39], [float("nan")], 1.0, ["a"]), "layers": ([0], [range(2)], [], [9], ["a"]),
         "unit": ("residual", "kl", "nats"), "site": SITES, "control": FLAGS, "seed": COUNTS},
    ),
    "verify": Target(
        verify, {"edits": "steer", "inputs": [IDS[0]], "modes": ["forward"], "new_tokens": 2, "seed": 0},
        {"edits": EDITS, "inputs": DATA, "modes": (["generate"], [], "forward", ["nope"]), "new_tokens": COUNTS, "seed": COUNTS},
    ),
    "adopt": Target(adopt, {"positions": None, "fused": True}, {"positions": POSITIONS, "fused": FLAGS}),
}  # fmt: skip


@st.composite
def calls(draw, name):
    """{argument: value} of a target, up to three of them replaced; and what was."""
    target = TARGETS[name]
    given, faults = dict(target.base), []
    for _ in range(draw(st.sampled_from((0, 1, 1, 1, 2, 2, 3)))):
        argument = draw(st.sampled_from(sorted(given)))
        other = target.also.get(argument, ())
        if other and draw(st.booleans()):
            given[argument] = draw(st.sampled_from(other))
        else:
            given[argument] = draw(st.sampled_from(JUNK))
        faults.append(argument)
    return given, tuple(faults)


def run(world, name, given):
    """As ops.run: (a finding or None, whether it was served)."""
    why, served = None, False
    with warnings.catch_warnings(), contextlib.chdir(world.folder):
        warnings.simplefilter("ignore")
        try:
            served = True
            if not TARGETS[name].run(world, **given):
                why = "served, and wrong"
        except REFUSALS as error:
            served = False
            if not says_enough(str(error)):
                why = f"a refusal that says too little: {error!r:.200}"
        except (fe.BankFullError, ImportError, RuntimeError) as error:  # no slot, no package; a forward that lacks its mask
            served = False
            known = type(error) is not RuntimeError or "no mask was given" in str(error) or "a handle" in str(error)
            why = None if known and says_enough(str(error)) else f"{error!r:.200}"
        except Exception as error:
            served = False
            why = f"{type(error).__name__}: {error!s:.200}"
    changed = world.changed()
    return f"the model changed: {changed}" if changed else why, served


@contextlib.contextmanager
def world():
    with tempfile.TemporaryDirectory() as folder:
        yield World(folder)


def about(given):
    return ", ".join(f"{name}={said(value)}" for name, value in given.items())
