"""Every model class that is served, eager and compiled: a mixed batch says what Hugging Face's models say."""

import copy

import pytest

pytest.importorskip("vllm", reason="needs vllm: `make serving-test` sets it up")

import serving_support as support
import torch

PROMPTS = support.prompts(2)


def compare(tmp_path, family, **changes):
    model = support.save_model(family, tmp_path / "model")
    edits = support.edits()
    support.save_edits(model, tmp_path / "edits")
    keys = [None, *edits]
    expected = [answer for name in keys for answer in support.answers(model, edits.get(name), PROMPTS)]
    llm = support.start(tmp_path / "model", tmp_path / "edits", **changes)
    found = support.tokens(llm, [(prompt, name, None) for name in keys for prompt in PROMPTS])
    assert found == expected
    assert len(set(map(tuple, expected))) > len(keys), "the edits change nothing: nothing was tested"
    return llm


@pytest.mark.parametrize("family", [f for f in support.FAMILIES if f != "llama"])
def test_family(tmp_path, family):
    compare(tmp_path, family)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_compiled(tmp_path, family, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    llm = compare(tmp_path, family, enforce_eager=False)
    assert llm.llm_engine.vllm_config.compilation_config.mode.name != "NONE"


def test_patched_after_unpatched_on_one_compile_cache(tmp_path, monkeypatch):
    """The cache is keyed by what we put into the configuration: without edits, with them, with other sites."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    support.save_model("llama", tmp_path / "model")
    plain = support.start(tmp_path / "model", enforce_eager=False)
    before = support.tokens(plain, [(prompt, None, None) for prompt in PROMPTS])
    edited = compare(tmp_path, "llama", enforce_eager=False)
    assert support.tokens(edited, [(prompt, None, None) for prompt in PROMPTS]) == before
    fewer = support.start(tmp_path / "model", tmp_path / "edits", enforce_eager=False, fastedit={"sites": ["attn"], "rank": 2})
    hashes = {llm.llm_engine.vllm_config.compute_hash() for llm in (plain, edited, fewer)}
    assert len(hashes) == 3


def test_nothing_configured_nothing_touched(tmp_path):
    support.save_model("llama", tmp_path / "model")
    llm = support.start(tmp_path / "model")
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    assert not hasattr(runner, "fastedit")
    assert not any("_fastedit_place" in module.__dict__ for module in runner.get_model().modules())
    with pytest.raises(ValueError, match="serves no edits"):
        support.tokens(llm, [(PROMPTS[0], "red", None)])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_bfloat16(tmp_path, family):
    """Of two bfloat16 engines neither is the other's reference: a token is the one of Hugging Face's model, in bfloat16
    under the same edit, wherever that leads by more than twice what bfloat16 costs that model itself.
    """
    exact = support.save_model(family, tmp_path / "model")
    rounded = copy.deepcopy(exact).bfloat16()
    exact.load_state_dict(rounded.state_dict())  # the same weights, computed in fp32
    edits = {name: stack for name, stack in support.edits().items() if name in ("red", "steer", "low-rank", "stacked")}
    for name, stack in edits.items():
        support.save_edit(exact, tmp_path / "edits" / name, stack)
    llm = support.start(tmp_path / "model", tmp_path / "edits", dtype="bfloat16")
    keys = [None, *edits]
    found = iter(support.tokens(llm, [(prompt, name, None) for name in keys for prompt in PROMPTS]))
    decided = total = 0
    for name in keys:
        for prompt in PROMPTS:
            answer = next(found)
            logits = [support.predicted(model, edits.get(name), prompt, answer) for model in (rounded, exact)]
            error = (logits[0] - logits[1]).abs().max()
            best, second = logits[0].topk(2).values.T
            clear = best - second > 2 * error
            assert torch.equal(logits[0].argmax(-1)[clear], torch.tensor(answer)[clear]), name
            decided, total = decided + int(clear.sum()), total + len(answer)
    assert decided > total / 2, f"{decided} of {total} tokens are decided: too little was tested"
