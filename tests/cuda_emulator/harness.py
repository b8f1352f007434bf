"""Builds kernels/cuda for the emulator and calls it on torch tensors: kernels/abi.h in ctypes.
FASTEDIT_EMULATOR_FLAGS: further flags of the compiler (make sanitize: AddressSanitizer's).

Every output lies poisoned between guards; `check` fails when a guard changed or an element kept its poison.
"""

import ctypes
import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Fortified longjmp takes a switch of fibers for a smashed stack.
FLAGS = [
    "-std=c++17", "-O1", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE", f"-I{HERE}",
    f"-I{ROOT / 'kernels'}", *os.environ.get("FASTEDIT_EMULATOR_FLAGS", "").split(),
]  # fmt: skip
PARAMETERS = ("scale", "bias", "read", "offset", "write")
FORM = (*PARAMETERS, "slot", "coefficient")
GATE = ("gate", "rule")

I64, INT, PTR, F32 = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p, ctypes.c_float


def read_structs(header):
    """abi.h's structs in ctypes, by name."""
    kinds = {"int64_t": I64, "int": INT, "float": F32}
    text = re.sub(r"//.*", "", header.read_text())
    for name, body in re.findall(r"struct (\w+) \{(.*?)\};", text, re.DOTALL):
        fields = []
        for declaration in filter(None, map(str.strip, body.split(";"))):
            kind, names = re.fullmatch(r"(?:const )?(\w+)(.*)", declaration, re.DOTALL).groups()
            fields += [(n.strip(" *"), PTR if "*" in names else kinds[kind]) for n in names.split(",")]
        kinds[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return kinds


ABI = read_structs(ROOT / "kernels/abi.h")
Form, FormGrad, SlotOrder = ABI["Form"], ABI["FormGrad"], ABI["SlotOrder"]
EditArgs, EditAddArgs, EditAddNormArgs = ABI["EditArgs"], ABI["EditAddArgs"], ABI["EditAddNormArgs"]
EditBackwardArgs, EditAddNormBackwardArgs = ABI["EditBackwardArgs"], ABI["EditAddNormBackwardArgs"]
ProjectArgs, ProjectBackwardArgs = ABI["ProjectArgs"], ABI["ProjectBackwardArgs"]
MomentsArgs, ValueAscentArgs = ABI["MomentsArgs"], ABI["ValueAscentArgs"]
EXPORTED = [
    EditArgs, EditAddArgs, EditAddNormArgs, ProjectArgs, EditBackwardArgs, EditAddNormBackwardArgs,
    ProjectBackwardArgs, MomentsArgs, ValueAscentArgs,
]  # fmt: skip


def compiler():
    return shutil.which("g++") or shutil.which("c++")


def apart():
    """g++ makes the statics of templates one for all libraries of a process; each build here has a chip of its own."""
    return ["-fno-gnu-unique"] if compiler().endswith("g++") else []


def build(folder, switch="", units=None):
    """The kernels and the emulator as one shared library in `folder`; one that is there is loaded as it is.

    `switch` is a macro that is defined for `units` (kernels/cuda/*.cu), or for all that is compiled; others are as they were
    built without it.
    """
    library = folder / f"emulated{switch}.so"
    if units is not None:
        build(folder)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            compile_all(library, switch, units)
    return Emulated(ctypes.CDLL(str(library)), library)


def compile_all(library, switch="", units=None):
    folder = library.parent
    kernels = [path for path in sorted((ROOT / "kernels/cuda").glob("*.cu")) if path.name != "probe.cu"]  # it asks a real device
    sources = [*kernels, *sorted(HERE.glob("*.cpp"))]

    def compile_one(source):
        switched = switch and (units is None or source.stem in units)
        target = folder / f"{source.stem}{switch if switched else ''}.o"
        if switch and not switched:
            return str(target)
        flags = [*FLAGS, *apart(), *([f"-D{switch}"] if switched else [])]
        command = [compiler(), *flags, "-x", "c++", "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    subprocess.run([compiler(), *FLAGS, "-shared", "-o", str(library), *objects], check=True)


def reference():
    """kernels/reference as a package, installed or not."""
    name = "cuda_tests_reference"
    if name not in sys.modules:
        path = ROOT / "kernels/reference"
        spec = importlib.util.spec_from_file_location(
            name, path / "__init__.py", submodule_search_locations=[str(path)]
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


ARGUMENTS = []  # (address, bytes from the first element to the last) of the next call's tensors


def pointer(tensor):
    """The tensor's address; kernels of the next call may touch what it spans."""
    if tensor is None:
        return None
    elements = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    ARGUMENTS.append((tensor.data_ptr(), elements * tensor.element_size()))
    return tensor.data_ptr()


def stride(tensor):
    return 0 if tensor is None else tensor.stride(0)


# What says which dtype a stream of rows has: the first of these fields that the struct has.
STREAM_DTYPES = {
    "hidden": ("hidden_dtype", "dtype"), "out": ("residual_dtype", "dtype"), "x": ("x_dtype",),
    "residual": ("residual_dtype", "hidden_dtype"), "normed": ("residual_dtype",), "grad": ("grad_dtype",),
    "d_hidden": ("hidden_dtype", "dtype"), "grad_residual": ("residual_dtype",),
    "grad_normed": ("residual_dtype",), "residual_out": ("residual_dtype",), "d_x": ("x_dtype",),
    "d_residual": ("residual_dtype",),
}  # fmt: skip


def streams_of(args):
    """{name: (address, bytes from the first element to the last, bytes of the stream read once)}."""
    found, add = {}, getattr(args, "add", args)
    for struct in {id(add): add, id(args): args}.values():
        for name, kind in struct._fields_:
            if kind is not PTR or name not in STREAM_DTYPES or not getattr(struct, name):
                continue
            code = next(getattr(add, field) for field in STREAM_DTYPES[name] if hasattr(add, field))
            size = 4 if code == CODES[torch.float32] else 2
            step = getattr(struct, f"{name}_stride", 0) or add.width
            span = ((add.rows - 1) * step + add.width) * size
            found[name] = (getattr(struct, name), max(span, 0), max(add.rows * add.width, 1) * size)
    return found


class Outputs:
    """Poisoned outputs of one call, each between two guards; `shift` elements off a 16-byte boundary."""

    # NaNs that no arithmetic makes.
    POISON = {torch.float32: 0x7FC0BEEF, torch.bfloat16: 0x7FEF, torch.float16: 0x7EEF}  # noqa: RUF012

    def __init__(self, shift=0, guard=64):
        self.shift, self.guard, self.made = shift, guard, []

    def new(self, wanted, shape, dtype=torch.float32):
        if not wanted:
            return None
        size = int(torch.Size(shape).numel())
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        whole = torch.full((size + 2 * self.guard + 16,), self.POISON[dtype], dtype=bits)
        start = self.guard + (-whole.data_ptr() // whole.element_size()) % 8 + self.shift
        self.made.append((whole, start, size))
        return whole.view(dtype)[start : start + size].view(shape)

    def check(self):
        for whole, start, size in self.made:
            poison = whole[0].item()
            inside = whole[start : start + size]
            assert (whole[:start] == poison).all() and (whole[start + size :] == poison).all(), (
                "out of bounds"
            )
            assert not (inside == poison).any(), f"{(inside == poison).sum()} of {size} elements not written"


class Emulated:
    """The ops with the reference's arguments, edits as dictionaries of FORM."""

    def __init__(self, library, path):
        self.library, self.path = library, path
        library.emulator_message.restype = ctypes.c_char_p
        for counter in ("struct_bytes", "emulator_loaded", "emulator_stored", "emulator_launches", "emulator_launch"):
            getattr(library, counter).restype = I64
        for op in ("edit_backward", "edit_add_norm_backward", "project_backward", "moments"):
            getattr(library, f"{op}_workspace").restype = I64
        for index, cls in enumerate(EXPORTED):
            assert library.struct_bytes(index) == ctypes.sizeof(cls), f"{cls.__name__} is not abi.h's"
        self.shift = 0

    def schedule(self, multiprocessors=3, seed=0, shared_kib=227):
        self.library.emulator_set(multiprocessors, seed, shared_kib * 1024)

    def call(self, op, args, outputs, backward=False):
        extra = []
        if backward:
            size = getattr(self.library, f"{op}_workspace")(ctypes.byref(args))
            assert size % 4 == 0
            workspace = Outputs(guard=1 << 17)  # more than any unit's partials here
            extra = [ctypes.c_void_p(workspace.new(True, (size // 4,)).data_ptr())]
        watched = streams_of(args)
        if backward:
            watched["workspace"] = (extra[0].value, size, 1)
        self.library.emulator_forget()
        for begin, size, _row_bytes in watched.values():
            self.library.emulator_watch(PTR(begin), I64(size))
        if backward:
            ARGUMENTS.append((extra[0].value, size))
        for begin, size in ARGUMENTS:
            self.library.emulator_allow(PTR(begin), I64(size))
        ARGUMENTS.clear()
        error = getattr(self.library, op)(ctypes.byref(args), *extra)
        self.library.emulator_allow_all()
        self.last_op, self.last_args = op, args
        self.moved_bytes = {
            name: (self.library.emulator_loaded(i), self.library.emulator_stored(i))
            for i, name in enumerate(watched)
        }
        self.moved = {
            name: tuple(moved / watched[name][2] for moved in both)
            for name, both in self.moved_bytes.items()
        }
        assert error == 0, f"{op}: error {error}, {self.library.emulator_message().decode()}"
        if backward:  # read before it was written would show as the poison's NaN in a result
            whole, start, floats = workspace.made[0]
            assert (whole[:start] == whole[0]).all() and (whole[start + floats :] == whole[0]).all()
        outputs.check()

    def launches(self):
        """[(kernel's mangled name, blocks, threads, shared bytes)] of the last call."""
        listing = subprocess.run(["nm", str(self.path)], capture_output=True, text=True, check=True).stdout
        names = {int(line.split()[0], 16): line.split()[2] for line in listing.splitlines() if len(line.split()) == 3}
        fields = [[self.library.emulator_launch(i, f) for f in range(4)]
                  for i in range(self.library.emulator_launches())]  # fmt: skip
        return [(names[kernel], *shape) for kernel, *shape in fields]

    def form(self, form):
        given = {name: form.get(name) for name in (*FORM, *GATE)}
        first = next((given[name] for name in (*PARAMETERS, "gate") if given[name] is not None), None)
        coefficient = given["coefficient"]
        return Form(
            **{name: pointer(tensor) for name, tensor in given.items()},
            rank=0 if given["read"] is None else given["read"].shape[-2],
            slots=first.shape[0] if given["slot"] is not None and first is not None else 1,
            coefficient_stride=0 if coefficient is None or coefficient.numel() == 1 else 1,
        )

    def edit(self, hidden, form, want_z=False):
        rows, width = hidden.shape
        native, outputs = self.form(form), Outputs(self.shift)
        out = outputs.new(True, (rows, width), hidden.dtype)
        z = outputs.new(want_z, (rows, native.rank))
        args = EditArgs(
            rows,
            width,
            native,
            CODES[hidden.dtype],
            pointer(hidden),
            stride(hidden),
            pointer(out),
            pointer(z),
        )
        self.call("edit", args, outputs)
        return out, z

    def add_args(self, x, residual, form, on_sum, out, z):
        return EditAddArgs(
            *x.shape, self.form(form), CODES[x.dtype], CODES[residual.dtype], pointer(x), stride(x),
            pointer(residual), stride(residual), pointer(out), pointer(z), int(on_sum),
        )  # fmt: skip

    def edit_add(self, x, residual, form, on_sum=False, want_z=False):
        outputs = Outputs(self.shift)
        out = outputs.new(True, x.shape, residual.dtype)
        z = outputs.new(want_z, (len(x), self.form(form).rank))
        self.call("edit_add", self.add_args(x, residual, form, on_sum, out, z), outputs)
        return out, z

    def edit_add_norm(
        self,
        x,
        residual,
        weight,
        norm_bias,
        form,
        on_sum=False,
        kind=0,
        eps=1e-6,
        want_z=False,
        want_out=True,
    ):
        outputs = Outputs(self.shift)
        out = outputs.new(want_out, x.shape, residual.dtype)
        normed = outputs.new(True, x.shape, residual.dtype)
        z = outputs.new(want_z, (len(x), self.form(form).rank))
        mean, rstd = outputs.new(kind == 2, (len(x),)), outputs.new(True, (len(x),))
        args = EditAddNormArgs(
            self.add_args(x, residual, form, on_sum, out, z), kind, eps, pointer(weight), pointer(norm_bias),
            pointer(normed), pointer(mean), pointer(rstd),
        )  # fmt: skip
        self.call("edit_add_norm", args, outputs)
        return out, normed, z, mean, rstd

    def project(self, hidden, read, offset):
        outputs = Outputs(self.shift)
        z = outputs.new(True, (len(hidden), len(read)))
        args = ProjectArgs(
            *hidden.shape, len(read), CODES[hidden.dtype], pointer(hidden), stride(hidden), pointer(read),
            pointer(offset), pointer(z),
        )  # fmt: skip
        self.call("project", args, outputs)
        return z

    def form_outputs(self, outputs, form, needs, rows):
        """d_form's tensors and struct; needs: scale, bias, read, offset, write, coefficient."""
        wanted = zip(PARAMETERS, needs[:5], strict=True)
        made = [outputs.new(True, form[name].shape) if need else None for name, need in wanted]
        made.append(outputs.new(needs[5], (rows,)))
        return made, FormGrad(*map(pointer, made))

    def slot_order(self, form):
        if form.get("slot") is None:
            return (), SlotOrder()
        slots = next(form[name] for name in PARAMETERS if form.get(name) is not None).shape[0]
        sort = importlib.import_module(f"{reference().__name__}.slot_order").slot_order
        order = sort(form["slot"], slots)
        return order, SlotOrder(*map(pointer, order))

    def edit_backward(self, grad, hidden, residual, form, grad_z, z, needs, out_dtype, shape):
        """Seven gradients; needs: hidden and form_outputs' six."""
        rows, width = shape
        outputs = Outputs(self.shift)
        d_hidden = outputs.new(needs[0], shape, out_dtype)
        d_form, native = self.form_outputs(outputs, form, needs[1:], rows)
        _keep, order = self.slot_order(form)
        args = EditBackwardArgs(
            rows, width, self.form(form), CODES[grad.dtype] if grad is not None else -1, CODES[out_dtype],
            pointer(grad), stride(grad), pointer(hidden), stride(hidden), pointer(residual), stride(residual),
            pointer(grad_z), pointer(z), pointer(d_hidden), native, order,
        )  # fmt: skip
        self.call("edit_backward", args, outputs, backward=True)
        return d_hidden, *d_form

    def edit_add_norm_backward(
        self, grad_residual, grad_normed, residual_out, x, residual, weight, mean, rstd, form, grad_z, z,
        on_sum, kind, needs, needs_norm, x_dtype, residual_dtype, shape,
    ):  # fmt: skip
        rows, width = shape
        outputs = Outputs(self.shift)
        d_x = outputs.new(needs[0], shape, x_dtype)
        d_residual = outputs.new(needs[7], shape, residual_dtype)
        d_form, native = self.form_outputs(outputs, form, needs[1:7], rows)
        d_weight, d_norm_bias = (outputs.new(need, (width,)) for need in needs_norm)
        _keep, order = self.slot_order(form)
        args = EditAddNormBackwardArgs(
            rows, width, self.form(form), CODES[x_dtype], CODES[residual_dtype], pointer(grad_residual),
            stride(grad_residual), pointer(grad_normed), stride(grad_normed), pointer(residual_out),
            pointer(x), stride(x), pointer(residual), stride(residual), pointer(weight), pointer(mean),
            pointer(rstd), pointer(grad_z), pointer(z), int(on_sum), kind, pointer(d_x), pointer(d_residual),
            native, pointer(d_weight), pointer(d_norm_bias), order,
        )  # fmt: skip
        self.call("edit_add_norm_backward", args, outputs, backward=True)
        return d_x, d_residual, *d_form, d_weight, d_norm_bias

    def moments(self, hidden, group, groups):
        """(mean, m2), float64: the sums of the two floats that each is."""
        outputs, order = Outputs(self.shift), ()
        if group is not None:
            sort = importlib.import_module(f"{reference().__name__}.slot_order").slot_order
            order = sort(group, groups)
        mean, m2 = (outputs.new(True, (2, groups, hidden.shape[1])) for _ in range(2))
        args = MomentsArgs(
            *hidden.shape, groups, CODES[hidden.dtype], pointer(hidden), stride(hidden), SlotOrder(*map(pointer, order)),
            pointer(mean), pointer(m2),
        )  # fmt: skip
        self.call("moments", args, outputs, backward=True)
        return mean.double().sum(0), m2.double().sum(0)

    def total_gradient(self, z, slope, head, gram, steps, step_size):
        """reference.value_ascent.ascend's `flips`."""
        outputs = Outputs(self.shift)
        total = outputs.new(True, z.shape)
        args = ValueAscentArgs(
            rows=len(z), units=z.shape[1], steps=steps, step_size=step_size, head=pointer(head), gram=pointer(gram),
            z=pointer(z), slope=pointer(slope), total=pointer(total),
        )  # fmt: skip
        self.call("value_ascent", args, outputs)
        return total

    def project_backward(self, grad_z, hidden, read, needs, out_dtype, width):
        rows, rank = grad_z.shape
        outputs = Outputs(self.shift)
        d_hidden = outputs.new(needs[0], (rows, width), out_dtype)
        d_read, d_offset = outputs.new(needs[1], (rank, width)), outputs.new(needs[2], (rank,))
        args = ProjectBackwardArgs(
            rows, width, rank, CODES[out_dtype], pointer(grad_z), pointer(hidden), stride(hidden),
            pointer(read), pointer(d_hidden), pointer(d_read), pointer(d_offset),
        )  # fmt: skip
        self.call("project_backward", args, outputs, backward=True)
        return d_hidden, d_read, d_offset
