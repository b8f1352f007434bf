"""The row plan belongs to a call: threads, tasks, continuous batching, layouts, and what a decode step costs."""

import asyncio
import contextlib
import pickle
import sys
import threading

import pytest
import torch
from row_models import VECTOR, build, generated, ids_of, last_layer, site_of, steered

import fastedit as fe
from fastedit.families import find_layers
from fastedit.patching.model_edits import root_of

FAMILIES = ("llama", "gpt2", "gemma3_text", "t5")


class _Stop:
    """Stops `generate` at its second step until another thread has done its part."""

    def __init__(self):
        self.steps, self.begun, self.go_on = 0, threading.Event(), threading.Event()

    def __call__(self, ids, scores):
        self.steps += 1
        if self.steps == 2:
            self.begun.set()
            assert self.go_on.wait(60)
        return scores


def beside(model, ids, work, **options):
    """(what `generate` gives while another thread stands in the middle of it; what work() gives there)"""
    stop, found = _Stop(), {}

    def run():
        found["generated"] = generated(model, ids, logits_processor=[stop], **options)

    thread = threading.Thread(target=run)
    thread.start()
    assert stop.begun.wait(60)
    try:
        found["work"] = work()
    finally:
        stop.go_on.set()
        thread.join()
    return found["generated"], found["work"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_beside_another_threads_generate_is_its_own(family):
    gate = fe.Gate(VECTOR, threshold=0.1, decide="prompt")
    for positions, rule in (("last 1", None), ("generated", None), (None, gate)):
        model, _, _ = steered(family, positions, rule)
        ids, other = ids_of(), ids_of(3, 4, seed=9)
        given = {"decoder_input_ids": other} if family == "t5" else {}
        alone = generated(model, ids)
        with torch.no_grad():
            expected = model(other, use_cache=False, **given).logits

            def forward(model=model, other=other, given=given):
                with torch.no_grad():
                    return model(other, use_cache=False, **given).logits

            found, said = beside(model, ids, forward)
        assert torch.equal(said, expected)
        assert torch.equal(found[0], alone[0]) and all(map(torch.equal, found[1], alone[1]))


@pytest.mark.parametrize("family", FAMILIES)
def test_two_threads_generate_at_once(family):
    """With positions, with a gate on the prompt and with a probe: each as if it were alone."""
    gate = fe.Gate(VECTOR, threshold=0.1, decide="prompt")
    for positions, rule in (("generated", None), ("first 2", gate)):
        model, _, _ = steered(family, positions, rule)
        probe = fe.patch(model, fe.Probe(VECTOR, site=site_of(model), layers=[last_layer(model).index]))
        ids, other = ids_of(2, 6), ids_of(3, 4, seed=9)
        alone, also = generated(model, ids), generated(model, other)
        read = probe.readings[0]
        first, (second, read_beside) = beside(model, ids, lambda m=model, o=other, p=probe: (generated(m, o), p.readings[0]))
        for one, expected in ((first, alone), (second, also)):
            assert torch.equal(one[0], expected[0]) and all(map(torch.equal, one[1], expected[1]))
        assert torch.equal(read_beside, read)


def test_what_was_told_belongs_to_the_thread_that_said_it():
    model, handle, slow = steered("llama", "generated")
    ids = ids_of()
    handle.prompt(2)
    rows = torch.tensor([[0.0, 0, 1, 1, 1, 1]] * 2)
    torch.testing.assert_close(model(ids, use_cache=False).logits, slow.logits(rows, ids), rtol=1e-5, atol=1e-6)
    found = []

    def elsewhere(tell):
        try:
            if tell:
                handle.prompt(4)
            found.append(model(ids, use_cache=False).logits)
        except RuntimeError as error:
            found.append(str(error))

    for tell in (False, True):
        thread = threading.Thread(target=elsewhere, args=(tell,))
        thread.start()
        thread.join()
    assert "handle.prompt(lengths) was called in another thread" in found[0]
    rows = torch.tensor([[0.0, 0, 0, 0, 1, 1]] * 2)
    torch.testing.assert_close(found[1], slow.logits(rows, ids), rtol=1e-5, atol=1e-6)
    handle.prompt(None)
    torch.testing.assert_close(model(ids, use_cache=False).logits, slow.logits(0 * rows, ids), rtol=1e-5, atol=1e-6)


def test_tasks_have_masks_of_their_own_and_a_cell_the_one_before():
    model, handle, slow = steered("llama", "mask")
    ids = ids_of(1)

    async def task(rows):
        handle.mask(rows)
        await asyncio.sleep(0)
        said = model(ids, use_cache=False).logits
        torch.testing.assert_close(said, slow.logits(rows, ids), rtol=1e-5, atol=1e-6)

    async def both():
        await asyncio.gather(task(torch.eye(6)[:1]), task(torch.eye(6)[3:4]))

    asyncio.run(both())

    async def cell(work):
        return work()

    rows = torch.eye(6)[2:3]
    asyncio.run(cell(lambda: handle.mask(rows)))  # a notebook runs each cell as a task of its own
    said = asyncio.run(cell(lambda: model(ids, use_cache=False).logits))
    torch.testing.assert_close(said, slow.logits(rows, ids), rtol=1e-5, atol=1e-6)
    copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(copied(ids, use_cache=False).logits, said)


def test_a_recomputation_has_what_was_told_then():
    model = build("llama")
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    red = fe.patch(model, fe.ScaleBias(site="block", layers=[1], positions="generated"))
    grads = []
    for lengths in ((4, 4), (4, 1)):
        red.prompt(lengths[0])
        loss = model(ids_of(), use_cache=False).logits.square().sum()
        red.prompt(lengths[1])
        loss.backward()
        grads.append([p.grad.clone() for p in red.parameters()])
        model.zero_grad()
    assert all(map(torch.equal, *grads))


BATCHED = {
    "generate_batch": lambda m: m.generate_batch([[5, 6, 7]], max_new_tokens=2),
    "the manager": lambda m: m.init_continuous_batching(),
    "its context": lambda m: m.continuous_batching_context_manager().__enter__(),
    "generate": lambda m: m.generate(ids_of(1), cache_implementation="paged", max_new_tokens=2),
}


@pytest.mark.parametrize("entry", BATCHED)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_continuous_batching_is_refused_where_it_is_called(family, entry):
    gate = fe.Gate(VECTOR, decide="prompt")
    edits = {
        "positions": {"edits": fe.Steer(VECTOR, site="block", layers=[0], positions="generated")},
        "gate": {"edits": fe.Steer(VECTOR, site="block", layers=[0]).when(gate)},
        "probe": {"edits": fe.Probe(VECTOR, site="block", layers=[0])},
        "tenants": {"edits": fe.ScaleBias(site="block", layers=[0]), "tenants": 2},
    }
    model = build(family)
    for given in edits.values() if entry == "generate_batch" else (edits["positions"],):
        with fe.patch(model, **given), pytest.raises(RuntimeError, match="pieces of many requests in one forward"):
            BATCHED[entry](model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_hidden_states_of_another_shape_are_refused(family):
    """What a site meets within a forward must have the forward's sequences and tokens, in that order."""
    model = build(family)
    last = len(find_layers(model)) - 1
    for edit in (
        {"edits": fe.Steer(VECTOR, site="block", layers=[0], positions="last 1")},
        {"edits": fe.Steer(VECTOR, site="block", layers=[0]).when(fe.Gate(VECTOR, decide="prompt"))},
        {"edits": fe.ScaleBias(site="block", layers=[0]), "tenants": 2},
    ):
        with fe.patch(model, **edit) as handle:
            (site,) = root_of(model).sites.values()
            for shape in ((6, 2, 32), (3, 2, 6, 32), (2, 7, 32)):
                later = root_of(model).layers[last].module.register_forward_hook(
                    lambda *_, s=site, n=shape: s.apply(torch.zeros(n, dtype=torch.double)) and None
                )
                said = rf"hidden states have shape \({shape[0]}, .* expected \(2, 6, 32\)"
                mine = handle.assign([0, 1]) if "tenants" in edit else contextlib.nullcontext()
                with pytest.raises(ValueError, match=said), mine:
                    model(ids_of(), use_cache=False)
                later.remove()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_a_known_layout_is_refused_at_patch_time(family, monkeypatch):
    model = build(family)
    layer = find_layers(model)[0]
    monkeypatch.setattr(type(layer), "layout", lambda self, site: "(tokens, batch, width)", raising=False)
    fe.patch(model, fe.Steer(VECTOR, site="block", layers=[0])).remove()
    with pytest.raises(ValueError, match=r"has hidden states that are \(tokens, batch, width\)"):
        fe.patch(model, fe.Steer(VECTOR, site="block", layers=[0], positions="last 1"))
    with pytest.raises(ValueError, match="tenants cannot tell"):
        fe.patch(model, fe.ScaleBias(site="block", layers=[0]), tenants=2)
    assert "fastedit" not in model._modules


# --- what it costs ---------------------------------------------------------------------------------------------------------


def python_calls(work):
    """How many Python functions work() calls."""
    count = 0

    def seen(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(seen)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def calls_a_step(model, ids):
    """Python calls of one decode step of `generate`: of twelve steps less those of four, over eight."""
    generated(model, ids, 12)
    many, few = (python_calls(lambda n=n: model.generate(ids, max_new_tokens=n, do_sample=False)) for n in (12, 4))
    return (many - few) / 8


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_python_calls_of_a_decode_step(family):
    """A plain edit adds only its own calls; positions add the long way, which holds no call ready, and a plan per step."""
    plain, red, placed = (build(family).float() for _ in range(3))
    everywhere = range(len(find_layers(plain)))
    fe.patch(red, fe.ScaleBias(site="block", layers=everywhere))
    fe.patch(placed, fe.Steer(VECTOR, site="block", layers=everywhere, positions="generated"))
    ids = ids_of(1)
    base, edited, positioned = (calls_a_step(model, ids) for model in (plain, red, placed))
    layers = len(everywhere)
    assert edited - base <= 4 + 40 * layers
    assert positioned - base <= 44 + 45 * layers  # the long way, and the plan of rows once a step
