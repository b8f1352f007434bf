"""Whose request it is: tasks, threads, checkpoints and beams of models with a bank or tenants."""

import asyncio
import contextvars
import threading
import warnings

import pytest
import tiny_models as tiny
import torch
from bank_cases import bank_of, ids, red, three
from patch_cases import scrambled
from torch.utils.checkpoint import checkpoint

import fastedit as fe

FAMILIES = ("llama", "gpt2", "t5")


def build(family, **changes):
    return tiny.build(family, **changes, **({"dropout_rate": 0.0} if family == "t5" else {}))


def served(family, count=None, **options):
    count = count or tiny.number_of_layers(family)
    model = build(family, **({"num_hidden_layers": count} if family == "llama" else {}))
    return model, bank_of(model, {"anna": red(1, count=count), "ben": red(2, count=count)}, **options)


def tenants_of(family, count=tiny.LAYERS):
    model = build(family, **({"num_hidden_layers": count} if family == "llama" else {}))
    return model, scrambled(fe.patch(model, fe.RED(), tenants=2))


# a model with what assigns, and two owners that differ
FACES = {"bank": (served, ("anna", "ben")), "tenants": (tenants_of, (0, 1))}


def says(model, family, rows=2):
    given = tiny.inputs(family, batch=rows)
    with torch.no_grad():
        return model(**given).logits


def in_thread(call):
    """What a call says, or the error that it raises, in a thread started by hand."""
    found = []

    def run():
        try:
            found.append(call())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


# --- tasks and threads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_tasks_that_take_turns_have_their_own_assignment(family, face):
    make, owners = FACES[face]
    model, holder = make(family)
    expected = {}
    for owner in owners:
        with holder.assign([owner] * 2):
            expected[owner] = says(model, family)
    assert not torch.equal(*expected.values())

    async def request(owner):
        with holder.assign([owner] * 2):
            for _ in range(3):
                await asyncio.sleep(0)
                assert torch.equal(says(model, family), expected[owner])
                assert torch.equal(await asyncio.to_thread(says, model, family), expected[owner])

    async def serve():
        await asyncio.gather(*(request(owner) for owner in owners * 2))

    asyncio.run(serve())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_thread_started_under_an_assignment_is_not_answered_unedited(family):
    model, bank = served(family)
    unedited = says(model, family)
    with bank.assign(["anna"] * 2):
        expected = says(model, family)
        refused = in_thread(lambda: says(model, family))
        assert isinstance(refused, RuntimeError) and "from a context without an assignment" in str(refused)
        context = contextvars.copy_context()
        assert torch.equal(in_thread(lambda: context.run(says, model, family)), expected)

        def other():
            with bank.assign([None] * 2):
                return says(model, family)

        assert torch.equal(in_thread(other), unedited)
    assert torch.equal(in_thread(lambda: says(model, family)), unedited)
    late = in_thread(lambda: context.run(says, model, family))
    assert isinstance(late, RuntimeError) and "has ended" in str(late)


def test_an_option_makes_it_a_warning():
    model, bank = served("llama", unassigned="warn")
    unedited = says(model, "llama")
    with bank.assign(["anna"] * 2), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert torch.equal(in_thread(lambda: says(model, "llama")), unedited)
    assert any("from a context without an assignment" in str(w.message) for w in seen)
    with pytest.raises(ValueError, match="unassigned is 'ignore'"):
        fe.Bank(tiny.build("llama"), 2, unassigned="ignore")


def test_assignments_end_in_any_order_and_in_any_context():
    model, bank = served("llama")
    unedited = says(model, "llama")
    first, second = bank.assign(["anna"] * 2), bank.assign(["ben"] * 2)
    first.__enter__()
    outer = says(model, "llama")
    second.__enter__()
    inner = says(model, "llama")
    first.__exit__()
    assert torch.equal(says(model, "llama"), inner) and not torch.equal(inner, outer)
    in_thread(second.__exit__)
    with pytest.raises(RuntimeError, match="has ended"):
        says(model, "llama")
    with bank.assign(["anna"] * 2):
        assert torch.equal(says(model, "llama"), outer)
    assert bank.stats().in_use == 0 and torch.equal(in_thread(lambda: says(model, "llama")), unedited)


@pytest.mark.parametrize("face", FACES)
def test_a_compiled_forward_is_only_run_where_it_is_assigned(face):
    torch._dynamo.reset()
    make, owners = FACES[face]
    model, holder = make("llama", count=1)  # compilation takes its time
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for owner in owners[:1]:
        with holder.assign([owner] * 2):
            torch.testing.assert_close(says(compiled, "llama"), says(model, "llama"), rtol=1e-5, atol=1e-5)
            refused = in_thread(lambda: says(compiled, "llama"))
            assert isinstance(refused, RuntimeError) and "compiled forward from a context without" in str(refused)


# --- checkpoints --------------------------------------------------------------------------------------------------------


def loss_of(model, family):
    return model(**tiny.inputs(family), use_cache=False).logits.square().mean()


def embedding_gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return model.get_input_embeddings().weight.grad.clone()


def checkpointed(model, reentrant):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_recomputation_has_its_forward_s_assignment(family, face, reentrant):
    """In the backward's own context there is none, another one, or one in a thread that runs beside."""
    make, owners = FACES[face]
    model, holder = make(family)
    expected = {}
    for owner in owners:
        with holder.assign([owner] * 2):
            expected[owner] = embedding_gradient(model, loss_of(model, family))
    assert not torch.allclose(*expected.values(), rtol=1e-2)
    checkpointed(model, reentrant)
    with holder.assign([owners[0]] * 2):
        losses = [loss_of(model, family) for _ in range(3)]
    with holder.assign([owners[1]] * 2):
        for n in range(3):
            with holder.assign([owners[1]] * 2):  # what was assigned in between has memory and slots of its own
                found = embedding_gradient(model, losses[n]) if n < 2 else in_thread(
                    lambda: embedding_gradient(model, losses[2])
                )
            torch.testing.assert_close(found, expected[owners[0]], rtol=1e-4, atol=1e-6)


def test_what_a_checkpoint_holds_is_not_evicted():
    model = tiny.build("llama")
    bank = bank_of(model, {"anna": red(1), "ben": red(2), "cleo": red(3)}, capacity=1)
    with bank.assign(["anna"] * 2):
        expected = embedding_gradient(model, loss_of(model, "llama"))
    checkpointed(model, False)
    with bank.assign(["anna"] * 2):
        loss = loss_of(model, "llama")
    with pytest.raises(fe.BankFullError), bank.assign(["ben"] * 2):
        pass
    torch.testing.assert_close(embedding_gradient(model, loss), expected, rtol=1e-4, atol=1e-6)
    del loss
    with bank.assign(["ben"] * 2):
        pass
    assert bank.stats().in_use == 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_by_hand_is_computed_again_where_that_is_sure(reentrant):
    model, bank = served("llama")

    def loss():
        states = model.model.embed_tokens(ids(2)).detach().requires_grad_()
        rope = model.model.rotary_emb(states, torch.arange(7)[None])
        out = states
        for layer in model.model.layers:
            out = checkpoint(lambda h, layer=layer: layer(h, position_embeddings=rope), out, use_reentrant=reentrant)
        return states, out.square().mean()

    with bank.assign(["anna"] * 2):
        states, inside = loss()
        inside.backward()
        expected = states.grad
    with bank.assign(["ben"] * 2):
        states, inside = loss()
        inside.backward()
        assert not torch.allclose(states.grad, expected, rtol=1e-2)
    with bank.assign(["anna"] * 2):
        _, outside = loss()
    with pytest.raises(RuntimeError, match="different assignments"):
        outside.backward()
    with bank.assign(["anna"] * 2):
        states, again = loss()
        again.backward()
    torch.testing.assert_close(states.grad, expected)


# --- beams --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_one_name_for_two_sequences_is_refused_outside_of_beams(family):
    model = tiny.build(family)
    bank = bank_of(model, three(tiny.number_of_layers(family)))
    given = {k: v for k, v in tiny.inputs(family).items() if k != "decoder_input_ids"}
    how = {"max_new_tokens": 3, "pad_token_id": 0, "do_sample": False}
    for more in ({}, {"num_beams": 3}):
        with bank.assign(["anna"]), pytest.raises(ValueError, match="given 1 names, but the batch has"):
            model.generate(**given, **how, **more)
    with bank.assign(["anna"]), pytest.raises(ValueError, match="given 1 names, but the batch has 2"):
        says(model, family)
    with bank.assign(["anna", "ben"]):
        assert len(model.generate(**given, **how, num_beams=4, num_return_sequences=2)) == 4
        model.generation_config.num_beams = 3  # said by the model's own configuration
        assert len(model.generate(**given, **how)) == 2
    bank.close()
    assert "generate" not in type(model).__dict__ or type(model) is tiny.MODELS[family]
