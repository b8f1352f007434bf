"""Triton kernels compiled without a GPU: recorded launches, their code, and which argument each access belongs to.

Each global access is traced back to the kernel argument its address comes from, in PTX for NVIDIA and in LLVM IR for
AMD, because a search for vector loads finds those of the fp32 parameters also where the activations go one element at
a time.
"""

import re

import torch
import triton
from fastedit.kernels.triton import host
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {F32: "*fp32", BF16: "*bf16", F16: "*fp16", torch.int32: "*i32"}
STREAMS = {
    "x", "residual", "out", "stored", "normed", "grad", "grad_normed", "d_hidden", "d_residual"
}  # fmt: skip


# --- from a recorded launch to code ---------------------------------------------------------------


def record(monkeypatch, target):
    """A list that fills with the launches of the ops called from now on."""
    launches = []
    monkeypatch.setattr(host, "warp_size", lambda: target.warp_size)
    monkeypatch.setattr(
        host, "run", lambda kernel, shape, _, *args, **opts: launches.append((kernel, shape, args, opts))
    )
    return launches


def specialised(kernel, args, options):
    """(signature, constants, attributes) as Triton specialises them: on 1, None and multiples of 16."""
    signature, constants, attributes = {}, dict(options), {}
    for i, (parameter, value) in enumerate(zip(kernel.params, args, strict=False)):
        number = isinstance(value, int)
        if value is None or (number and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = "i32" if number else POINTERS[value.dtype]
        kept = not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
        if not number or (kept and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature | dict.fromkeys(options, "constexpr"), constants, attributes


def compile_launch(kernel, shape, args, options, target):
    """(compiled, names of the run-time arguments in order)."""
    signature, constants, attributes = specialised(kernel, args, options)
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(
        source, target=target, options={"num_warps": shape.num_warps, **host.COMPILE_OPTIONS}
    )
    return compiled, [name for name in kernel.arg_names if signature[name] != "constexpr"]


# --- which argument an access belongs to ----------------------------------------------------------


def trace(definitions, origins):
    """Register → arguments it may point into, to the fixed point over (result, operands) pairs."""
    changed = True
    while changed:
        changed = False
        for result, operands in definitions:
            found = set().union(*(origins.get(o, ()) for o in operands))
            if not found <= origins.get(result, set()):
                origins[result] = origins.get(result, set()) | found
                changed = True
    return origins


PTX_ACCESS = re.compile(
    r"(?P<op>ld|st)\.global(?P<mods>[.\w:]*)\s+(?:\{[^}]*\}|%\w+)?,?\s*\[\s*(?P<address>%\w+)"
    r"|cp\.async\.c[ag]\.shared\.global[.\w:]*\s+\[[^\]]*\],\s*\[\s*(?P<source>%\w+)[^\]]*\],\s*(?P<bytes>\w+)"
)


def ptx_accesses(ptx, names):
    """{argument: [bits of each global access]}."""
    definitions, origins, accesses = [], {}, []
    for line in re.sub(r"//.*", "", ptx).split(";"):
        line = re.sub(
            r"^@!?%\w+\s+",
            "",
            line.split("\n")[-1].strip() if "{" not in line else line.strip().split("\n")[-1].strip(),
        )
        parameter = re.match(r"ld\.param\.\w+\s+(%\w+),\s*\[\w+_param_(\d+)\]", line)
        access = PTX_ACCESS.search(line)
        if parameter:
            index = int(parameter[2])
            if index < len(names):
                origins[parameter[1]] = {names[index]}
        elif access:
            if access["bytes"]:
                accesses.append((access["source"], 8 * int(access["bytes"], 0)))
            else:
                width, count = (
                    int(re.search(r"\.[busf](\d+)", access["mods"])[1]),
                    re.search(r"\.v(\d)", access["mods"]),
                )
                accesses.append((access["address"], width * int(count[1] if count else 1)))
        else:
            registers = re.findall(r"%\w+", line)
            definitions += [(registers[0], registers[1:])] if len(registers) > 1 else []
    return group(accesses, trace(definitions, origins), names)


TYPE = r"<\d+ x \w+>|\w+"
LLVM_ACCESS = re.compile(
    rf"(?:load (?P<load>{TYPE})|store (?P<store>{TYPE}) [^,]+), ptr addrspace\(1\) (?P<address>%[\w.]+)"
    r"|raw\.ptr\.buffer\.(?:load|store)\.(?P<buffer>\w+)\([^)]*?ptr addrspace\(8\) (?P<resource>%[\w.]+)"
)
BITS = {
    "bfloat": 16,
    "half": 16,
    "float": 32,
    "double": 64,
    "bf16": 16,
    "f16": 16,
    "f32": 32,
    "f64": 64,
    "ptr": 64,
}


def llvm_bits(kind):
    """Bits of `<8 x bfloat>`, `i32`, or an intrinsic's `v4i32`."""
    count, element = (
        re.fullmatch(r"<(\d+) x (\w+)>|v?(?:(?<=v)(\d+))?(\w+)", kind).group(1, 2)
        if kind[0] == "<"
        else (re.fullmatch(r"(?:v(\d+))?(\w+)", kind).groups())
    )
    return int(count or 1) * (BITS.get(element) or int(element[1:]))


def llvm_accesses(llir, names):
    """{argument: [bits of each global access]}; argument i of the kernel is %i."""
    definitions, accesses = [], []
    for line in llir.splitlines():
        access = LLVM_ACCESS.search(line)
        if access:
            kind = access["load"] or access["store"] or access["buffer"]
            accesses.append((access["address"] or access["resource"], llvm_bits(kind)))
        elif " = " in line and ("call " not in line or "make.buffer.rsrc" in line):
            result, _, expression = line.strip().partition(" = ")
            definitions.append((result, re.findall(r"%[\w.]+", expression)))
    return group(accesses, trace(definitions, {f"%{i}": {name} for i, name in enumerate(names)}), names)


def group(accesses, origins, names):
    found = {name: [] for name in names}
    for register, bits in accesses:
        for name in origins.get(register, ()):
            found[name].append(bits)
    return found


def accesses_of(compiled, names):
    if "ptx" in compiled.asm:
        return ptx_accesses(compiled.asm["ptx"], names)
    return llvm_accesses(compiled.asm["llir"], names)


def narrow_streams(accesses):
    """Streams with an access narrower than 128 bits, or with none that could be found."""
    return {n: sorted(set(a)) for n, a in accesses.items() if n in STREAMS and (not a or min(a) < 128)}


# --- inputs, of no content ------------------------------------------------------------------------

ROWS, WIDTH = 1000, 4096  # rows that 16 does not divide: nothing may lean on that


def empty(*shape, dtype=F32):
    return torch.empty(shape, dtype=dtype)


def make_form(rank=0, slots=0, coefficient=False, width=WIDTH):
    lead = (slots,) if slots else ()
    low = (empty(*lead, rank, width), empty(*lead, rank), empty(*lead, rank, width)) if rank else (None,) * 3
    slot = torch.zeros(ROWS, dtype=torch.int32) if slots else None
    return empty(*lead, width), empty(*lead, width), *low, slot, (empty(ROWS) if coefficient else None)


def needs(form):
    scale, bias, read, offset, write, _, k = form
    return (True, *(p is not None for p in (scale, bias, read, offset, write, k)))


# --- what holds for every kernel ------------------------------------------------------------------


def check_code(launches, target):
    seen = set()
    for kernel, shape, args, options in launches:
        key = (
            kernel.__name__,
            tuple(a.dtype if isinstance(a, torch.Tensor) else a is None for a in args),
            *options.items(),
        )
        if key in seen:
            continue
        seen.add(key)
        compiled, names = compile_launch(kernel, shape, args, options, target)
        accesses = accesses_of(compiled, names)
        assert not narrow_streams(accesses), f"{kernel.__name__} {shape}: {narrow_streams(accesses)}"
        code = compiled.asm["ptx" if "ptx" in compiled.asm else "amdgcn"]
        assert "f64" not in code, f"{kernel.__name__} computes in fp64"
        assert compiled.metadata.shared <= 48 * 1024, (
            f"{kernel.__name__} takes {compiled.metadata.shared} bytes of shared memory"
        )
        if "ptx" not in compiled.asm:
            quads = sum(bits // 128 for n, a in accesses.items() if n in STREAMS for bits in a)
            kept = len(re.findall(r"(?:global|buffer)_(?:load|store)_dwordx4", code))
            assert kept >= quads, (
                f"{kernel.__name__}: {quads} accesses of 128 bits became {kept} in the machine code"
            )
    return {key[0] for key in seen}
