import os

os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")  # two tests at a time
os.environ.setdefault("FASTEDIT_POISON", "1")  # results of native calls hold NaN before a kernel fills them
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hashlib

import pytest
import torch


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


def pytest_addoption(parser):
    parser.addoption("--grid", action="store_true", help="every combination of a test's parameters, not a covering sample")


BACKENDS = ("device", "backend", "isa")  # implementations of their own: each gets a sample


def _covering(items):
    """Of each test that is crossed over several parameters, cases that hold every value of every parameter once.

    The rows of a table, several parameters in one decorator, are values as a whole.
    """
    seen, kept = set(), set()
    for item in sorted(items, key=lambda item: hashlib.sha256(item.nodeid.encode()).digest()):
        params = dict(item.callspec.params) if hasattr(item, "callspec") else {}
        test = item.path, item.cls, item.originalname, *(str(params.pop(name, None)) for name in BACKENDS)
        tables = [tuple(n.strip() for n in names.split(",")) if isinstance(names, str) else tuple(names)
                  for names in (mark.args[0] for mark in item.iter_markers("parametrize"))]  # fmt: skip
        tables += [(name,) for name in params if not any(name in table for table in tables)]
        values = {(test, table, tuple(_key(params[name]) for name in table if name in params)) for table in tables}
        if len(values) < 2 or values - seen:
            seen |= values
            kept.add(item)
    return kept


def _key(value):
    return repr(value) if isinstance(value, (str, int, float, type(None))) else id(value)


def pytest_collection_modifyitems(config, items):
    """A covering sample, and the files that take longest first, so that of two at a time none is left over at the end."""
    if not config.getoption("--grid") and not any("[" in str(argument) for argument in config.args):
        kept = _covering(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]
    order = {f"test_{name}": place for place, name in enumerate(SLOW)}
    items.sort(key=lambda item: order.get(item.path.stem, len(SLOW)))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):  # not a keyword: those hold the names of folders, too
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
