"""Whether the GPU's bits are those of the emulator (tests/cuda_emulator), of kernels compiled with -fmad=false.

    python -m bench.gpu.bits            on a GPU, with nvcc; ends with 1 where a result differs
    python -m bench.gpu.bits --write    with the emulator: bits.json, anew

The emulator adds and multiplies as it is written; nvcc contracts a product and a sum unless it is told not to. What is left
out: norms and soft gates, whose roots and exponentials are approximations of the hardware. Inputs come from integers, and
every result is one SHA-256; a test holds bits.json to the emulator.
"""

import argparse
import ctypes
import hashlib
import json
import pathlib
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/cuda_emulator")]
KERNEL_SOURCES = sorted(path for path in (ROOT / "kernels/cuda").glob("*.cu") if path.stem != "probe")
FILE = pathlib.Path(__file__).with_name("bits.json")
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
SHAPES = ((70, 256), (9, 512), (5, 100))  # the last: an element an access


def numbers(*shape, seed=1):
    """fp32 of [-1, 1) with 20 bits each, the same on every machine."""
    i = torch.arange(torch.Size(shape).numel(), device="cpu") + 1000003 * seed
    i = (i * 2654435761) % (1 << 32)
    i = ((i ^ (i >> 15)) * 2246822519) % (1 << 32)
    return (((i >> 12).float() - (1 << 19)) / (1 << 19)).view(shape)


def make_form(width, rank):
    form = {"scale": 1 + numbers(width, seed=2) / 4, "bias": numbers(width, seed=3)}
    if rank:
        form |= {
            "read": numbers(rank, width, seed=4) / 16,
            "offset": numbers(rank, seed=5),
            "write": numbers(rank, width, seed=6),
        }
    return form


def results(library, device="cpu"):
    """(name, tensors) of each case; `library` is the harness's or one that has its methods."""
    to = lambda form: {name: value.to(device) for name, value in form.items()}  # noqa: E731
    for (rows, width), (kind, dtype), rank in ((s, d, r) for s in SHAPES for d in DTYPES.items() for r in (0, 3, 4)):
        x, residual, grad = (numbers(rows, width, seed=s).to(dtype).to(device) for s in (7, 8, 9))
        form, name = to(make_form(width, rank)), f"{rows} {width} {kind} {rank}"
        z = numbers(rows, rank, seed=10).to(device) if rank else None
        yield f"edit {name}", library.edit(x, form, rank > 0)
        yield f"edit_add {name}", library.edit_add(x, residual, form)[:1]
        yield f"edit_add on the sum {name}", library.edit_add(x, residual, form, True)[:1]
        needs = [True, True, True, *[rank > 0] * 3, False]
        yield f"edit_backward {name}", library.edit_backward(grad, x, None, form, None, z, needs, dtype, (rows, width))
        if rank:
            yield f"project {name}", (library.project(x, form["read"], form["offset"]),)


def digests(library, device="cpu"):
    found = {}
    for name, tensors in results(library, device):
        sha = hashlib.sha256()
        for tensor in tensors:
            if tensor is not None:
                sha.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        found[name] = sha.hexdigest()[:16]
    return found


def build(folder, sources, extra):
    """Sources of kernels/cuda for this GPU, and one that gives them C names, as one shared library."""
    from cuda_tools import KERNELS, find_nvcc

    major, minor = torch.cuda.get_device_capability()
    flags = ["-std=c++17", "-O3", f"-arch=sm_{major}{minor}", "-Xcompiler", "-fPIC", f"-I{KERNELS}", *extra]

    def compile_one(source):
        target = folder / f"{source.stem}.o"
        command = [find_nvcc(), *flags, "-x", "cu", "-c", str(source), "-o", str(target)]
        subprocess.run(command, check=True)
        return str(target)

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / "kernels.so"
    subprocess.run([find_nvcc(), "-shared", "-cudart=shared", "-o", str(library), *objects], check=True)
    return ctypes.CDLL(str(library))


def on_gpu(library):
    """The harness's methods on tensors of the GPU."""
    import harness

    class OnGpu(harness.Emulated):
        def __init__(self):
            self.library, self.shift = library, 0
            for op in ("edit_backward", "edit_add_norm_backward", "project_backward"):
                getattr(library, f"{op}_workspace").restype = ctypes.c_int64

        def call(self, op, args, outputs, backward=False):
            extra, workspace = [], None
            if backward:
                size = getattr(library, f"{op}_workspace")(ctypes.byref(args))
                workspace = torch.full((size // 4 + 1,), float("nan"))
                extra = [ctypes.c_void_p(workspace.data_ptr())]
            torch.cuda.synchronize()  # the kernels go to the default stream
            error = getattr(library, op)(ctypes.byref(args), *extra)
            torch.cuda.synchronize()
            harness.ARGUMENTS.clear()
            assert error == 0, f"{op}: error {error}"
            outputs.check()

    return OnGpu()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="bits.json from the emulator")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        if options.write:
            import harness

            emulated = harness.build(folder)
            emulated.schedule()
            FILE.write_text(json.dumps(digests(emulated), indent=0) + "\n")
            return
        if not torch.cuda.is_available():
            raise SystemExit("no GPU is here")
        library = build(folder, [*KERNEL_SOURCES, ROOT / "tests/cuda_emulator/exports.cpp"], ["-fmad=false"])
        with torch.device("cuda"):
            found = digests(on_gpu(library), "cuda")
    expected = json.loads(FILE.read_text())
    assert found.keys() == expected.keys()
    different = [name for name in found if found[name] != expected[name]]
    for name in different:
        print(f"other bits: {name}")
    print(f"{len(found) - len(different)} of {len(found)} results have the emulator's bits")
    raise SystemExit(1 if different else 0)


if __name__ == "__main__":
    main()
