"""Edits behind gates, against a slow model that recomputes the whole sequence, without a cache, at each step."""

import copy

import pytest
import tiny_models as tiny
import torch
from gate_cases import ATOL, LEAVES, PAD, check_steps, generated, mixed, patched, prompts

import fastedit as fe


@pytest.mark.parametrize("site", ["mlp", "block"])
@pytest.mark.parametrize("name", LEAVES)
def test_generation_with_a_cache_and_left_padding(name, site):
    model, handle, slow = patched("llama", name, (site,))
    ids, mask = prompts()
    sequences, logits = generated(model, ids, mask)
    check_steps(slow, sequences, logits, mask, 8)
    assert mixed(slow)
    handle.remove()
    assert not torch.equal(generated(model, ids, mask)[1][-1], logits[-1])


@pytest.mark.parametrize("family, fused", [("gpt2", True), ("gpt2", False), ("llama", False)])
@pytest.mark.parametrize("name", ["cosine", "soft cosine, prompt", "elsewhere or not here"])
def test_families_and_the_plain_path(family, fused, name):
    model, _, slow = patched(family, name, ("attn", "mlp", "block") if name == "cosine" else ("mlp",), fused)
    ids, mask = prompts()
    sequences, logits = generated(model, ids, mask)
    check_steps(slow, sequences, logits, mask, 8)


STATEFUL = ["cosine", "dot, prompt", "cosine, prompt mean", "elsewhere, prompt", "elsewhere or not here"]


@pytest.mark.parametrize("name", STATEFUL)
def test_a_static_cache(name):
    model, _, slow = patched("llama", name)
    ids, mask = prompts()
    sequences, logits = generated(model, ids, mask, cache_implementation="static", disable_compile=True)
    check_steps(slow, sequences, logits, mask, 8)


@pytest.mark.parametrize("name", STATEFUL)
def test_an_assistant_drafts(name):
    model, _, slow = patched("llama", name)
    assistant = tiny.exact(tiny.build("llama", num_hidden_layers=1))
    ids, mask = prompts()
    sequences, logits = generated(model, ids[1:2, 3:], mask[1:2, 3:], assistant_model=assistant)
    check_steps(slow, sequences, logits, mask[1:2, 3:], 5)


@pytest.mark.parametrize("name", STATEFUL)
def test_beams_and_several_samples_share_their_prompts_decision(name):
    model, _, slow = patched("llama", name)
    ids, mask = prompts()
    torch.manual_seed(1)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=True, num_return_sequences=2,
        output_logits=True, return_dict_in_generate=True, pad_token_id=PAD, top_k=20,
    )  # fmt: skip
    check_steps(slow, out.sequences, out.logits, mask, 8, repeats=2)
    beams = model.generate(
        ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False, num_beams=3,
        return_dict_in_generate=True, output_scores=True, pad_token_id=PAD, length_penalty=0.0,
    )  # fmt: skip
    full = torch.cat([mask, torch.ones(len(mask), 4, dtype=mask.dtype)], 1)
    with torch.no_grad():
        likely = slow.logits(beams.sequences, full, 8).log_softmax(-1)
    steps = likely[:, 7:-1].gather(-1, beams.sequences[:, 8:, None]).sum((1, 2))
    torch.testing.assert_close(beams.sequences_scores.double(), steps, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("name", LEAVES)
def test_a_bare_forward_is_all_prompt_and_each_decides_anew(name, left):
    model, _, slow = patched("llama", name)
    ids, mask = prompts(left)
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        given = {"input_ids": ids[order], "attention_mask": mask[order]}
        with torch.no_grad():
            got, expected = model(**given).logits, slow.logits(ids[order], mask[order], 8)
        real = mask[order].bool()
        torch.testing.assert_close(got[real], expected[real], rtol=1e-6, atol=ATOL)


@pytest.mark.parametrize("name", ["cosine", "dot, prompt", "cosine, prompt mean", "elsewhere, prompt"])
def test_an_encoder(name):
    model, _, slow = patched("bert", name, ("mlp",))
    ids, mask = prompts(left=False)
    with torch.no_grad():
        got, expected = model(input_ids=ids, attention_mask=mask).logits, slow.logits(ids, mask, 8)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=ATOL)


def test_a_decoder_behind_an_encoder_decides_on_its_own_prompt():
    model, _, slow = patched("t5", "soft cosine, prompt", ("block",))
    ids, mask = prompts(left=False)
    start = torch.tensor([[0, 5, 9], [0, 8, 8], [0, 7, 30], [0, 20, 21]])
    out = model.generate(
        ids, attention_mask=mask, decoder_input_ids=start, max_new_tokens=4, min_new_tokens=4, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    for step, got in enumerate(out.logits):
        seen = out.sequences[:, : 3 + step]
        slow.mask, slow.prompt_columns, slow.rows = torch.ones_like(seen), 3, 1.0
        with torch.no_grad():
            expected = slow.model(input_ids=ids, attention_mask=mask, decoder_input_ids=seen, use_cache=False).logits
        torch.testing.assert_close(got.double(), expected[:, -1], rtol=1e-6, atol=ATOL)


@pytest.mark.parametrize("name", ["dot", "dot, prompt", "elsewhere, prompt"])
def test_positions_multiply_and_the_prompt_decides_even_where_it_is_not_edited(name):
    model, _, slow = patched("llama", name, where=fe.edits.kinds.as_positions("generated"))
    ids, mask = prompts()
    sequences, logits = generated(model, ids, mask)
    check_steps(slow, sequences, logits, mask, 8, rows=lambda full: (torch.arange(full.shape[1]) >= 8).double())


@pytest.mark.parametrize("name", ["dot, prompt", "cosine, prompt mean", "elsewhere, prompt"])
def test_a_loop_by_hand_keeps_each_caches_decision(name):
    model, _, slow = patched("llama", name)
    ids, mask = prompts()
    order = [2, 0, 3, 1]
    more = torch.randint(3, 60, (4, 3), generator=torch.Generator().manual_seed(4))
    full = torch.cat([mask, torch.ones(4, 3, dtype=mask.dtype)], 1)
    with torch.no_grad():
        first = model(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values
        second = model(input_ids=ids[order], attention_mask=mask[order], use_cache=True).past_key_values
        for chosen, cache in (([0, 1, 2, 3], first), (order, second)):
            expected = slow.logits(torch.cat([ids[chosen], more], 1), full[chosen], 8)[:, 8:]
            for t in range(3):
                got = model(
                    input_ids=more[:, t : t + 1], attention_mask=full[chosen, : 9 + t], past_key_values=cache
                ).logits  # fmt: skip
                torch.testing.assert_close(got[:, 0], expected[:, t], rtol=1e-6, atol=ATOL)
        with pytest.raises(RuntimeError, match="has not seen this cache's prompt"):
            model(input_ids=more, attention_mask=full, past_key_values=copy.deepcopy(first))


def test_a_static_cache_by_hand():
    from transformers import StaticCache

    model, _, slow = patched("llama", "cosine, prompt mean")
    ids, mask = prompts()
    more = torch.randint(3, 60, (4, 3), generator=torch.Generator().manual_seed(4))
    for chosen in ([0, 1, 2, 3], [2, 0, 3, 1]):
        cache = StaticCache(config=model.config, max_cache_len=16)
        full = torch.cat([mask, torch.ones(4, 3, dtype=mask.dtype)], 1)[chosen]
        with torch.no_grad():
            expected = slow.logits(torch.cat([ids[chosen], more], 1), full, 8)
            for start, end, tokens in ((0, 8, ids[chosen]), (8, 9, more[:, :1]), (9, 11, more[:, 1:])):
                got = model(input_ids=tokens, attention_mask=full[:, :end], past_key_values=cache).logits
                real = full[:, start:end].bool()
                torch.testing.assert_close(got[real], expected[:, start:end][real], rtol=1e-6, atol=ATOL)


def test_chunked_prefill_comes_too_late_for_a_decision():
    model, _, slow = patched("llama", "dot, prompt")
    ids, mask = prompts()
    with pytest.raises(RuntimeError, match="ends before the prompt does"):
        generated(model, ids, mask, prefill_chunk_size=3)
    sequences, logits = generated(model, ids, mask, prefill_chunk_size=8)
    check_steps(slow, sequences, logits, mask, 8)
    model, _, slow = patched("llama", "cosine")
    sequences, logits = generated(model, ids, mask, prefill_chunk_size=3)
    check_steps(slow, sequences, logits, mask, 8)
