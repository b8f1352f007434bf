import os

os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")  # two tests at a time
os.environ.setdefault("FASTEDIT_POISON", "1")  # results of native calls hold NaN before a kernel fills them
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pathlib

import pytest
import torch

SHARED = pathlib.Path(__file__).resolve().parent.parent.parent / "shared"


@pytest.fixture
def shared():
    """The folder of small trained models and texts beside the repository; skips where it is not there."""
    if not SHARED.is_dir():
        pytest.skip("needs the folder `shared` beside the repository")
    return SHARED


@pytest.fixture(scope="session")
def chat_model():
    """(model, tokenizer) of a real chat model, for slow tests; skips where its package is not installed."""
    import fastedit

    try:
        return fastedit.chat_model()
    except ImportError as missing:
        pytest.skip(str(missing))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


SLOW = (  # from eighty seconds of processor time to ten
    "triton_aot", "modes_compiled", "triton_oldest", "triton_interpreter", "cuda_streams", "every_family", "distributed",
    "cuda_build", "instruction_sets", "jax", "cli_demo", "recontrol_compiled", "red_training", "cli_steering",
    "bench_models", "cuda_emulated_gradients", "gates_handles", "patch_compiled", "positions", "triton_gate_aot",
    "tenants", "recontrol_control", "cuda_emulated", "reft_training", "gates_in_kernels_patched",
    "positions_handles", "instructions", "ops", "method_pages", "capture", "bench_effects", "gates",
    "jax_transforms", "bank", "patch_checkpointing", "probes", "cuda_emulated_rows", "bank_gates",
    "gates_in_kernels",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """The files that take longest first, so that of two at a time none is left over at the end."""
    order = {f"test_{name}": place for place, name in enumerate(SLOW)}
    items.sort(key=lambda item: order.get(item.path.stem, len(SLOW)))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):  # not a keyword: those hold the names of folders, too
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
