"""What is measured: each op, forward and backward, and beside it what a user has without us.

A case is one row of arguments with its variants: our backends; `eager`, the promoting expression in plain
PyTorch; `compile`, torch.compile of the same expression; `nn_norm`, torch.nn.RMSNorm or LayerNorm after an eager
edit; `add`, the plain residual add (the traffic that edit_add has to match); `copy`, a plain copy of the bytes
that the op must move.
"""

import dataclasses
import functools
import itertools
import os

import torch
import torch._functorch.config

from fastedit import dispatch, ops

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPS = ("edit", "edit_add", "edit_add_norm", "project")
EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class Case:
    op: str
    mode: str  # forward or backward
    dtype: str
    rows: int
    width: int
    rank: int = 0
    slots: int = 1

    def id(self):
        return "-".join(str(v) for v in dataclasses.astuple(self))

    def bytes(self):
        """Fewest bytes of rows that the op must move: each stream once (parameters are the copy's small change)."""
        row = self.rows * self.width * (4 if self.dtype == "fp32" else 2)
        streams = {"edit": 2, "edit_add": 3, "edit_add_norm": 4, "project": 1}[self.op]
        if self.mode == "backward":  # grads and saved rows in, gradients out; edit_add's d_residual is grad itself
            streams = {"edit": 3, "edit_add": 3, "edit_add_norm": 6, "project": 2}[self.op]
        return streams * row


def cut(full, device):
    """The cases: a cut of about three minutes, or every combination."""
    if full:
        rows, widths, ranks, slots = (1, 64, 512, 4096, 32768), (512, 1024, 4096, 8192, 16384), (0, 1, 4, 16, 64), (1, 256)
    elif device == "cuda":
        rows, widths, ranks, slots = (1, 16384), (2048, 8192), (0, 4), (1, 256)
    else:
        rows, widths, ranks, slots = (1, 512), (512, 4096), (0, 4), (1,)
    for op, mode, dtype in itertools.product(OPS, ("forward", "backward"), DTYPES):
        for r, w, k, s in itertools.product(rows, widths, ranks, slots):
            if (op == "project" and (k == 0 or s > 1)) or (mode == "backward" and (r == 1 or s > 1)):
                continue
            if (dtype == "fp16" and (not full or k)) or r * w > 2**28:
                continue
            yield Case(op, mode, dtype, r, w, k, s)


def eager_edit(h, form):
    out = form["scale"] * h + form["bias"]
    if form["read"] is not None:
        out = out + (h.float() @ form["read"].T + form["offset"]) @ form["write"]
    return out.to(h.dtype)


def eager_norm(r, weight):
    f = r.float()
    return weight * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + EPS)).to(r.dtype)


EAGER = {
    "edit": lambda t, f: eager_edit(t["x"], f),
    "edit_add": lambda t, f: t["residual"] + eager_edit(t["x"], f),
    "edit_add_norm": lambda t, f: (lambda r: (r, eager_norm(r, t["weight"])))(t["residual"] + eager_edit(t["x"], f)),
    "project": lambda t, f: t["x"].float() @ f["read"].T + f["offset"],
}
OURS = {
    "edit": lambda t, f: ops.edit(t["x"], **f, slot=t["slot"]),
    "edit_add": lambda t, f: ops.edit_add(t["x"], t["residual"], **f, slot=t["slot"]),
    "edit_add_norm": lambda t, f: ops.edit_add_norm(t["x"], t["residual"], t["weight"], **f, eps=EPS, slot=t["slot"]),
    "project": lambda t, f: ops.project(t["x"], f["read"], f["offset"]),
}


def tensors(case, device):
    """(streams, form) of a case; slots come in runs of 32 neighbouring rows."""
    generator = torch.Generator(device).manual_seed(0)
    dtype, shape = DTYPES[case.dtype], (case.rows, case.width)

    def random(*size):
        return torch.randn(*size, device=device, generator=generator)

    train = case.mode == "backward"
    streams = {n: random(*shape).to(dtype).requires_grad_(train) for n in ("x", "residual")}
    streams |= {"weight": torch.ones(case.width, dtype=dtype, device=device), "slot": None}
    lead = (case.slots,) if case.slots > 1 else ()
    if lead:
        streams["slot"] = (torch.arange(case.rows, device=device) // 32 % case.slots).int()
    form = {"scale": 1 + 0.1 * random(*lead, case.width), "bias": random(*lead, case.width)}
    form |= dict.fromkeys(("read", "offset", "write"))
    if case.rank:
        form["read"] = random(*lead, case.rank, case.width) / case.width**0.5
        form["offset"], form["write"] = random(*lead, case.rank), random(*lead, case.rank, case.width)
    if train:
        form = {n: None if p is None else p.requires_grad_() for n, p in form.items()}
    return streams, form


def backends(device):
    """Ours that can run on the device without being forced, and the reference."""
    names = ("cpu", "reference") if device == "cpu" else ("cuda", "triton", "reference")
    return [n for n in names if dispatch.why_not(n) is None]


def forced(name, function):
    """`function` with one backend forced for its duration."""

    @functools.wraps(function)
    def call():
        before = os.environ.get("FASTEDIT_BACKEND")
        os.environ["FASTEDIT_BACKEND"] = name
        dispatch.select.cache_clear()
        try:
            return function()
        finally:
            dispatch.select.cache_clear()
            if before is None:
                del os.environ["FASTEDIT_BACKEND"]
            else:
                os.environ["FASTEDIT_BACKEND"] = before

    return call


@functools.cache
def compiled(op):
    """torch.compile of the eager expression; dynamic, so that a run compiles once a dtype and not once a shape."""
    torch._dynamo.config.recompile_limit = 64
    torch._functorch.config.donated_buffer = False  # a backward is timed again and again on one graph
    return torch.compile(EAGER[op], dynamic=True)


def variants(case, device, peers=True):
    """{name: function of no arguments}; the first is what fastedit itself would choose."""
    streams, form = tensors(case, device)
    calls = {"fastedit": functools.partial(OURS[case.op], streams, form)}
    if peers and case.slots == 1:
        calls["eager"] = functools.partial(EAGER[case.op], streams, form)
        calls["compile"] = functools.partial(compiled(case.op), streams, form)
        if case.op == "edit_add_norm":
            norm = torch.nn.RMSNorm(case.width, eps=EPS, device=device, dtype=DTYPES[case.dtype]).requires_grad_(False)

            def nn_norm():
                residual = streams["residual"] + eager_edit(streams["x"], form)
                return residual, norm(residual)

            calls["nn_norm"] = nn_norm
        if case.op == "edit_add" and case.mode == "forward":
            calls["add"] = lambda: streams["residual"] + streams["x"]
    if case.mode == "backward":
        wanted = [streams["x"], *([] if case.op in ("edit", "project") else [streams["residual"]])]
        wanted += [p for n, p in form.items() if p is not None and (case.op != "project" or n in ("read", "offset"))]
        calls = {name: _backward(call, wanted) for name, call in calls.items()}
    buffer = torch.empty(case.bytes() // 2, dtype=torch.uint8, device=device)
    source = torch.zeros_like(buffer)
    calls["copy"] = lambda: buffer.copy_(source)
    return calls


def _backward(call, wanted):
    """The backward alone: the graph is built once and walked again and again."""
    outputs = call()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.ones_like(o) for o in outputs]
    return lambda: torch.autograd.grad(outputs, wanted, grads, retain_graph=True)
