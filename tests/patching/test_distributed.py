"""More than one process: two on the CPU with gloo, launched once for all tests of this file.

Each of two processes has half of every batch. Halving is exact in fp32 and a sum of two numbers has one order, so the
mean over the processes is bit for bit what one process accumulates over the same halves: what is trained so is compared
with `==`. Against one process that takes the batch whole the order of the sums over rows differs, and FSDP2 gathers the
base's weights at other addresses, where matrix products take other paths: some roundings.
"""

import json

import pytest
import tiny_models as tiny
import torch
from processes import HERE, accelerated, launched
from tiny_models import sequences

import fastedit as fe

ULP = torch.finfo(torch.float32).eps
EXACT = ("ddp", "edits_replicate", "edits_shard")  # the base is whole on each process
LAYOUTS = (*EXACT, "replicate", "shard", "rest")
MODES = ("reference", *LAYOUTS, "on_a_manifold", "base_too", "bf16", "patched_after", "accelerate_fsdp2", "tensor_parallel")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One dict a process: {mode: what it found}."""
    folder = tmp_path_factory.mktemp("two")
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    done = launched([*launcher, str(HERE / "distributed_worker.py"), str(folder), *MODES])
    files = [folder / f"results-{rank}.json" for rank in (0, 1)]
    assert all(file.is_file() for file in files), done.stderr[-3000:]
    return [json.loads(file.read_text()) for file in files]


def of(results, mode, *keys):
    """The mode's findings of both processes."""
    found = []
    for result in results:
        assert mode in result, f"an earlier mode failed: {result}"
        result = result[mode]
        assert "error" not in result, result["error"]
        for key in keys:
            result = result[key]
        found.append(result)
    return found


def close(curve, other, roundings=8):
    """A loss is a mean over 28 tokens, and five small steps have moved the edits: a few roundings of its value."""
    return all(abs(a - b) <= roundings * ULP * abs(b) for a, b in zip(curve, other, strict=True))


@pytest.mark.parametrize("how", LAYOUTS)
def test_two_processes_train_as_one(results, how):
    (alone, _), found = of(results, "reference"), of(results, how)
    assert len(set(alone["whole"])) == 5
    for process in found:
        assert close(process["losses"], alone["whole"])
        if how in EXACT:
            assert process["losses"] == alone["parts"] and process["tensors"] == alone["tensors"]
        assert process["dtypes"] == ["torch.float32"] and process["finite"]


def test_a_basis_stays_orthonormal_under_ddp_and_is_not_laid_out(results):
    for process in of(results, "on_a_manifold"):
        assert process["losses"] == process["alone"] and len(set(process["losses"])) == 5 and process["same"]
        assert process["apart"] <= 2**-22
        assert len(process["refused"]) == 2 and all("train it under DDP" in message for message in process["refused"])


@pytest.mark.parametrize("how", LAYOUTS)
def test_a_checkpoint_resumes_the_same_curve(results, how):
    for process in of(results, how):
        assert process["resumed"] == process["losses"][2:]


@pytest.mark.parametrize("how", LAYOUTS)
def test_a_save_holds_whole_fp32_tensors_and_the_first_process_writes_it(results, how):
    first, second = of(results, how)
    assert first["wrote"] and first["saved"] and second["wrote"] == (how == "ddp")
    assert first["says"] == first["said"], "one process with the saved edit says something else"
    assert first["off"] != first["said"], "the dial does not turn"
    assert first["laid"] == (["Parameter"] if how in ("ddp", "rest") else ["DTensor"])


def test_the_base_trains_with_the_edits(results):
    """The optimizer's vectors and tails fall on other elements of a part than of the whole: some roundings."""
    (alone, _), found = of(results, "reference"), of(results, "base_too")
    assert alone["all_parts"] != alone["parts"]
    for process in found:
        assert close(process["losses"], alone["all_parts"]) and process["resumed"] == process["losses"][2:]


@pytest.mark.parametrize("how", ["replicate", "shard"])
def test_masters_stay_fp32_where_the_base_computes_in_bf16(results, how):
    (alone, _), found = of(results, "reference"), of(results, "bf16", how)
    for process in found:
        assert process["dtypes"] == ["torch.float32"] and process["finite"]
        assert process["losses"] != alone["parts"] and close(process["losses"], alone["parts"], 2**-8 / ULP)
    assert found[0]["saved"]


def test_masters_that_fsdp_would_cast_are_refused(results):
    for message in of(results, "bf16", "rest"):
        assert "dtype torch.bfloat16, expected float32" in message


def test_a_sharded_model_can_be_patched_and_unpatched(results):
    (alone, _), found = of(results, "reference"), of(results, "patched_after")
    for process in found:
        assert close(process["losses"], alone["whole"]) and process["back"]
    assert found[0]["saved"] and found[0]["wrote"] and not found[1]["wrote"]


def test_accelerates_fsdp2_leaves_the_edits_apart(results):
    (alone, _), found = of(results, "reference"), of(results, "accelerate_fsdp2")
    for process in found:
        assert close(process["no"]["losses"], alone["whole"]) and process["no"]["layers"]
        assert close(process["bf16"]["losses"], alone["parts"], 2**-7 / ULP)  # the logits and the loss, too, are bf16
        assert process["bf16"]["dtypes"] == ["torch.float32"] and process["bf16"]["finite"]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("site", ["mlp", "attn", "block"])
def test_tensor_parallel_layers_are_edited_behind_their_sum(results, site, fused):
    for process in of(results, "tensor_parallel"):
        assert process["sharded"]
        error, eager, largest = process[f"{site}, fused {fused}"]
        assert error <= 2 * eager + ULP * largest


def test_merging_into_parts_of_weights_is_refused(results):
    for process in of(results, "tensor_parallel"):
        assert sum("is a DTensor" in message for message in process["merge"]) == 4
        assert sum("residual stream" in message for message in process["merge"]) == 2


@pytest.fixture(scope="module")
def by_accelerate(tmp_path_factory):
    """The folder of accelerate_worker.py, which two processes have run."""
    folder = tmp_path_factory.mktemp("accelerate")
    done = accelerated(HERE / "accelerate_worker.py", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_accelerate_launch(results, by_accelerate):
    found, (alone, _) = json.loads((by_accelerate / "results.json").read_text()), of(results, "reference")
    assert found["mode"] == "MULTI_CPU" and found["dtypes"] == ["torch.float32"]
    assert found["losses"] == alone["parts"] and found["resumed"] == alone["parts"][2:]
    fe.load(tiny.build("llama", num_hidden_layers=2), by_accelerate / "edit")


def test_a_capture_in_two_processes_of_accelerate_returns_the_whole(by_accelerate):
    one, two = (json.loads((by_accelerate / f"moments-{i}.json").read_text()) for i in range(2))
    assert one == two
    whole = fe.capture(tiny.exact(tiny.build("llama")), None, sequences(50), batch_size=4)
    for layer, moments in whole.items():
        count, mean = one[str(layer)]
        assert count == moments.count.tolist()
        assert torch.allclose(torch.tensor(mean, dtype=torch.float64), moments.mean(), rtol=0, atol=1e-7)


def test_what_cannot_be_laid_out_is_refused(monkeypatch):
    handle = fe.patch(tiny.build("llama"), fe.RED())
    with pytest.raises(ValueError, match="expected one of replicate, shard"):
        fe.distributed.shard(handle, None, policy="split")
    handle.remove()
    with pytest.raises(RuntimeError, match="was removed"):
        fe.distributed.shard(handle, None)
