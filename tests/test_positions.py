"""Edits at some positions, against a slow model that recomputes the whole sequence, without a cache, at each step."""

import copy

import pytest
import tiny_models as tiny
import torch
from patch_cases import random_form, scaled_then_low_rank
from transformers import CompileConfig

import fastedit as fe
from fastedit.merging import MergeError
from fastedit.patching import handles
from fastedit.positions import Positions, positions

PAD = 0
SPECS = (
    "prompt", "generated", "first 2", "last 1", "last 3", "first 1 + last 2", "generated + first 1",
    {"tokens": [5, 9, 20]}, {"tokens": [7], "also": "last 2"}, "mask",
)  # fmt: skip
MASK = torch.tensor([[0, 0, 1, 0, 0.5, 1, 0, 1], [1, 1, 0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1, 1, -2]])
LAYERS = [0, 1]


def coefficients(spec, ids, mask, prompt_columns, repeats=1):
    """By the words of fastedit/positions.py, a token at a time: (sequences, columns)."""
    where = positions(spec)
    found = torch.zeros(ids.shape)
    for b, row in enumerate(ids.tolist()):
        real = [t for t in range(len(row)) if mask[b, t]]
        prompt = [t for t in real if t < prompt_columns]
        chosen = set(prompt[: where.first]) | set(prompt[len(prompt) - where.last :] if where.last else [])
        chosen |= set(prompt) if where.prompt else set()
        chosen |= set(real) - set(prompt) if where.generated else set()
        chosen |= {t for t, token in enumerate(row) if token in where.tokens}
        for t in range(len(row)):
            given = MASK[b // repeats, t].item() if where.mask and t < MASK.shape[1] else 0.0
            found[b, t] = max(1.0 if t in chosen else 0.0, given)
    return found


class Slow:
    """A model edited by plain hooks where `rows` (sequences, columns) says, without a cache."""

    def __init__(self, model, family, form, sites):
        self.model, self.rows = copy.deepcopy(model), None
        for site in sites:
            for layer in LAYERS if family != "t5" else [2, 3]:
                tiny.site_module(self.model, family, site, layer).register_forward_hook(self.hook(form))

    def hook(self, form):
        def edit(module, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            cast = type(form)(*(t.to(hidden) for t in form.tensors()))
            edited = hidden + self.rows[..., None].to(hidden) * (cast(hidden) - hidden)
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return edit

    def logits(self, spec, ids, mask, prompt_columns, repeats=1):
        self.rows = coefficients(spec, ids, mask, prompt_columns, repeats)
        given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        if self.model.config.model_type == "gpt2":  # as generate does it: by the real tokens
            given["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            return self.model(**given).logits


def prompts(left=True):
    """Three prompts of 8, 5 and 3 tokens, padded."""
    ids = torch.randint(3, tiny.VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(2))
    ids[:, 3], ids[1, 6] = 5, 9
    mask = torch.ones_like(ids)
    for row, short in ((1, 3), (2, 5)):
        span = slice(0, short) if left else slice(8 - short, 8)
        ids[row, span], mask[row, span] = PAD, 0
    return ids, mask


def generated(model, ids, mask, **options):
    """(sequences, [logits of each step])"""
    torch.manual_seed(0)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False, output_logits=True,
        return_dict_in_generate=True, pad_token_id=PAD, **options,
    )  # fmt: skip
    return out.sequences, out.logits


def check_steps(slow, spec, sequences, logits, mask, prompt_columns, repeats=1):
    """Each step's logits are those of the slow model on what was there then."""
    mask = mask.repeat_interleave(repeats, 0)
    for step, said in enumerate(logits):
        width = prompt_columns + step
        full = torch.cat([mask, torch.ones(len(mask), step, dtype=mask.dtype)], 1)
        expected = slow.logits(spec, sequences[:, :width], full, prompt_columns, repeats)[:, -1]
        torch.testing.assert_close(said.double(), expected, rtol=1e-6, atol=1e-8)


def patched(family, spec, sites=("mlp", "block"), fused=True, **changes):
    """(patched model, handle, slow model), in float64: what differs is where, not how precisely."""
    model = tiny.exact(tiny.build(family, **changes))
    form = random_form(seed=3)
    slow = Slow(model, family, form, sites)
    layers = LAYERS if family != "t5" else [2, 3]
    edits = [e for site in sites for e in scaled_then_low_rank(form, site, layers)]
    for edit in edits:
        edit.positions = positions(spec)
    handle = fe.patch(model, edits, fused=fused)
    if spec == "mask":
        handle.mask(MASK)
    return model, handle, slow


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


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "t5"])
def test_a_recomputation_has_its_own_forwards_plan(family, reentrant):
    """Two forwards with other prompts, then both backwards: the first one's rows must not be the second's."""
    grads = []
    for checkpointing in (False, True):
        model = tiny.exact(tiny.build(family)).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            for name in ("attention_dropout", "dropout_prob"):
                if hasattr(module, name):
                    setattr(module, name, 0.0)
        handle = fe.patch(model, [fe.RED(positions="first 2"), fe.ScaleBias(site="block", positions="last 1")])
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter.add_(0.1)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        losses = []
        for left in (True, False):
            ids, mask = prompts(left)
            given = {"input_ids": ids, "attention_mask": mask} | ({"decoder_input_ids": ids[:, 1:]} if family == "t5" else {})
            more = {"use_cache": False} if family != "bert" else {}
            losses.append(model(**given, **more).logits.square().sum())
        for loss in losses:
            loss.backward()
        grads.append([p.grad.clone() for p in handle.parameters()])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))


def test_a_layer_by_itself_is_refused():
    model = tiny.build("llama")
    fe.patch(model, fe.RED(positions="last 1"))
    with pytest.raises(RuntimeError, match=r"ran outside of LlamaModel\.forward"):
        model.model.layers[0](torch.randn(1, 3, 32), position_embeddings=(torch.ones(1, 3, 8), torch.zeros(1, 3, 8)))


def test_removal_and_other_handles():
    model = tiny.build("llama")
    before = tiny.state(model)
    everywhere = fe.patch(model, fe.RED())
    assert type(model.model).__dict__.get("_fastedit_base") is None, "swapped though no edit has positions"
    some = fe.patch(model, fe.Steer(torch.randn(32), positions="prompt"))
    ids, mask = prompts()
    copied = copy.deepcopy(model)
    assert torch.equal(generated(copied, ids, mask)[0], generated(model, ids, mask)[0])
    handles(copied)[1].remove()
    some.remove()
    assert type(model.model).__dict__.get("_fastedit_base") is None
    assert torch.equal(tiny.output(copied, "llama"), tiny.output(model, "llama"))
    everywhere.remove()
    tiny.assert_same_state(model, before)


def test_edits_at_other_positions_do_not_fold():
    model = tiny.build("llama")
    v, s = torch.randn(32), torch.rand(32) + 0.5
    form = fe.Form(scale=s)
    handle = fe.patch(model, [
        fe.ScaleBias(s, False, positions="last 1"), fe.Steer(v, site="mlp"), fe.Steer(v, site="mlp", positions="first 1"),
    ])  # fmt: skip
    slow = copy.deepcopy(model)
    handles(slow)[0].remove()

    def edit(module, args, output):
        rows = output.clone()
        rows[:, -1] = form(rows[:, -1])
        rows += v
        rows[:, 0] += v
        return rows

    for layer in slow.model.layers:
        layer.mlp.down_proj.register_forward_hook(edit)
    ids = prompts()[0][:1]
    torch.testing.assert_close(model(ids).logits, slow(ids).logits, rtol=1e-4, atol=1e-4)
    assert [str(e.positions) for e in handle.edits] == ["last 1", "None", "first 1"]


def test_saved_positions_come_back(tmp_path):
    model = tiny.build("llama")
    handle = fe.patch(model, [fe.RED(positions=spec) for spec in SPECS])
    said = handle.config()
    handle.save(tmp_path / "edit")
    handle.remove()
    assert fe.load(model, tmp_path / "edit").config() == said


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_strength_turns_without_a_new_trace(mode):
    model = tiny.build("llama")
    handle = fe.patch(model, [fe.Steer(torch.randn(32), positions="last 2"), fe.Ablate(torch.randn(32), positions="prompt")])
    ids, mask = prompts()
    call = model if mode == "eager" else torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    with torch.no_grad():
        call(**given)
        for strength in (0.3, 2.0, 0.0):
            handle.strength = strength
            with torch.compiler.set_stance("fail_on_recompile" if mode == "compiled" else "default"):
                said = call(**given).logits
            torch.testing.assert_close(said, model(**given).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", ["last 2", {"tokens": list(range(3, 14)), "also": "generated"}], ids=str)
def test_compiled_decoding_with_a_static_cache_is_one_graph(spec):
    model = tiny.build("llama")
    handle = fe.patch(model, fe.Steer(torch.randn(32), positions=spec))
    config = CompileConfig(fullgraph=True, backend="eager", mode="default")
    config._compile_all_devices = True
    ids, mask = prompts()
    eager = generated(model, ids, mask)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    static = generated(model, ids, mask, cache_implementation="static", compile_config=config)
    handle.strength = 2.0
    again = generated(model, ids, mask, cache_implementation="static", compile_config=config)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for said, expected in zip(static[1], eager[1], strict=True):
        torch.testing.assert_close(said, expected, rtol=1e-4, atol=1e-4)
    for said, expected in zip(again[1], generated(model, ids, mask)[1], strict=True):
        torch.testing.assert_close(said, expected, rtol=1e-4, atol=1e-4)


WRONG = [
    ("last", ValueError, "expected None or 'all'"), ("first 0", ValueError, "'first 0'"),
    ("first 2 + first 3", ValueError, "twice"),
    ("all + prompt", ValueError, "all of them"), (3, TypeError, "positions is 3"), ({"tokens": []}, ValueError, "positions is"),
    ({"tokens": [-1]}, ValueError, "whole numbers"), ({"token": [1]}, ValueError, "positions is"),
    ({"tokens": [1], "also": "all"}, ValueError, "all of them already"),
]  # fmt: skip


@pytest.mark.parametrize("spec, error, message", WRONG, ids=lambda v: str(v)[:20])
def test_wrong_positions(spec, error, message):
    with pytest.raises(error, match=message):
        fe.RED(positions=spec)


def test_wrong_lengths_masks_and_tokens():
    model = tiny.build("llama")
    handle = fe.patch(model, [fe.RED(positions="mask"), fe.Steer(torch.ones(32), positions={"tokens": [5]})])
    ids, _ = prompts()
    for lengths in (0, 1.5, [[1]], [0, 2], [True]):
        with pytest.raises(ValueError, match="lengths is"):
            handle.prompt(lengths)
    for mask in (torch.ones(3), torch.full((1, 3), torch.nan), torch.ones(2, 0)):
        with pytest.raises(ValueError, match="mask h"):
            handle.mask(mask)
    with pytest.raises(RuntimeError, match="no mask was given"):
        model(ids)
    handle.mask(torch.ones(2, 8))
    with pytest.raises(ValueError, match="2 rows, but this forward has 3"):
        model(ids)
    handle.mask(torch.ones(1, 8))
    with pytest.raises(ValueError, match="need input_ids"):
        model(inputs_embeds=model.model.embed_tokens(ids))
    with pytest.raises(MergeError, match="weights act on every token"):
        fe.patch(model, fe.RED(positions="last 1")).merge()


def test_the_words_are_the_parts():
    assert positions("first 4 + last 2") == Positions(first=4, last=2)
    assert positions("all") is None and positions("prompt + generated") is None
    for spec in SPECS:
        assert positions(positions(spec).spec()) == positions(spec)
