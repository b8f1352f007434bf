"""Every kind of edit × every site × edge cases × dtypes × backends: a forward, a backward and an optimizer's step of a tiny
Llama, against the published formulas as plain hooks in float64.

Of each: the output, the gradients of what trains and of what the model was given, and all of that after the step. Allowed is
twice the error of the same hooks in the model's own dtype, and one unit in the last place. NaN is where those have it, and
nowhere else. The same grid runs on the Triton kernels under their interpreter (../triton_interpreted_matrix.py), on the CUDA
sources under the emulator (../kernels/test_cuda_emulated_matrix.py), and on a GPU.
"""

import contextlib
import copy
import itertools
import types

import pytest
import tiny_models as tiny
import torch
from patch_cases import scrambled

import fastedit as fe
from fastedit import dispatch

pytestmark = pytest.mark.usefixtures("one_thread")
BATCH, LENGTH, RANK, STEP = 4, 5, 2, 0.001
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
CASES = ("ordinary", "one row", "no rows", "slot without rows", "strided", "zeros", "NaN", "strength 0")
WHO, SLOTS = [0, 2, None, 2], (1.0, 7.0, -0.5)  # of "slot without rows": the slot of each sequence; strengths of frozen edits
PLACES = {  # site: (module, whether its output, width)
    "embed": ("model.layers.0", False, 32), "q": ("model.layers.{}.self_attn.q_proj", True, 32),
    "k": ("model.layers.{}.self_attn.k_proj", True, 16), "v": ("model.layers.{}.self_attn.v_proj", True, 16),
    "attn": ("model.layers.{}.self_attn.o_proj", True, 32), "ffn_in": ("model.layers.{}.mlp.down_proj", False, 48),
    "mlp": ("model.layers.{}.mlp.down_proj", True, 32), "block": ("model.layers.{}", True, 32),
    "final": ("model.norm", True, 32),
}  # fmt: skip
ONCE = {"embed": [0], "final": [1]}  # sites of the model: the layers under whose numbers their tensors are kept


def fixed(*shape, seed=5):
    """Random numbers that bf16 holds."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


# --- the published formulas, of rows (…, width) and tensors by name, an edit's own numbers in fp32 ------------------


def red(h, p):
    return p["scale"] * h + p["bias"]


def reft(h, p):
    return h + (h @ p["source"].mT + p["offset"] - h @ p["write"].mT) @ p["write"]


def direft(h, p):
    return h + (h @ p["read"].mT + p["offset"]) @ p["write"]


def steer(h, p):
    return h + fixed(h.shape[-1]).to(h)


def ablate(h, p):
    rows = torch.linalg.qr(fixed(h.shape[-1], RANK).to(h)).Q.mT.float().to(h)
    return h - h @ rows.mT @ rows


def clamp(h, p):
    unit = torch.nn.functional.normalize(fixed(h.shape[-1]).to(h), dim=-1).float().to(h)
    return h + (0.3 - h @ unit)[..., None] * unit


def hard(h, threshold):
    return (torch.cosine_similarity(h, fixed(h.shape[-1], seed=7).to(h), dim=-1, eps=1e-30) > threshold).to(h)


def soft(h, threshold):
    return torch.sigmoid(2 * (h @ fixed(h.shape[-1], seed=7).to(h) / h.shape[-1] - threshold))


KINDS = {  # (the edit of a width, its formula, its gate's)
    "RED": (lambda width, **at: fe.RED(**at), red, None),
    "LoReFT": (lambda width, **at: fe.LoReFT(RANK, **at), reft, None),
    "NoReFT": (lambda width, **at: fe.NoReFT(RANK, **at), reft, None),
    "DiReFT": (lambda width, **at: fe.DiReFT(RANK, **at), direft, None),
    "steer": (lambda width, **at: fe.Steer(fixed(width), **at), steer, None),
    "ablate": (lambda width, **at: fe.Ablate(fixed(width, RANK).T, **at), ablate, None),
    "clamp": (lambda width, **at: fe.Clamp(fixed(width), 0.3, **at), clamp, None),
    "gated RED": (lambda width, **at: fe.ScaleBias(1 + fixed(width) / 4, fixed(width, seed=8), **at), red, soft),
    "gated steer": (lambda width, **at: fe.Steer(fixed(width), **at), steer, hard),
}


def gate(name, width, threshold):
    condition = fixed(width, seed=7)
    if KINDS[name][2] is hard:
        return fe.Gate(condition, threshold, kind="cosine")
    return fe.Gate(condition / width, threshold, sharpness=2.0)


# --- the model ------------------------------------------------------------------------------------------------------


def model_of(dtype, empty=False):
    model = tiny.build("llama", dtype, num_hidden_layers=2, rms_norm_eps=1e-2)  # smaller, a row of zeros magnifies all errors
    if empty:  # transformers' attention cannot count the heads of no tokens
        for layer in model.model.layers:
            layer.self_attn.forward = types.MethodType(attend_to_nothing, layer.self_attn)
    return model


def attend_to_nothing(self, hidden_states, **_):
    projected = self.q_proj(hidden_states) + torch.cat([self.k_proj(hidden_states), self.v_proj(hidden_states)], -1)
    return self.o_proj(projected), None


def given(case, dtype, seed):
    shape = {"one row": (1, 1), "no rows": (0, LENGTH)}.get(case, (BATCH, LENGTH))
    rows = fixed(*shape, tiny.WIDTH, seed=seed).to(dtype)
    if case == "strided":
        rows = fixed(shape[1], tiny.WIDTH, shape[0], seed=seed).to(dtype).permute(2, 0, 1)
    elif case == "zeros":
        rows[1] = 0
    elif case == "NaN":
        rows[1, 2, 3] = float("nan")
    return rows


def run(model, rows, masters):
    """{what: tensor} of a forward, and one with a backward; the gradient at the logits is one that every dtype holds."""
    rows = rows.detach().to(next(model.parameters()).dtype).requires_grad_()
    model.zero_grad()
    for t in masters.values():
        t.grad = None
    with torch.no_grad():
        alone = model(inputs_embeds=rows, use_cache=False).logits
    out = model(inputs_embeds=rows, use_cache=False).logits
    out.backward(fixed(*out.shape, seed=9).to(out.dtype))
    found = {"output": out.detach(), "output without gradients": alone, "the rows' gradient": rows.grad}
    return found | {n: t.grad.clone() for n, t in masters.items()}


class Hooked:
    """The model with the formulas as hooks; arithmetic in its dtype or fp32, the wider, rounded once."""

    def __init__(self, model, kind, site, tensors, strength, threshold, slots, exact):
        self.model, self.kind, self.strength, self.threshold, self.slots = copy.deepcopy(model), kind, strength, threshold, slots
        self.masters = {n: t.detach().clone().to(torch.float64 if exact else t.dtype) for n, t in tensors.items()}
        for t in self.masters.values():
            t.requires_grad_()
        path, after, _ = PLACES[site]
        for layer in ONCE.get(site, layers_of(kind)):
            own = {name.rpartition(".")[2]: t for name, t in self.masters.items() if f"layers.{layer}." in name}
            module = self.model.get_submodule(path.format(layer))
            if after:
                module.register_forward_hook(lambda module, args, out, own=own: self.edited(out, own))
            else:
                module.register_forward_pre_hook(lambda module, args, own=own: (self.edited(args[0], own), *args[1:]))

    def edited(self, rows, own):
        h = rows.to(torch.promote_types(rows.dtype, torch.float32))
        _, formula, gate = KINDS[self.kind]
        k = torch.full(h.shape[:-1], self.strength, dtype=h.dtype)
        own = {n: t.to(h.dtype) for n, t in own.items()}
        if self.slots is not None:
            whose = torch.tensor([0 if slot is None else slot for slot in WHO])
            k = self.slots.to(h)[whose][:, None] * torch.tensor([slot is not None for slot in WHO]).to(h)[:, None] * k
            own = {n: t[whose] if t.dim() > 2 else t[whose][:, None] for n, t in own.items()}
        k = k if gate is None else k * gate(h, self.threshold)
        changed = formula(h, own)
        if not bool((k == 1).all()):
            changed = h + k[..., None] * (changed - h)
        return changed.to(rows.dtype)

    def run(self, rows):
        found = run(self.model, rows, self.masters)
        for name, t in self.masters.items():
            if self.is_basis(name):  # which moves along the manifold of orthonormal rows
                mixed = t.grad @ t.detach().mT
                found[name] = t.grad = t.grad - (mixed + mixed.mT) / 2 @ t.detach()
        return found

    def is_basis(self, name):
        return self.kind == "LoReFT" and name.endswith("write")

    @torch.no_grad()
    def step(self):
        for name, t in self.masters.items():
            t -= STEP * t.grad
            if self.is_basis(name):
                q, r = torch.linalg.qr(t.mT)
                t.copy_((q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]).mT)


def layers_of(kind):
    return [0] if KINDS[kind][2] is hard else [0, 1]  # later rows are too near a threshold in bf16


def threshold_of(model, kind, site, rows):
    """For a hard gate the middle of the widest gap between the scores of the middle rows: no rounding moves a row across."""
    if KINDS[kind][2] is not hard or not len(rows):
        return 0.1
    seen, (path, after, _) = [], PLACES[site]
    module = model.get_submodule(path.format(0))
    put = module.register_forward_hook if after else module.register_forward_pre_hook
    hook = put(lambda module, args, *out: seen.append(out[0] if after else args[0]))
    with torch.no_grad():
        model(inputs_embeds=rows.detach().double(), use_cache=False)
    hook.remove()
    h = seen[0]
    scores = torch.cosine_similarity(h, fixed(h.shape[-1], seed=7).to(h), dim=-1, eps=1e-30).flatten()
    scores = scores[scores.isfinite()].sort().values
    middle = scores[len(scores) // 4 : len(scores) - len(scores) // 4]
    gap = middle.diff().argmax()
    return float(middle[gap : gap + 2].mean())


def place(name):
    """Of "0.layers.1.mlp.offset, step 0" all but the tensor; of what is no master the name itself."""
    what, _, step = name.partition(", ")
    return what.rpartition(".")[0] or what, step


def promise(dtype, found):
    """found: [(name, ours, exact, the hooks')]. NaN where the hooks have it, zeros where all is zero, and each error, in units
    of the largest value (of a place's gradients together: a sum of two numbers may cancel), at most twice the hooks' largest in
    all, and an eps. Of two numbers alone theirs would be luck.
    """
    errors, theirs, units = {}, 0.0, {}
    for name, _, exact, eager in found:
        found_here = exact[~eager.isnan()].abs()
        units[place(name)] = max(units.get(place(name), 0.0), float(found_here.max()) if found_here.numel() else 0.0)
    for name, got, exact, eager in found:
        nan = eager.isnan()
        assert torch.equal(got.isnan(), nan), f"{name}: NaN at {int(got.isnan().sum())} places, not {int(nan.sum())}"
        got, exact, eager = (t[~nan].double() for t in (got, exact, eager))
        assert exact.any() or not got.any(), f"{name} is not zero"
        if exact.numel() and (largest := units[place(name)]):
            errors[name] = float((got - exact).abs().max()) / largest
            theirs = max(theirs, float((eager - exact).abs().max()) / largest)
    wrong = {name: error for name, error in errors.items() if error > 2 * theirs + torch.finfo(dtype).eps}
    assert not wrong, f"{wrong}, the hooks' {theirs:.3g}"


class Ours:
    """The model with the edit put on by fastedit: a handle, one of tenants, or for frozen edits in slots a bank."""

    def __init__(self, model, kind, site, case, threshold, fused):
        make, _, gated = KINDS[kind]
        self.model, slotted, (*_, width) = copy.deepcopy(model), case == "slot without rows", PLACES[site]
        where = {"site": site, "layers": None if site in ONCE else layers_of(kind)}

        def edit(strength=1.0):
            made = make(width, strength=strength, **where)
            return made if gated is None else made.when(gate(kind, width, threshold))

        self.trains, self.slots, self.assigned, self.handle = edit().trainable, None, contextlib.nullcontext, None
        if slotted and not (self.trains and gated is None):
            self.trains, self.slots = False, torch.tensor(SLOTS)
            bank = fe.Bank(self.model, capacity=len(SLOTS), sites=(site,), rank=RANK, gates=gated is not None, fused=fused)
            for slot, strength in enumerate(SLOTS):
                bank.add(str(slot), edit(strength))
            self.assigned = lambda: bank.assign([None if slot is None else str(slot) for slot in WHO])
            values = {} if kind != "gated RED" else {"scale": 1 + fixed(width) / 4, "bias": fixed(width, seed=8)}
            self.tensors = {
                f"layers.{layer}.{name}": t.expand(len(SLOTS), width)
                for layer in ONCE.get(site, layers_of(kind)) for name, t in values.items()
            }  # fmt: skip
            return
        self.handle = fe.patch(self.model, edit(), freeze=True, fused=fused, **({"tenants": len(SLOTS)} if slotted else {}))
        if slotted:
            self.slots, self.assigned = torch.ones(len(SLOTS)), lambda: self.handle.assign(WHO)
        if self.trains and gated is None:
            scrambled(self.handle)
        self.handle.strength = 0.0 if case == "strength 0" else 1.0
        self.tensors = {n: t for n, t in self.handle.named_tensors().items() if self.trains and "gate" not in n}

    def run(self, rows):
        named = dict(self.model.named_parameters()) if self.trains else {}
        masters = {name: named[f"fastedit.{self.handle.name}.{name}"] for name in self.tensors if self.trains}
        with self.assigned():
            return run(self.model, rows, masters)

    def step(self):
        torch.optim.SGD(self.handle.parameters(), lr=STEP).step()


def grid():
    """The backends that can run here, and what each serves: float64 is the reference's."""
    for backend in dispatch.BACKENDS:
        marks = [pytest.mark.gpu] if backend in ("cuda", "triton") else []
        for dtype in DTYPES if backend == "reference" else list(DTYPES)[:2]:
            yield pytest.param(backend, dtype, marks=marks)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("site", PLACES)
@pytest.mark.parametrize("backend, dtype", grid())
@pytest.mark.parametrize("kind, case", itertools.product(KINDS, CASES))
def test_a_step_is_the_formulas(kind, case, backend, dtype, site, fused, monkeypatch):
    monkeypatch.setenv("FASTEDIT_BACKEND", backend)
    dispatch.select.cache_clear()
    check(kind, case, DTYPES[dtype], site, fused)
    dispatch.select.cache_clear()


def check(kind, case, dtype, site, fused):
    # In float64 all error is of fp32 masters and of Llama's fp32 norms: a few roundings, and of three rounds a matter of luck.
    seeds = range(10, 18) if dtype == torch.float64 else (5, 10, 11)
    model, rounds = model_of(dtype, case == "no rows"), [given(case, dtype, seed) for seed in seeds]
    exact, found = tiny.exact(model), []
    threshold = threshold_of(exact, kind, site, torch.cat(rounds))
    ours = Ours(model, kind, site, case, threshold, fused)
    strength = 0.0 if case == "strength 0" else 1.0
    slow, hooks = (
        Hooked(m, kind, site, ours.tensors, strength, threshold, ours.slots, exact=m is exact) for m in (exact, model)
    )  # fmt: skip
    for number, rows in enumerate(rounds):
        results = [side.run(rows) for side in (ours, slow, hooks)]
        for what, *three in ((what, *(r[what] for r in results)) for what in results[0]):
            found.append((f"{what}, step {number}", *three))
        if case == "slot without rows" and ours.trains:
            assert not any(t.grad[1].any() for t in ours.handle.parameters()), "a slot without rows has a gradient"
        if ours.trains and case != "NaN":
            for side in (ours, slow, hooks):
                side.step()
    promise(torch.float32 if dtype == torch.float64 else dtype, found)  # masters, and Llama's norms, are fp32 in any model
