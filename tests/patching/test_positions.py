"""Edits at some positions, against a slow model that recomputes the whole sequence, without a cache, at each step."""

import copy

import pytest
import tiny_models as tiny
import torch
from patch_cases import random_form, scaled_then_low_rank
from position_cases import LAYERS, MASK, PAD, SPECS, Slow, check_steps, coefficients, generated, patched, prompts

import fastedit as fe
from fastedit.edits.positions import positions
from fastedit.patching.handle import handles


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_with_a_cache_and_left_padding(family, spec, fused):
    model, handle, slow = patched(family, spec, fused=fused)
    ids, mask = prompts()
    sequences, logits = generated(model, ids, mask)
    check_steps(slow, spec, sequences, logits, mask, 8)
    handle.remove()
    unedited = generated(model, ids, mask)[1]
    assert torch.equal(unedited[0], logits[0]) == (spec == "generated"), "the prompt's edits show at once"
    assert not torch.equal(unedited[-1], logits[-1])


MODES = {
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "chunked prefill": {"prefill_chunk_size": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 2, "max_matching_ngram_size": 1},
}


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_ways_of_generating(mode, spec):
    model, _, slow = patched("llama", spec)
    ids, mask = prompts()
    if mode == "prompt lookup":  # which takes one sequence
        ids, mask = ids[1:2], mask[1:2]
        ids[:, 4:] = ids[:, 3:7].clone()
        if spec == "mask":
            handles(model)[0].mask(MASK[:1])
    sequences, logits = generated(model, ids, mask, **MODES[mode])
    check_steps(slow, spec, sequences, logits, mask, 8)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_an_assistant_drafts(spec):
    model, _, slow = patched("llama", spec)
    assistant = tiny.exact(tiny.build("llama", num_hidden_layers=1))
    ids, mask = prompts()
    if spec == "mask":
        handles(model)[0].mask(MASK[:1])
    sequences, logits = generated(model, ids[:1], mask[:1], assistant_model=assistant)
    check_steps(slow, spec, sequences, logits, mask[:1], 8)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_beams_and_several_samples_share_their_prompt(spec):
    model, _, slow = patched("llama", spec)
    ids, mask = prompts()
    torch.manual_seed(1)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=True, num_return_sequences=2,
        output_logits=True, return_dict_in_generate=True, pad_token_id=PAD, top_k=20,
    )  # fmt: skip
    check_steps(slow, spec, out.sequences, out.logits, mask, 8, repeats=2)
    beams = model.generate(
        ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False, num_beams=3,
        num_return_sequences=1, return_dict_in_generate=True, output_scores=True, pad_token_id=PAD, length_penalty=0.0,
    )  # fmt: skip
    full = torch.cat([mask, torch.ones(3, 4, dtype=mask.dtype)], 1)
    said = slow.logits(spec, beams.sequences, full, 8).log_softmax(-1)
    steps = said[:, 7:-1].gather(-1, beams.sequences[:, 8:, None]).sum((1, 2))
    torch.testing.assert_close(beams.sequences_scores.double(), steps, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_bare_forward_is_all_prompt(spec, left):
    model, _, slow = patched("llama", spec)
    ids, mask = prompts(left)
    with torch.no_grad():
        said = model(input_ids=ids, attention_mask=mask).logits
    expected = slow.logits(spec, ids, mask, 8)
    torch.testing.assert_close(said[mask.bool()], expected[mask.bool()], rtol=1e-6, atol=1e-8)
    handles(model)[0].mask(MASK[:1])
    with torch.no_grad():
        said = model(ids[:1], torch.ones(1, 8)).logits  # by place, and without padding
        torch.testing.assert_close(said, slow.logits(spec, ids[:1], torch.ones(1, 8), 8), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("spec", [s for s in SPECS if s != "mask"], ids=str)
def test_an_encoder_pads_on_the_right(spec):
    model, _, slow = patched("bert", spec)
    ids, mask = prompts(left=False)
    with torch.no_grad():
        said = model(input_ids=ids, attention_mask=mask).logits
        slow.rows = coefficients(spec, ids, mask, 8)
        torch.testing.assert_close(said, slow.model(input_ids=ids, attention_mask=mask).logits, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("spec", ["prompt", "generated", "first 1", "last 1", {"tokens": [5, 9, 20]}], ids=str)
def test_a_decoder_behind_an_encoder(spec):
    model, _, slow = patched("t5", spec)
    ids, mask = prompts(left=False)
    start = torch.tensor([[0, 5, 9]] * 3)
    for options in ({}, {"decoder_input_ids": start}):
        sequences, logits = generated(model, ids, mask, **options)
        columns = 3 if options else 1
        for step, said in enumerate(logits):
            seen = sequences[:, : columns + step]
            slow.rows = coefficients(spec, seen, torch.ones_like(seen), columns)
            with torch.no_grad():
                expected = slow.model(input_ids=ids, attention_mask=mask, decoder_input_ids=seen, use_cache=False).logits
            torch.testing.assert_close(said.double(), expected[:, -1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("spec", [s for s in SPECS if not isinstance(s, dict)], ids=str)
def test_embeddings_instead_of_ids(spec):
    model, _, slow = patched("llama", spec)
    ids, mask = prompts()
    out = model.generate(
        inputs_embeds=model.model.embed_tokens(ids), attention_mask=mask, max_new_tokens=4, min_new_tokens=4,
        do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=PAD,
    )  # fmt: skip
    check_steps(slow, spec, torch.cat([ids, out.sequences], 1), out.logits, mask, 8)


def test_padding_is_inferred_as_generate_infers_it():
    model, _, slow = patched("llama", "first 2")
    ids, mask = prompts()
    sequences, logits = generated(model, ids, None)
    check_steps(slow, "first 2", sequences, logits, mask, 8)


@pytest.mark.parametrize("spec", ["prompt", "generated", "first 2", "last 3"])
def test_a_loop_by_hand_is_told_where_the_prompt_ends(spec):
    model, handle, slow = patched("llama", spec)
    ids, mask = prompts()
    more = torch.randint(3, 60, (3, 4), generator=torch.Generator().manual_seed(4))
    whole = torch.cat([ids, more], 1)
    full = torch.cat([mask, torch.ones(3, 4, dtype=mask.dtype)], 1)
    expected = slow.logits(spec, whole, full, 8)
    with torch.no_grad():
        cache = model(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values
        with pytest.raises(RuntimeError, match=r"handle\.prompt\(lengths\)"):
            model(input_ids=more, attention_mask=full, past_key_values=copy.deepcopy(cache))
        handle.prompt(mask.sum(1))
        said = model(input_ids=more, attention_mask=full, past_key_values=cache).logits
        torch.testing.assert_close(said, expected[:, 8:], rtol=1e-6, atol=1e-8)
        handle.prompt(5)
        everything = model(input_ids=whole[:1], use_cache=False).logits
        torch.testing.assert_close(everything, slow.logits(spec, whole[:1], full[:1], 5), rtol=1e-6, atol=1e-8)
        handle.prompt(None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [True, False])
def test_the_kernels_promise_holds_with_a_coefficient_a_row(dtype, fused):
    model = tiny.build("llama", dtype)
    ids, mask = prompts()
    form = random_form(seed=3)
    eager, exact = (Slow(m, "llama", form, ("mlp", "block")) for m in (model, tiny.exact(model)))
    eager.model.to(dtype)
    where = coefficients("first 1 + last 2", ids, mask, 8)
    eager.rows = exact.rows = where
    with torch.no_grad():
        given = {"input_ids": ids, "attention_mask": mask}
        said_eagerly, reference = eager.model(**given).logits, exact.model(**given).logits
        edits = [e for site in ("mlp", "block") for e in scaled_then_low_rank(form, site, LAYERS)]
        for edit in edits:
            edit.positions = positions("first 1 + last 2")
        handle = fe.patch(model, edits, fused=fused)
        handle.strength = 0.5
        handle.strength = 1.0
        tiny.assert_promise(model(**given).logits[mask.bool()], said_eagerly[mask.bool()], reference[mask.bool()])


@pytest.mark.parametrize("fused", [True, False])
def test_what_is_not_meant_keeps_its_bits(fused):
    model = tiny.build("llama", torch.bfloat16)
    ids, mask = prompts()
    before = tiny_hidden(model, ids, mask)
    with fe.patch(model, fe.Steer(torch.randn(32), positions="last 1"), fused=fused):
        after = tiny_hidden(model, ids, mask)
    for a, b in zip(before[1:], after[1:], strict=True):
        assert torch.equal(a[:, :-1], b[:, :-1]) and not torch.equal(a[:, -1], b[:, -1])
    with fe.patch(model, fe.Steer(torch.randn(32), positions="generated"), fused=fused):
        assert all(torch.equal(a, b) for a, b in zip(before, tiny_hidden(model, ids, mask), strict=True))


def tiny_hidden(model, ids, mask):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[:-1]
