"""The real engine on the CPU, offline: greedy tokens equal Hugging Face's under the same edit, whatever the batch."""

import shutil

import pytest

pytest.importorskip("vllm", reason="needs vllm: `make serving-test` sets it up")

import serving_support as support
import torch

import fastedit as fe

PROMPTS = support.prompts(3)
STRENGTHS = (1.0, 0.5)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    model = support.save_model("llama", folder)
    model.folder = folder
    return model


@pytest.fixture(scope="module")
def library(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("edits")
    support.save_edits(model, folder)
    return folder


@pytest.fixture(scope="module")
def expected(model):
    """{(name, strength, prompt's number): tokens}"""
    found = {}
    for name, stack in [(None, None), *support.edits().items()]:
        for strength in STRENGTHS:
            for number, answer in enumerate(support.answers(model, stack, PROMPTS, strength)):
                found[name, strength, number] = answer
    return found


@pytest.fixture(scope="module")
def llm(model, library):
    return support.start(model.folder, library, max_num_batched_tokens=24, fastedit={"rank": 4})


def test_mixed_batch(llm, expected):
    """More requests than fit, edits, positions and strengths mixed, prefills chunked: each gets its own answer."""
    keys = list(expected)
    asked = [(PROMPTS[number], name, None if name is None else strength) for name, strength, number in keys]
    assert support.tokens(llm, asked) == [expected[key] for key in keys]
    for name in support.edits():  # else nothing was tested
        assert any(expected[name, 1.0, n] != expected[None, 1.0, n] for n in range(len(PROMPTS))), name


def test_long_prompts_in_chunks(llm, model):
    """24 tokens a step: prompts of 40 and 57 come in chunks, among requests that decode."""
    for length in (40, 57):
        prompts = support.prompts(2, length, seed=length)
        for name in ("red", "ends"):
            found = support.tokens(llm, [(p, name, None) for p in prompts] + [(PROMPTS[0], None, None)])
            assert found[:2] == support.answers(model, support.edits()[name], prompts), (name, length)


def test_prefix_cache_is_an_edits_own(llm, model, library):
    """A long prompt answered under one edit, then another, none, another strength and new contents of one name."""
    prompts = support.prompts(1, 50, seed=7)
    edits = support.edits()
    for name, strength in (("red", 1.0), ("steer", 1.0), (None, 1.0), ("red", 0.5), ("red", 1.0), ("generated", 1.0)):
        found = support.tokens(llm, [(prompts[0], name, None if name is None else strength)])
        assert found == support.answers(model, edits.get(name), prompts, strength), (name, strength)
    other = support.edits(seed=50)["red"]
    support.save_edit(model, library / "changing", edits["red"])
    assert support.tokens(llm, [(prompts[0], "changing", None)]) == support.answers(model, edits["red"], prompts)
    support.save_edit(model, library / "changing", other)
    assert support.tokens(llm, [(prompts[0], "changing", None)]) == support.answers(model, other, prompts)


def test_cached_blocks_are_reused_under_the_same_edit(llm):
    prompt = support.prompts(1, 70, seed=8)[0]
    cached = []
    for name in ("steer", "steer", "red", None, "steer"):
        output = llm.generate([{"prompt_token_ids": prompt}], support.params(name), use_tqdm=False)[0]
        cached.append(output.num_cached_tokens)
    assert cached == [0, 64, 0, 0, 64]


def test_a_list_is_a_stack(llm, model):
    edits = support.edits()
    stack = [fe.Steer(support.random(support.LAYERS, support.WIDTH), site="block", strength=0.5)]
    expected = support.answers(model, edits["red"] + edits["low-rank"] + stack, PROMPTS)
    asked = [(p, ["red", "low-rank", "steer"], [1.0, 1.0, 0.5]) for p in PROMPTS]
    assert support.tokens(llm, asked) == expected
    with pytest.raises(ValueError, match="same tokens"):
        support.tokens(llm, [(PROMPTS[0], ["red", "generated"], None)])


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"fastedit": "nobody"}, "no edit 'nobody'"), ({"fastedit": "../red"}, "not a valid name"),
        ({"fastedit": ".served"}, "not a valid name"), ({"fastedit": 3}, "expected an edit's name"),
        ({"fastedit": "red", "fastedit_strength": "much"}, "finite number"),
        ({"fastedit": "red", "fastedit_strength": float("nan")}, "finite number"),
        ({"fastedit": ["red", "steer"], "fastedit_strength": [1.0]}, "1 numbers for 2 edits"),
        ({"fastedit_strength": 1.0}, "without 'fastedit'"), ({"fastedit_plan": [["0" * 64, 1.0]]}, "unknown argument"),
    ],
)  # fmt: skip
def test_refused_alone(llm, expected, extra, said):
    with pytest.raises(ValueError, match=said):
        llm.generate([{"prompt_token_ids": PROMPTS[0]}], support.params(extra_args=extra), use_tqdm=False)
    assert support.tokens(llm, [(PROMPTS[0], "red", None)]) == [expected["red", 1.0, 0]]


def test_what_is_not_served_is_refused(llm, model, library):
    direction = support.random(support.LAYERS, support.WIDTH)
    gate = fe.Gate(direction[0], threshold=0.1, decide="prompt")
    refused = {
        "prompt-gated": (fe.Steer(direction, site="block").when(gate), "decided on the prompt"),
        "kept": (fe.Steer(direction, site="block", keep_norm=True), "keep_norm"),
        "inside": (fe.Steer(direction, site="q"), "site 'q'"),
        "masked": (fe.Steer(direction, site="block", positions="mask"), "is on mask"),
        "large": (fe.LowRank(support.random(8, support.WIDTH), None, support.random(8, support.WIDTH), site="attn"), "rank 8"),
    }
    for name, (edit, said) in refused.items():
        with fe.patch(model, [edit]) as handle:
            handle.save(library / name)
        with pytest.raises(ValueError, match=said):
            support.tokens(llm, [(PROMPTS[0], name, None)])
        shutil.rmtree(library / name)


def test_removed_while_in_use(llm, model, library):
    """The requests that were let in end under the edit; the next is refused; the name can come back as another."""
    stack = support.edits(seed=9)["red"]
    support.save_edit(model, library / "gone", stack)
    engine = llm.llm_engine
    for number, prompt in enumerate(PROMPTS):
        engine.add_request(f"in-use-{number}", {"prompt_token_ids": prompt}, support.params("gone"))
    found = {}
    for step in range(40):
        if step == 2:
            shutil.rmtree(library / "gone")
            with pytest.raises(ValueError, match="no edit 'gone'"):
                engine.add_request("late", {"prompt_token_ids": PROMPTS[0]}, support.params("gone"))
        for output in engine.step():
            if output.finished:
                found[output.request_id] = list(output.outputs[0].token_ids)
    expected = support.answers(model, stack, PROMPTS)
    assert [found[f"in-use-{number}"] for number in range(len(PROMPTS))] == expected
    other = support.edits(seed=10)["steer"]
    support.save_edit(model, library / "gone", other)
    assert support.tokens(llm, [(p, "gone", None) for p in PROMPTS]) == support.answers(model, other, PROMPTS)


def test_nothing_is_kept_of_requests_that_ended(llm):
    support.tokens(llm, [(PROMPTS[0], "red", None)])
    support.tokens(llm, [(PROMPTS[0], None, None)])  # a step tells the worker who ended in the one before
    bank = support.bank_of(llm)
    assert len(bank.rows.wanted) == 0 and not bank.residency.holders
    assert bool((bank.rows.slot == -1).all()), "rows that nobody uses are left alone"


def test_an_unedited_request_keeps_its_bits():
    """Beside edited ones an unedited row is computed by the same expression: no edit, slot −1."""
    from fastedit import ops

    x, residual, weight = (support.random(*shape, seed=i) for i, shape in enumerate([(9, 64), (9, 64), (64,)]))
    slot = torch.full((9,), -1, dtype=torch.int32)
    slot[:4] = 0
    table = 1 + support.random(2, 64), support.random(2, 64)
    plain = ops.edit_add_norm(x, residual, weight)
    mixed = ops.edit_add_norm(x, residual, weight, *table, slot=slot, strength=torch.ones(9))
    for one, other in zip(plain, mixed, strict=True):
        assert torch.equal(one[4:], other[4:]) and not torch.equal(one[:4], other[:4])
