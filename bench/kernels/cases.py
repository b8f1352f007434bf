"""What is measured: each op, forward and backward, and beside it what a user has without us.

A case is one row of arguments with its variants: `fastedit`; `triton`, that backend on an NVIDIA GPU, where cuda is
the default; `no edit`, the same fused op without parameters (what the edit itself costs); `ungated`, the same without its
gate; `eager`, the promoting expression in plain PyTorch; `compile`, torch.compile of the same expression, for these very
shapes at the central shape and for any elsewhere; `nn_norm`, torch.nn.RMSNorm after an eager edit; `liger`, Liger's fused
add and RMSNorm after an eager edit (GPU, where it is installed); `add`, the plain residual add (the traffic that edit_add
has to match); `copy`, a plain copy of the bytes that the op must move between warm buffers; `clone`, the same into fresh
memory, where every op's results go.
"""

import dataclasses
import functools
import itertools

import torch
import torch._functorch.config

from fastedit import dispatch, ops
from fastedit.ops import running

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPS = ("edit", "edit_add", "edit_add_norm", "project")
GATED = "edit_add gated"  # by a hard gate that is open for every second row or so
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
        streams = {"edit": 2, "edit_add": 3, "edit_add_norm": 4, "project": 1, GATED: 3}[self.op]
        if self.mode == "backward":  # grads and saved rows in, gradients out; edit_add's d_residual is grad itself
            streams = {"edit": 3, "edit_add": 3, "edit_add_norm": 6, "project": 2}[self.op]
        return streams * row


ROWS, WIDTHS, RANKS, SLOTS = (1, 64, 512, 4096, 65536), (512, 1024, 2048, 4096, 8192, 16384), (0, 1, 4, 8, 16, 32), (1, 256)
CENTRE = {"cpu": (512, 4096), "cuda": (16384, 4096)}
MOST = {"cpu": 2**25, "cuda": 2**30}  # elements of a stream: beyond, a case says nothing new and takes gigabytes


def cut(full, device):
    """The cases, the telling ones first: sweeps of one argument at a time around the central shape, or everything."""
    seen = set()
    for case in itertools.chain(_sweeps(device), _everything() if full else ()):
        if case not in seen and _sensible(case, device):
            seen.add(case)
            yield case


def _all(rows, width, ranks=(0,), slots=1, dtypes=("fp32", "bf16"), modes=("forward", "backward"), ops=OPS):
    for rank, op, mode, dtype in itertools.product(ranks, ops, modes, dtypes):
        yield Case(op, mode, dtype, rows, width, 4 if op == "project" and rank == 0 else rank, slots)


def _sweeps(device):
    rows, width = CENTRE[device]
    norms = ("edit_add", "edit_add_norm")
    yield from _all(rows, width)
    yield from _all(1, width, modes=("forward",))
    yield from _all(rows, width, ranks=(4,))
    yield from _all(8 * rows, width, dtypes=("bf16",))
    yield from _all(rows, width, slots=256, ops=OPS[:3])
    for dtype in ("fp32", "bf16"):
        yield from (Case(GATED, "forward", dtype, count, width) for count in (rows, 1))
    yield from _all(512, 512)
    yield from _all(rows, width, ranks=(1, 8, 16, 32), ops=norms, modes=("forward",), dtypes=("bf16",))
    yield from _all(rows, width, ranks=(8, 32), ops=norms, modes=("backward",), dtypes=("bf16",))
    yield from _all(rows, width, dtypes=("fp16",))
    for other in WIDTHS:
        yield from _all(rows, other, dtypes=("bf16",), ops=norms)
    for other in ROWS:
        yield from _all(other, width, dtypes=("bf16",), ops=norms)


def _everything():
    for rows, width, slots in itertools.product(ROWS, WIDTHS, SLOTS):
        yield from _all(rows, width, RANKS, slots, ("fp32", "bf16", "fp16"))


def _sensible(case, device):
    too_large = case.rows * case.width > MOST[device] or case.slots * case.rank * case.width > 2**27
    return not too_large and not (case.op == "project" and case.slots > 1)


def eager_edit(h, form, slot=None):
    if slot is not None:  # parameters gathered a row, as a user without slots in the kernel must
        slot = slot.long()
        return (form["scale"][slot] * h + form["bias"][slot]).to(h.dtype)
    out = form["scale"] * h + form["bias"]
    if form["read"] is not None:
        out = out + (h.float() @ form["read"].T + form["offset"]) @ form["write"]
    return out.to(h.dtype)


def eager_norm(r, weight):
    f = r.float()
    return weight * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + EPS)).to(r.dtype)


def eager_gated_add(x, residual, form, gate):
    k = (x.float() @ gate > 0).to(x.dtype)[:, None]
    return (residual + x + k * (eager_edit(x, form) - x)).to(residual.dtype)


EAGER = {
    "edit": lambda t, f: eager_edit(t["x"], f, t["slot"]),
    "edit_add": lambda t, f: t["residual"] + eager_edit(t["x"], f, t["slot"]),
    "edit_add_norm": lambda t, f: (lambda r: (r, eager_norm(r, t["weight"])))(t["residual"] + eager_edit(t["x"], f, t["slot"])),
    "project": lambda t, f: t["x"].float() @ f["read"].T + f["offset"],
    GATED: lambda t, f: eager_gated_add(t["x"], t["residual"], f, t["gate"]),
}
OURS = {
    "edit": lambda t, f: ops.edit(t["x"], **f, slot=t["slot"]),
    "edit_add": lambda t, f: ops.edit_add(t["x"], t["residual"], **f, slot=t["slot"]),
    "edit_add_norm": lambda t, f: ops.edit_add_norm(t["x"], t["residual"], t["weight"], **f, eps=EPS, slot=t["slot"]),
    "project": lambda t, f: ops.project(t["x"], f["read"], f["offset"]),
    GATED: lambda t, f: ops.edit_add(t["x"], t["residual"], **f, gate=t["gate"], rule=t["rule"]),
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
    if case.op == GATED:
        streams |= {"gate": random(case.width), "rule": torch.zeros(3, device=device)}
    if train:
        form = {n: None if p is None else p.requires_grad_() for n, p in form.items()}
    return streams, form


@functools.cache
def compiled(op, dynamic):
    """torch.compile of the eager expression; dynamic compiles once a dtype and not once a shape."""
    torch._dynamo.config.recompile_limit = 64
    torch._functorch.config.donated_buffer = False  # a backward is timed again and again on one graph
    return torch.compile(EAGER[op], dynamic=dynamic)


def _liger(case, streams, form):
    """Liger's fused add and RMSNorm behind an eager edit, or None where it is not installed."""
    try:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    except ImportError:
        return None

    def liger():
        x = eager_edit(streams["x"], form)
        normed, residual = LigerFusedAddRMSNormFunction.apply(
            x, streams["residual"], streams["weight"], EPS, 0.0, "llama", False
        )
        return residual, normed

    return liger


def forced(name, function):
    """`function`, forward or backward, with one backend in every place that would choose one."""
    backend, kept = dispatch.load(name), running.select

    def call():
        dispatch.select.cache_clear()  # nothing goes straight to the native module
        running.select = lambda *_: backend
        try:
            return function()
        finally:
            running.select = kept

    return call


def variants(case, device, peers=True):
    """{name: function of no arguments}; the first is what fastedit itself would choose."""
    streams, form = tensors(case, device)
    forward = case.mode == "forward"
    calls = {"fastedit": functools.partial(OURS[case.op], streams, form)}
    if device == "cuda" and dispatch.why_not("triton") is None:
        calls["triton"] = forced("triton", calls["fastedit"])
    if case.op in ("edit_add", "edit_add_norm") and case.rank == 0 and forward:
        calls["no edit"] = functools.partial(OURS[case.op], streams | {"slot": None}, dict.fromkeys(form))
    if case.op == GATED:
        calls["ungated"] = functools.partial(OURS["edit_add"], streams, form)
    if peers and (case.slots == 1 or case.rank == 0):
        calls["eager"] = functools.partial(EAGER[case.op], streams, form)
        dynamic = (case.rows, case.width) != CENTRE[device]
        calls["compile"] = functools.partial(compiled(case.op, dynamic), streams, form)
    if peers and case.slots == 1 and case.op == "edit_add_norm":
        norm = torch.nn.RMSNorm(case.width, eps=EPS, device=device, dtype=DTYPES[case.dtype]).requires_grad_(False)

        def nn_norm():
            residual = streams["residual"] + eager_edit(streams["x"], form)
            return residual, norm(residual)

        calls["nn_norm"] = nn_norm
        liger = _liger(case, streams, form) if device == "cuda" else None
        if liger is not None:
            calls["liger"] = liger
    if peers and case.op in ("edit_add", GATED) and forward:
        calls["add"] = lambda: streams["residual"] + streams["x"]
    if case.mode == "backward":
        wanted = [streams["x"], *([] if case.op in ("edit", "project") else [streams["residual"]])]
        wanted += [p for n, p in form.items() if p is not None and (case.op != "project" or n in ("read", "offset"))]
        calls = {name: _backward(call, wanted) for name, call in calls.items()}
        if "triton" in calls:
            calls["triton"] = forced("triton", calls["triton"])
    buffer = torch.empty(case.bytes() // 2, dtype=torch.uint8, device=device)
    source = torch.zeros_like(buffer)
    calls["copy"] = lambda: buffer.copy_(source)
    calls["clone"] = source.clone
    return calls


def _backward(call, wanted):
    """The backward alone: the graph is built once and walked again and again."""
    outputs = call()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.ones_like(o) for o in outputs]
    return lambda: torch.autograd.grad(outputs, wanted, grads, retain_graph=True)
