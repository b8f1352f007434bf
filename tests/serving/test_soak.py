"""Five hundred requests over sixty-four edits, more than there are slots, while edits come and go: nothing lost or crossed.

At length: SOAK_REQUESTS=2000 SOAK_EDITS=500 SOAK_FUZZED=10000.
"""

import os
import random
import shutil

import pytest

pytest.importorskip("vllm", reason="needs vllm: `make serving-test` sets it up")

import serving_support as support

import fastedit as fe

EDITS, REQUESTS, SLOTS = int(os.environ.get("SOAK_EDITS", 64)), int(os.environ.get("SOAK_REQUESTS", 500)), 12
FUZZED = int(os.environ.get("SOAK_FUZZED", 300))


def stack(number, version=0):
    """Edit `number`, each of another kind than its neighbours."""
    seed = 100 * version + number
    positions = (None, "generated", "first 2 + last 1", "prompt")[number // 4 % 4]
    made = {
        0: lambda: fe.ScaleBias(1 + support.random(2, 64, seed=seed), support.random(2, 64, seed=seed + 1), positions=positions),
        1: lambda: fe.Steer(support.random(2, 64, seed=seed), site="block", positions=positions),
        2: lambda: fe.Ablate(support.random(2, 64, seed=seed), site="attn", positions=positions),
        3: lambda: fe.Steer(support.random(2, 64, seed=seed), site="mlp", positions=positions),
    }  # fmt: skip
    return [made[number % 4]()]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(engine, model, folder of edits, prompts)"""
    base = tmp_path_factory.mktemp("soak")
    model = support.save_model("llama", base / "model")
    prompts = support.prompts(4, seed=3)
    for number in range(EDITS):
        support.save_edit(model, base / "edits" / f"edit-{number}", stack(number))
    # Few blocks, so that requests are preempted; few slots, so that edits are evicted and loaded again.
    llm = support.start(
        base / "model", base / "edits", max_num_seqs=SLOTS, num_gpu_blocks_override=20, max_num_batched_tokens=32,
        max_model_len=96,
    )  # fmt: skip
    return llm, model, base / "edits", prompts


def test_soak(world):
    llm, model, folder, prompts = world
    engine, versions, there = llm.llm_engine, dict.fromkeys(range(EDITS), 0), set(range(EDITS))
    asked, found, refused, sent = {}, {}, 0, 0
    while sent < REQUESTS or engine.has_unfinished_requests():
        for _ in range(min(7, REQUESTS - sent)):  # arrivals while the others run
            number = (sent * 29) % (EDITS + 3)
            number = None if number >= EDITS else number
            name = None if number is None else f"edit-{number}"
            try:
                engine.add_request(str(sent), {"prompt_token_ids": prompts[sent % 4]}, support.params(name))
                asked[str(sent)] = (number, 0 if number is None else versions[number], sent % 4)
            except ValueError:
                assert number not in there, f"{name} is there, and was refused"
                refused += 1
            sent += 1
        _change(model, folder, sent, versions, there)
        for output in engine.step():
            if output.finished:
                assert output.request_id not in found, "answered twice"
                found[output.request_id] = list(output.outputs[0].token_ids)
    assert asked.keys() == found.keys(), "requests were lost"
    expected = {
        (number, version): support.answers(model, None if number is None else stack(number, version), prompts)
        for number, version in {(number, version) for number, version, _ in asked.values()}
    }
    crossed = [key for key, (number, version, p) in asked.items() if found[key] != expected[number, version][p]]
    assert not crossed, f"{len(crossed)} of {len(asked)} answers are not their edit's"
    bank = support.bank_of(llm)
    assert refused and any(versions.values()) and bank.residency.loads > EDITS > bank.tables.capacity
    asked_of = {number for number, *_ in asked.values()}
    assert len(set(map(str, expected.values()))) > 0.9 * len(asked_of), "the edits must differ, else nothing could be crossed"


def _change(model, folder, sent, versions, there):
    """Now and then an edit is removed, another comes back, a third gets new contents under its name."""
    if sent % 3:
        return
    leaving, changing = sent * 7 % EDITS, sent * 5 % EDITS
    if leaving in there:
        shutil.rmtree(folder / f"edit-{leaving}")
        there.discard(leaving)
    else:
        support.save_edit(model, folder / f"edit-{leaving}", stack(leaving, versions[leaving]))
        there.add(leaving)
    if changing in there and not versions[changing]:
        support.save_edit(model, folder / f"edit-{changing}", stack(changing, 1))
        versions[changing] = 1


def test_preempted_requests_go_on_under_their_edit(world):
    """Twelve requests of 80 tokens in 20 blocks of 32: some are preempted, computed again, and end as if alone."""
    llm, model, folder, prompts = world
    preempted = 0
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    preempt = scheduler._preempt_request

    def counting(*args, **kwargs):
        nonlocal preempted
        preempted += 1
        return preempt(*args, **kwargs)

    scheduler._preempt_request = counting
    try:
        for number in (1, 2, 4):
            support.save_edit(model, folder / f"long-{number}", stack(number, 2))
        names = ["long-1", "long-2", "long-4"] * 4
        together = support.tokens(llm, [(prompts[0], name, None) for name in names], max_tokens=74)
        assert preempted, "nothing was preempted: nothing was tested"
        alone = {name: support.tokens(llm, [(prompts[0], name, None)], max_tokens=74)[0] for name in set(names)}
        assert together == [alone[name] for name in names] and len(set(map(str, alone.values()))) == 3
    finally:
        scheduler._preempt_request = preempt


def test_requests_of_any_content_are_served_or_refused(world):
    """Each is refused by vLLM's error for a bad request, or answered; those of neighbours are right, and the engine goes on."""
    from vllm.exceptions import VLLMValidationError  # of vLLM's own limits, too: integers that no message holds

    llm, model, folder, prompts = world
    for number in (1, 2):  # the soak may have taken them away
        support.save_edit(model, folder / f"edit-{number}", stack(number))
    engine, draw, refused, open_, found = llm.llm_engine, random.Random(0), 0, {}, {}
    sound = {name: support.answers(model, name and stack(int(name[-1])), prompts) for name in (None, "edit-1", "edit-2")}
    sent = 0
    while sent < FUZZED or engine.has_unfinished_requests():
        for _ in range(min(8, FUZZED - sent)):
            key, prompt = str(sent), draw.randrange(4)
            given = support.any_content(draw, "edit-1", "edit-2")
            if sent % 4 == 0:  # a neighbour
                given = draw.choice(({}, {"fastedit": "edit-1"}, {"fastedit": "edit-2"}))
            plain = sent % 4 == 0
            sent += 1
            try:
                engine.add_request(f"f{key}", {"prompt_token_ids": prompts[prompt]}, support.params(extra_args=given or None))
                open_[f"f{key}"] = (given.get("fastedit"), prompt) if plain else None
            except VLLMValidationError:
                assert not plain, given
                refused += 1
        for output in engine.step():
            if output.finished:
                found[output.request_id] = output.outputs[0]
    assert found.keys() == open_.keys(), "requests were lost"
    for request, known in open_.items():
        if known is not None:
            assert list(found[request].token_ids) == sound[known[0]][known[1]], request
        else:
            assert found[request].finish_reason in ("length", "error")
    assert refused > FUZZED / 4 and sum(known is None for known in open_.values()) > FUZZED / 50
