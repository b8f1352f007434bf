"""Requests that would hurt others: each ends alone, with an error that names its edit, and leaves the cache clean."""

import shutil

import pytest

pytest.importorskip("vllm", reason="needs vllm: `make serving-test` sets it up")

import serving_support as support

BLOCKS = 12


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(engine, model, folder of edits, plain answers of each prompt); strengths are not bounded here, to see what comes then."""
    base = tmp_path_factory.mktemp("attacks")
    model = support.save_model("llama", base / "model")
    support.save_edits(model, base / "edits")
    llm = support.start(
        base / "model", base / "edits", max_num_seqs=6, num_gpu_blocks_override=BLOCKS, max_num_batched_tokens=48,
        max_model_len=96, fastedit={"rank": 4, "max_change": 1e300},
    )  # fmt: skip
    return llm, model, base / "edits"


def finished(llm, asked):
    """The outputs of [(prompt, name, strength), …], all at once."""
    inputs = [{"prompt_token_ids": prompt} for prompt, _, _ in asked]
    return llm.generate(inputs, [support.params(name, strength) for _, name, strength in asked], use_tqdm=False)


def token_ids(outputs):
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("name", ["steer", "red", "ends", "generated", "gated"])
def test_hidden_states_that_overflow_end_one_request(world, name):
    """Among unedited and edited neighbours, over all blocks, and after it has left: everybody else is answered right."""
    llm, model, _ = world
    prompts = support.prompts(6, 40, seed=11)
    plain, red = (support.answers(model, stack, prompts) for stack in (None, support.edits()["red"]))
    for _ in range(2):
        asked = [(prompts[0], None, None), (prompts[1], name, 3e38), (prompts[2], "red", 1.0), (prompts[3], name, -3e38)]
        outputs = finished(llm, asked + [(prompts[n], None, None) for n in (4, 5)])
        for number in (1, 3):
            one = outputs[number].outputs[0]
            assert one.finish_reason == "error"
            assert f"edit '{name}' at strength {asked[number][2]!r} made hidden states that are NaN" in one.stop_reason
        others = token_ids([outputs[n] for n in (0, 2, 4, 5)])
        assert others == [plain[0], red[2], plain[4], plain[5]]
    for _ in range(2):  # again over every block
        assert token_ids(finished(llm, [(p, None, None) for p in prompts])) == plain
    assert token_ids(finished(llm, [(p, "red", 1.0) for p in prompts])) == red


def test_an_overflowing_prefix_is_not_in_the_prefix_cache(world):
    """The request that fails shared its first block with a sound one: that one goes on, and the failed part is not reused."""
    llm, _, _ = world
    prompt = support.prompts(1, 70, seed=12)[0]
    for _ in range(2):
        (output,) = finished(llm, [(prompt, "steer", 3e38)])
        assert output.outputs[0].finish_reason == "error" and not output.num_cached_tokens


def test_a_workers_error_ends_that_request_alone(world):
    """The copy for the workers is gone between admission and the worker: an error by name, the others are answered."""
    llm, model, folder = world
    prompts = support.prompts(3, seed=13)
    support.save_edit(model, folder / "lost", support.edits(seed=31)["red"])
    engine, found = llm.llm_engine, {}
    engine.add_request("before", {"prompt_token_ids": prompts[0]}, support.params("red"))
    engine.add_request("lost", {"prompt_token_ids": prompts[1]}, support.params("lost"))
    engine.add_request("plain", {"prompt_token_ids": prompts[2]}, support.params())
    shutil.rmtree(folder / ".served")
    while engine.has_unfinished_requests():
        found |= {output.request_id: output.outputs[0] for output in engine.step() if output.finished}
    assert found["lost"].finish_reason == "error"
    assert found["lost"].stop_reason.startswith("fastedit: edit 'lost' at strength 1.0 could not be put in place in a worker")
    assert str(folder) not in found["lost"].stop_reason
    assert list(found["plain"].token_ids) == support.answers(model, None, prompts)[2]
    expected = support.answers(model, support.edits(seed=31)["red"], prompts)
    assert token_ids(finished(llm, [(prompts[1], "lost", 1.0)])) == [expected[1]]


def test_a_salt_that_a_client_wrote_reads_nothing(world):
    llm, model, _ = world
    prompt = support.prompts(1, 70, seed=14)[0]
    library = llm.llm_engine.input_processor.fastedit_library
    (digest, _), = library.plan([("red", 1.0)])
    assert token_ids(finished(llm, [(prompt, "red", 1.0)])) == support.answers(model, support.edits()["red"], [prompt])
    for salt in (f"fastedit:{digest}*1.0", digest, "fastedit:" + 64 * "0"):
        (output,) = llm.generate([{"prompt_token_ids": prompt, "cache_salt": salt}], support.params(), use_tqdm=False)
        assert output.num_cached_tokens == 0 and token_ids([output]) == support.answers(model, None, [prompt])
    first = llm.generate([{"prompt_token_ids": prompt, "cache_salt": "mine"}], support.params("red"), use_tqdm=False)
    again = llm.generate([{"prompt_token_ids": prompt, "cache_salt": "mine"}], support.params("red"), use_tqdm=False)
    assert (first[0].num_cached_tokens, again[0].num_cached_tokens) == (0, 64), "a client's own salt is kept apart, and holds"


def test_several_answers_of_one_request_are_under_its_edit(world):
    llm, model, _ = world
    prompt = support.prompts(1, seed=15)[0]
    (output,) = llm.generate([{"prompt_token_ids": prompt}], support.params("red", n=2, temperature=1.0, top_k=1), use_tqdm=False)
    expected = support.answers(model, support.edits()["red"], [prompt])[0]
    assert [list(one.token_ids) for one in output.outputs] == [expected, expected]


def test_nothing_is_left_of_what_failed(world):
    llm, _, _ = world
    for _ in range(2):
        finished(llm, [(support.prompts(1)[0], None, None)])
    bank = support.bank_of(llm)
    assert not bank.rows.wanted and not bank.residency.holders
    assert not bank.looks.names and not bank.looks.blocks and not bank.looks.last and not bank.looks.failed
