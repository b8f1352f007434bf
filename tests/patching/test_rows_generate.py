"""Where the prompt ends, whatever tells it: caches of every kind, none at all, loops by hand, a generate that is not seen."""

import pytest
import torch
import transformers
from row_models import SEQ2SEQ, VECTOR, Slow, build, check, generated, ids_of, last_layer, site_of, steered, where

import fastedit as fe

POSITIONS = ("generated", "first 2 + last 1")
FAMILIES = ("llama", "gpt2", "gemma3_text", "qwen3_5_text", "mamba", "recurrent_gemma", "t5", "bart")


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cached_and_an_uncached_run_edit_the_same_tokens(family, use_cache):
    for positions in POSITIONS:
        model, _, slow = steered(family, positions)
        ids = ids_of()
        start = ids_of(columns=3, seed=8)
        options = {"decoder_input_ids": start} if family == "bart" else {}
        sequences, logits = generated(model, ids, use_cache=use_cache, **options)
        columns = ids.shape[1] if family not in SEQ2SEQ else sequences.shape[1] - len(logits)
        check(slow, positions, sequences, logits, columns, **({"input_ids": ids} if family in SEQ2SEQ else {}))


MODES = {
    "static": {"cache_implementation": "static", "disable_compile": True},
    "chunked prefill": {"prefill_chunk_size": 2},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "qwen3_5_text"])
def test_kinds_of_caches(family, mode):
    for positions in ("generated", "first 1 + last 1"):
        model, _, slow = steered(family, positions)
        ids = ids_of(1)
        sequences, logits = generated(model, ids, **MODES[mode])
        check(slow, positions, sequences, logits, ids.shape[1])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_candidates_of_prompt_lookup(family):
    ids = ids_of(1)
    ids[:, 3:] = ids[:, :3]
    for positions in ("generated", "last 2"):
        model, _, slow = steered(family, positions)
        sequences, logits = generated(model, ids, prompt_lookup_num_tokens=2, max_matching_ngram_size=1)
        check(slow, positions, sequences, logits, ids.shape[1])


def test_an_assistant_that_is_the_model_itself():
    """Early exit drafts with the model's first layers: a `generate` within `generate`, on the same prompt."""
    for positions in ("generated", "last 2"):
        model, _, slow = steered("llama", positions)
        sequences, logits = generated(model, ids_of(1), assistant_early_exit=2)
        check(slow, positions, sequences, logits, 6)


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_an_encoder_under_generate_is_whole(family):
    """Patched in the whole model and by itself: the same tokens of what it encodes are edited."""
    said = []
    for inside in (False, True):
        model = build(family)
        edit = fe.Steer(VECTOR, site="block", layers=[0], positions="first 2")
        fe.patch(model.get_encoder() if inside else model, edit)
        said.append(torch.stack(generated(model, ids_of())[1]))
    assert torch.equal(*said)
    assert not torch.equal(said[0], torch.stack(generated(build(family), ids_of())[1]))


def _vision_language_model():
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
        projection_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=build("llama").config, image_token_index=59, image_seq_length=4,
        vision_feature_layer=-1,
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config).eval().double()
    model.generation_config.eos_token_id = None
    return model


def test_a_vision_language_model():
    """Patched whole its generate is known, with a cache and without; its language model alone is not told."""
    model, slow = _vision_language_model(), Slow(_vision_language_model())
    layer = last_layer(model).index
    handle = fe.patch(model, fe.Steer(VECTOR, site="block", layers=[layer], positions="generated"))
    ids = torch.tensor([[5, 59, 59, 59, 59, 7, 8]])
    image = {"pixel_values": torch.randn(1, 3, 8, 8, dtype=torch.double)}
    for use_cache in (True, False):
        sequences, logits = generated(model, ids, use_cache=use_cache, **image)
        check(slow, "generated", sequences, logits, 7, **image)
    handle.remove()
    fe.patch(model.model.language_model, fe.Steer(VECTOR, site="block", layers=[0], positions="generated"))
    with pytest.raises(RuntimeError, match=r"LlavaForConditionalGeneration\.generate knows, but LlamaModel.* is not told"):
        generated(model, ids, **image)


@pytest.mark.parametrize("order", ["whole", "base first", "inner"])
def test_an_adapter_around_the_model(order):
    peft = pytest.importorskip("peft")
    slow = steered("llama", "generated")[2]
    model, config = build("llama"), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2)
    edit = fe.Steer(VECTOR, site="block", layers=[3], positions="generated")
    if order == "base first":
        fe.patch(model, edit)
    adapted = peft.get_peft_model(model, config)
    if order != "base first":
        fe.patch(adapted if order == "whole" else adapted.base_model.model, edit)
    adapted.double().eval()
    for use_cache in (True, False):
        out = adapted.generate(
            input_ids=ids_of(), max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True,
            use_cache=use_cache,
        )  # fmt: skip
        check(slow, "generated", out.sequences, out.logits, 6)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_5_text", "t5"])
def test_beams(family, use_cache):
    """The score of the beam that wins is the slow model's of those tokens."""
    model, _, slow = steered(family, "generated")
    ids = ids_of(2)
    out = model.generate(
        ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, num_beams=3, return_dict_in_generate=True,
        output_scores=True, length_penalty=0.0, use_cache=use_cache,
    )  # fmt: skip
    columns = out.sequences.shape[1] - 4
    rows = where("generated", columns, out.sequences.shape[1]).expand(2, -1)
    given = {"input_ids": ids} if family in SEQ2SEQ else {}
    said = slow.logits(rows, out.sequences, **given).double().log_softmax(-1)
    steps = said[:, columns - 1 : -1].gather(-1, out.sequences[:, columns:, None]).sum((1, 2))
    torch.testing.assert_close(out.sequences_scores.double(), steps, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("new_ids", ["all", "only the new ones"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_generate_goes_on_from_a_cache(family, new_ids):
    model, _, slow = steered(family, "generated")
    ids = ids_of(1, 8)
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :5], cache=cache)
    options = {"attention_mask": torch.ones(1, 8, dtype=torch.long)}
    given = ids if new_ids == "all" else ids[:, 5:]
    sequences, logits = generated(model, given, cache=cache, **options)
    whole = sequences if new_ids == "all" else torch.cat([ids[:, :5], sequences], 1)
    check(slow, "generated", whole, logits, 8)


@pytest.mark.parametrize("family", ["llama", "mamba", "gpt2", "qwen3_5_text"])
def test_a_submodule_under_the_whole_models_generate(family):
    ids = ids_of()
    for use_cache in (True, False):
        for positions in ("last 1", "generated", "prompt"):
            model = build(family)
            inner = model.base_model
            edit = fe.Steer(VECTOR, site=site_of(model), layers=[last_layer(inner).index], positions=positions)
            handle = fe.patch(inner, edit)
            with pytest.raises(RuntimeError, match=r"generate knows, but .* is not told: patch the"):
                generated(model, ids, use_cache=use_cache)
            handle.remove()
    gate = fe.Gate(VECTOR, threshold=0.0, decide="prompt")
    fe.patch(inner, fe.Steer(VECTOR, site=site_of(model), layers=[0]).when(gate))
    with pytest.raises(RuntimeError, match=r"gate that decides once on the prompt .* is not told"):
        generated(model, ids)


def test_a_submodule_that_is_told():
    model, ids = build("llama"), ids_of()
    slow = steered("llama", "generated")[2]
    handle = fe.patch(model.model, fe.Steer(VECTOR, site="block", layers=[3], positions="generated"))
    handle.prompt(6)
    for use_cache in (True, False):
        sequences, logits = generated(model, ids, use_cache=use_cache)
        check(slow, "generated", sequences, logits, 6)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_5_text", "mamba"])
def test_a_loop_by_hand(family):
    """By position and by keyword; where the prompt ends is said, how full the cache is must be found."""
    model, handle, slow = steered(family, "generated")
    ids = ids_of(2, 9)
    rows = torch.zeros(2, 9)
    rows[:, 6:] = 1
    expected = slow.logits(rows, ids)[:, 6:]
    handle.prompt(6)
    with torch.no_grad():
        cache = model(ids[:, :6], use_cache=True).cache
        given = {"attention_mask": torch.ones(2, 9, dtype=torch.long)}
        if family == "mamba":  # whose cache has no length
            with pytest.raises(RuntimeError, match=r"holds a cache, a DynamicCache, that does not say how many"):
                model(ids[:, 6:7], cache=cache)
            return
        said = model(ids[:, 6:7], given["attention_mask"][:, :7], None, cache).logits
        torch.testing.assert_close(said[:, 0], expected[:, 0], rtol=1e-5, atol=1e-6)
        said = model(ids[:, 7:8], cache=cache).logits
        torch.testing.assert_close(said[:, 0], expected[:, 1], rtol=1e-5, atol=1e-6)


def test_what_disagrees_is_refused():
    model, handle, _ = steered("llama", "last 1")
    ids = ids_of(2, 4)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match=r"attention_mask has 7 columns, and no cache was found"):
            model(ids, attention_mask=torch.ones(2, 7))
        with pytest.raises(ValueError, match="neither continue by one nor begin again at 0"):
            model(ids, position_ids=torch.arange(3, 7)[None])
        cache = model(ids, use_cache=True).cache
        handle.prompt(4)
        with pytest.raises(RuntimeError, match="attention_mask has 3 columns, and the cache holds 4"):
            model(ids[:, :1], cache=cache, attention_mask=torch.ones(2, 3))


class _Unread:
    """A cache that says no length."""


class _Renamed(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, input_ids, whatever=None):
        return self.inner(input_ids, cache=whatever, use_cache=True)


def test_the_name_of_the_argument_does_not_matter():
    model = build("llama")
    slow_rows = torch.tensor([[0.0, 0, 0, 0, 1, 1]])
    _, _, slow = steered("llama", "generated")
    outer = _Renamed(model.model)
    handle = fe.patch(outer, fe.Steer(VECTOR, site="block", layers=[3], positions="generated"))
    ids = ids_of(1)
    with torch.no_grad():
        cache = outer(ids[:, :4]).cache
        handle.prompt(4)
        said = model.lm_head(outer(ids[:, 4:], cache).last_hidden_state)
    torch.testing.assert_close(said, slow.logits(slow_rows, ids)[:, 4:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name, cache", [("past_key_values", ((1, 2),)), ("kv", type("PagedAttentionCache", (), {})())])
def test_a_cache_that_cannot_be_read_is_no_empty_one(name, cache):
    from fastedit.patching.rows.cached import cache_in, length_of

    found, called = cache_in({"input_ids": torch.ones(1, 1), name: cache, "flag": True, "masks": {"full": None}})
    assert found is cache and called == name and length_of(found) is None
    assert cache_in({"input_ids": torch.ones(1, 1), "encoder_outputs": (1,), "use_cache": True}) == (None, None)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_another_ones_forward_within_generate_is_refused(family):
    """guidance_scale runs the model a second time in each step, on tokens of its own."""
    model, _, _ = steered(family, "last 1")
    with pytest.raises(RuntimeError, match="`generate` did not prepare this forward"):
        generated(model, ids_of(1), guidance_scale=2.0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_prompt_gates_with_and_without_a_cache(family):
    gate = fe.Gate(VECTOR, threshold=0.1, decide="prompt")
    said = []
    for use_cache in (True, False):
        model = steered(family, None, gate)[0]
        said.append(torch.stack(generated(model, ids_of(3), use_cache=use_cache)[1]))
    torch.testing.assert_close(said[0], said[1], rtol=1e-5, atol=1e-6)
