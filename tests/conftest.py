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


@pytest.fixture
def one_thread():
    """Threads gain nothing on a few rows, and where others compute too they cost up to forty times the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SLOW = (  # from eighty seconds of processor time to ten
    "triton_aot", "modes_compiled", "triton_oldest", "triton_interpreter", "cuda_streams", "every_family", "distributed",
    "cuda_build", "instruction_sets", "jax", "cli_demo", "recontrol_compiled", "red_training", "cli_steering",
    "bench_models", "cuda_emulated_gradients", "gates_handles", "patch_compiled", "positions", "triton_gate_aot",
    "tenants", "recontrol_control", "cuda_emulated", "reft_training", "gates_in_kernels_patched",
    "positions_handles", "instructions", "ops", "method_pages", "capture", "bench_effects", "gates",
    "jax_transforms", "bank", "patch_checkpointing", "probes", "cuda_emulated_rows", "bank_gates",
    "gates_in_kernels",
)  # fmt: skip


# Files and tests of some seconds of processor time each, eleven minutes in all: compilers, emulated thread orders, processes
# that train together, the blocks and commands of the pages and of --help. `make test` leaves them out, `make test-long` runs
# them, and .ci/run both.
LONG = (
    "commands_of_pages", "pages", "method_pages", "notebooks", "cli_without_packages", "help_examples",
    "training_sentences::test_pairs_are_told_apart_by_their_segments",
    "training_sentences::test_classify_learns_and_comes_back",
    "ready_adds::test_a_compiled_patched_layer_has_few_guards_more_than_a_hooked_one",
    "recontrol_control::test_controlled_samples_earn_more",
    "argued::test_what_takes_a_model_is_right_or_refuses_and_changes_nothing",
    "cuda_clusters", "cuda_streams", "cuda_build", "distributed", "instruction_sets", "instructions", "threads",
    "under_way::test_every_way_of_calling_is_seen", "triton_oldest",
    "traced::test_each_prefix_of_a_save",
    "triton_aot::test_activations_move_128_bits_and_nothing_is_fp64",
    "triton_aot::test_products_are_six_of_bf16_and_summed_in_fp32",
    "triton_gate_aot::test_a_gated_edit_is_one_launch_of_wide_accesses_in_fp32",
    "modes_compiled::test_every_family_compiles_whole_with_every_kind",
    "modes_compiled::test_a_hook_put_on_after_compiling_is_pytorchs_to_see",
    "patch_compiled::test_a_patched_model_compiles_whole_and_its_dial_needs_no_retrace",
    "recontrol_compiled::test_one_graph_before_any_forward_for_every_dial_length_and_net",
    "gates_in_kernels_patched::test_compiled", "gates_handles::test_strength_turns_without_a_new_trace",
    "tenants::test_compiled_forwards_follow_the_assignment", "probes::test_compiled_forwards",
    "every_family::test_a_compiled_model_says_what_the_eager_one_says",
    "bank::test_nothing_moves_and_nothing_is_compiled_again_when_an_edit_is_added",
    "reft_training::test_a_compiled_step_trains_the_same_without_a_break",
    "red_training::test_checkpoints_on_transformers_5_17",
    "red_training::test_training_lowers_the_loss_of_what_a_frozen_head_cannot_learn",
    "patch_checkpointing::test_checkpointing_still_recomputes_on_transformers_5_17",
    "training_kept::test_resuming_lora_and_red_ends_where_an_unbroken_run_ends",
    "rahf_steps::test_scit_and_dual_teach_what_they_are_to_teach",
    "cli_steering::test_the_commands_in_a_process_of_their_own",
    "cli_demo::test_there_are_enough_sentences_and_half_are_swapped",
    "bench_models::test_a_process_measures_what_it_is_asked",
    "store_files::test_kill_at_random_times_over_large_edits",
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
    for item in items:
        file = item.path.stem.removeprefix("test_")
        if file in LONG or f"{file}::{item.originalname}" in LONG:
            item.add_marker("long")
    order = {f"test_{name}": place for place, name in enumerate(SLOW)}
    items.sort(key=lambda item: order.get(item.path.stem, len(SLOW)))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):  # not a keyword: those hold the names of folders, too
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
