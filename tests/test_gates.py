"""Edits behind gates, against a slow model that recomputes the whole sequence, without a cache, at each step."""

import copy

import pytest
import tiny_models as tiny
import torch
from gate_cases import ATOL, LEAVES, PAD, Slow, check_steps, gate, generated, prompts, said, vector
from patch_cases import random_form, scaled_then_low_rank
from transformers import CompileConfig

import fastedit as fe
from fastedit.gates import rule_of
from fastedit.gating import Sensor
from fastedit.merging import MergeError
from fastedit.patching import handles
from fastedit.per_layer import Spot

LAYERS = [1, 2]


def patched(family, name, sites=("block",), fused=True, keep_norm=False, where=None, **changes):
    """(patched model, handle, slow model), in float64: what differs is where, not how precisely.

    The gate of each of the site's two edits looks at what the edit is given.
    """
    model = tiny.exact(tiny.build(family, **changes))
    form, layers = random_form(seed=3), LAYERS if family != "t5" else [2, 3]
    edits = [e for site in sites for e in scaled_then_low_rank(form, site, layers)]
    read = form.read / form.scale
    parts = [
        fe.Form(scale=form.scale, bias=form.bias),
        fe.Form(read=read, offset=form.offset - read @ form.bias, write=form.write),
    ]
    slow = Slow(
        model, family, name, [(s, at, part) for s in sites for part in parts for at in layers], keep_norm
    )
    gated = [e.when(gate(name)) for e in edits]
    for edit in gated:
        edit.keep_norm = keep_norm
        edit.positions = where
    return model, fe.patch(model, gated, fused=fused), slow


def mixed(slow):
    """Whether the gates told rows apart: else a test of them would show nothing."""
    k = torch.cat([c.flatten() for c in slow.coefficients])
    return bool((k > 0.6).any() and (k < 0.4).any())


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
    model, _, slow = patched("llama", name, where=fe.edits.as_positions("generated"))
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


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["soft dot", "soft cosine, prompt", "cosine, prompt mean", "cast", "elsewhere or not here"])
def test_gradients_flow_through_soft_gates(name, fused):
    model, _handle, slow = patched("llama", name, ("mlp", "block") if fused else ("block",), fused)
    if name == "elsewhere or not here":
        model, _handle, slow = patched("llama", name, ("block",), fused)
    ids, mask = prompts()
    weight = torch.randn(4, 8, tiny.VOCABULARY, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weight = weight * mask[..., None]
    (model(input_ids=ids, attention_mask=mask, use_cache=False).logits * weight).sum().backward()
    (slow.logits(ids, mask, 8) * weight).sum().backward()
    pairs = list(zip(model.model.layers[0].parameters(), slow.model.model.layers[0].parameters(), strict=True))
    for mine, theirs in pairs:
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=1e-7 * float(theirs.grad.abs().max()))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["soft cosine, prompt", "elsewhere, prompt"])
def test_checkpointing(name, reentrant):
    grads = []
    for checkpointing in (False, True):
        model, _, _ = patched("llama", name)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        losses = []
        for left in (True, False):
            ids, mask = prompts(left)
            losses.append(model(input_ids=ids, attention_mask=mask, use_cache=False).logits.square().sum())
        if checkpointing and reentrant and name == "elsewhere, prompt":
            with pytest.raises(RuntimeError, match="does not cross a reentrant checkpoint"):
                losses[0].backward()
            return
        for loss in losses:
            loss.backward()
        grads.append([p.grad.clone() for p in model.model.layers.parameters()])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-9, atol=1e-9 * float(plain.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [True, False])
def test_the_kernels_promise_holds_behind_a_gate(dtype, fused):
    """With gates that no rounding can flip: of the same rows in the slow models, eager and exact."""
    model = tiny.build("llama", dtype)
    ids, mask = prompts()
    form = random_form(seed=3)
    name, edits = "dot, prompt", [(site, layer, form) for site in ("mlp", "block") for layer in LAYERS]
    eager, exact = (Slow(m, "llama", name, edits) for m in (model, tiny.exact(model)))
    eager.model.to(dtype)
    with torch.no_grad():
        eagerly, reference = eager.logits(ids, mask, 8), exact.logits(ids, mask, 8)
        assert all(torch.equal(a.double(), b) for a, b in zip(eager.coefficients, exact.coefficients, strict=True))
        low_rank = [fe.Form(*form.tensors())]
        fe.patch(model, [_Whole(low_rank[0], site=s, layers=LAYERS).when(gate(name)) for s in ("mlp", "block")], fused=fused)
        got = model(input_ids=ids, attention_mask=mask).logits
    tiny.assert_promise(got[mask.bool()], eagerly[mask.bool()], reference[mask.bool()])


class _Whole(fe.Edit):
    """A form with all its parts as one edit, so that both models apply it in one step."""

    def __init__(self, form, **where):
        self.whole = form
        super().__init__(("scale", "bias", "read", "offset", "write"), rank=form.rank, **where)

    def values(self, spot, width):
        return dict(zip(self.names, self.whole.tensors(), strict=True))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("site", ["mlp", "block"])
def test_rows_behind_a_closed_gate_keep_their_bits(site, fused):
    model = tiny.build("llama", torch.bfloat16)
    ids, mask = prompts()
    before = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    for keep_norm in (False, True):
        shut = fe.Steer(vector(1), site=site, keep_norm=keep_norm).when(fe.Gate(vector(2), threshold=1e9))
        with fe.patch(model, shut, fused=fused):
            after = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    one = fe.Steer(vector(1), site=site, layers=0).when(fe.Gate(vector(2), kind="cosine", decide="prompt"))
    with fe.patch(model, one, fused=fused):
        after = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    same = [bool(torch.equal(a[m], b[m])) for a, b, m in zip(before[1], after[1], mask.bool(), strict=True)]
    assert any(same) and not all(same)


@pytest.mark.parametrize("sites", [("mlp",), ("block",), ("attn", "mlp", "block")])
@pytest.mark.parametrize("name", ["dot", "soft cosine, prompt"])
def test_keep_norm(name, sites):
    model, handle, slow = patched("llama", name, sites, keep_norm=True)
    ids, mask = prompts()
    sequences, logits = generated(model, ids, mask)
    check_steps(slow, sequences, logits, mask, 8)
    assert all(row["path"] == "plain: keep_norm rescales each row after the edit" for row in handle.report().rows)


def test_keep_norm_without_a_gate_keeps_the_norm_and_the_direction_of_the_edit():
    model = tiny.build("llama")
    seen = {}
    layer = model.model.layers[1].mlp.down_proj
    ids, _mask = prompts()
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda m, a, out: seen.update(plain=out))
    with torch.no_grad():
        model(ids)
        handle = fe.patch(model, fe.Steer(vector(1), site="mlp", layers=1, keep_norm=True))
        x = layer(torch.ones(2, 48))
    handle.remove()
    with torch.no_grad():
        plain = layer(torch.ones(2, 48))
    expected = plain + vector(1)
    expected = expected * plain.norm(dim=-1, keepdim=True) / expected.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_strength_turns_without_a_new_trace(mode):
    model = tiny.build("llama")
    rule = gate("elsewhere or not here")
    handle = fe.patch(model, [fe.Steer(vector(8)).when(rule), fe.Ablate(vector(9), keep_norm=True).when(gate("cast"))])
    ids, mask = prompts()
    call = model if mode == "eager" else torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    with torch.no_grad():
        call(**given)
        seen = []
        for strength in (0.3, 2.0, 0.0):
            handle.strength = strength
            with torch.compiler.set_stance("fail_on_recompile" if mode == "compiled" else "default"):
                got = call(**given).logits
            torch.testing.assert_close(got, model(**given).logits, rtol=1e-4, atol=1e-4)
            seen.append(got)
    handle.remove()
    torch.testing.assert_close(seen[-1][mask.bool()], model(**given).logits[mask.bool()], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(seen[0], seen[1], atol=1e-3)


@pytest.mark.parametrize("name", ["cosine", "soft cosine, prompt", "elsewhere or not here"])
def test_compiled_decoding_with_a_static_cache_is_one_graph(name):
    model = tiny.build("llama")
    handle = fe.patch(model, fe.Steer(vector(8), layers=[1, 2]).when(gate(name)))
    config = CompileConfig(fullgraph=True, backend="eager", mode="default")
    config._compile_all_devices = True
    ids, mask = prompts()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for order, strength in (([0, 1, 2, 3], 1.0), ([2, 0, 3, 1], 1.0), ([2, 0, 3, 1], 2.0)):
        handle.strength = strength
        eager = generated(model, ids[order], mask[order])
        static = generated(model, ids[order], mask[order], cache_implementation="static", compile_config=config)
        for got, expected in zip(static[1], eager[1], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_decisions_stay_where_they_are_for_a_captured_graph():
    model = tiny.build("llama")
    fe.patch(model, fe.Steer(vector(8)).when(gate("soft cosine, prompt")))
    ids, mask = prompts()
    generated(model, ids, mask)
    sensors = [module for module in model.fastedit.modules() if isinstance(module, Sensor)]
    before = [(sensor.kept.data_ptr(), sensor.kept.clone()) for sensor in sensors]
    generated(model, ids.flip(0), mask.flip(0))
    for sensor, (address, value) in zip(sensors, before, strict=True):
        assert sensor.kept.data_ptr() == address and not torch.equal(sensor.kept, value)


@pytest.mark.parametrize("name", LEAVES)
def test_saved_gates_come_back(name, tmp_path):
    model, handle, _ = patched("llama", name, keep_norm=name == "cast")
    ids, mask = prompts()
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits
    handle.save(tmp_path / "edit")
    config = handle.config()
    state = tiny.state(model)["bits"]
    handle.remove()
    again = fe.load(model, tmp_path / "edit")
    assert again.config() == config and list(model.state_dict()) == list(state)
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)
    assert str(rule_of(gate(name).spec())) == str(gate(name))


def test_removal_copies_and_pickles():
    model = tiny.build("llama")
    before = tiny.state(model)
    first = fe.patch(model, fe.Steer(vector(1), layers=[2]).when(gate("elsewhere, prompt")))
    second = fe.patch(model, fe.RED())
    ids, mask = prompts()
    copied = copy.deepcopy(model)
    assert torch.equal(generated(copied, ids, mask)[0], generated(model, ids, mask)[0])
    handles(copied)[0].remove()
    first.remove()
    assert not model.fastedit.stacks and "layers.0" in model.fastedit.installed
    assert torch.equal(tiny.output(copied, "llama"), tiny.output(model, "llama"))
    second.remove()
    tiny.assert_same_state(model, before)


def test_the_model_may_become_bf16_but_not_the_gate():
    model, handle, _ = patched("llama", "elsewhere or not here")
    model.to(torch.bfloat16)
    assert {t.dtype for t in handle.named_tensors().values()} == {torch.float32}
    ids, mask = prompts()
    model(input_ids=ids, attention_mask=mask)


def test_inferaligners_gate():
    """g_l once per prompt at its last token: 1 if x · s_l + b_l > 0, at the layer of the edit (arXiv 2401.11206)."""
    model = tiny.exact(tiny.build("llama"))
    s, b = torch.stack([vector(n) for n in (11, 12, 13)]), [0.4, -0.6, 0.1]
    ids, mask = prompts()
    slow = copy.deepcopy(model)
    decided = []

    def hook(number):
        def edit(module, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            g = (hidden[:, -1] @ s[number].double() + b[number] > 0).double()
            decided.append(g)
            return hidden + 0.5 * g[:, None, None] * vector(8).double()

        return edit

    for number, layer in enumerate(slow.model.layers):
        layer.register_forward_hook(hook(number))
    gate = fe.Gate(s, threshold=[-x for x in b], kind="dot", decide="prompt")
    fe.patch(model, fe.Steer(vector(8), strength=0.5).when(gate))
    with torch.no_grad():
        given = {"input_ids": ids, "attention_mask": mask}
        torch.testing.assert_close(model(**given).logits, slow(**given).logits, rtol=1e-6, atol=ATOL)
    assert 0 < sum(float(g.sum()) for g in decided) < 12


def test_gates_do_not_merge_and_do_not_fold():
    model = tiny.build("llama")
    with fe.patch(model, [fe.Steer(vector(1), site="mlp").when(gate("dot")), fe.Steer(vector(2), site="mlp")]) as handle:
        assert [len(site.stages) for site in model.fastedit.sites.values()] == [2, 2, 2]
        with pytest.raises(MergeError, match="a gated edit on some"):
            handle.merge()
    normed = fe.Steer(vector(1), site="mlp", keep_norm=True)
    with fe.patch(model, normed) as handle, pytest.raises(MergeError, match="norm of each row"):
        handle.merge()
    watching = fe.patch(model, fe.Steer(vector(1), layers=2).when(fe.Gate(vector(2), layer=0, site="mlp")))
    with fe.patch(model, fe.Steer(vector(1), site="mlp")) as handle, pytest.raises(MergeError, match="gates come first"):
        handle.merge()
    watching.remove()


def test_a_gate_twice_is_both():
    a, b = fe.Gate(vector(1)), fe.Gate(vector(2))
    assert fe.Steer(vector(3)).when(a).when(b).gate.spec() == (a & b).spec()
    plain = fe.Steer(vector(3))
    assert plain.when(a) is not plain and plain.gate is None


WRONG = [
    (lambda: fe.Gate(vector(1), kind="angle"), ValueError, "kind is 'angle', expected one of 'dot', 'cosine', 'cast'"),
    (lambda: fe.Gate(vector(1), decide="once"), ValueError, "decide is 'once'"),
    (lambda: fe.Gate(vector(1), sharpness=0), ValueError, "sharpness is 0"),
    (lambda: fe.Gate(vector(1), threshold="high"), ValueError, "threshold is 'high'"),
    (lambda: fe.Gate(vector(1), threshold=float("nan")), ValueError, "threshold is nan"),
    (lambda: fe.Gate(vector(1), threshold=[]), ValueError, "threshold is empty"),
    (lambda: fe.Gate(torch.zeros(32), kind="cosine"), ValueError, "all zero"),
    (lambda: fe.Gate(torch.ones(2, 3, 32)), ValueError, "condition has shape"),
    (lambda: fe.Gate(vector(1), layer=True), TypeError, "layer is True"),
    (lambda: fe.Gate(vector(1), site="mlp"), ValueError, "site is given without layer"),
    (lambda: fe.Gate(vector(1), layer=1, site="nowhere"), ValueError, "there is no site 'nowhere'"),
    (lambda: fe.Steer(vector(1)).when(0.5), TypeError, "found float"),
    (lambda: fe.Gate(vector(1)) & 1, TypeError, "found int"),
    (lambda: fe.Steer(vector(1), keep_norm=1), TypeError, "keep_norm is 1"),
    (lambda: rule_of({"xor": []}), ValueError, "unknown key 'xor'"),
    (lambda: rule_of({"and": [{"kind": "dot"}]}), ValueError, "two gates"),
    (lambda: rule_of({"kind": "angle"}), ValueError, "kind is 'angle'"),
    (lambda: rule_of([]), ValueError, "expected an object"),
]


@pytest.mark.parametrize("make, error, message", WRONG)
def test_wrong_gates(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("where, message", [
    ({"layer": 2}, "comes after site 'block' of layer layers.1"), ({"layer": 9}, "there is no layer 9"),
    ({"layer": "layers"}, "names 3"), ({}, "the gate's condition has width 31"),
    ({"layer": 0}, "the gate's condition has width 31"),
])  # fmt: skip
def test_gates_that_do_not_fit_change_nothing(where, message):
    model = tiny.build("llama")
    before = tiny.state(model)
    condition = vector(1, 31) if "31" in message else vector(1)
    with pytest.raises(ValueError, match=message):
        fe.patch(model, fe.Steer(vector(1), layers=[1, 2]).when(fe.Gate(condition, **where)))
    tiny.assert_same_state(model, before)


def test_a_later_site_of_the_same_layer_and_another_stack_are_refused():
    with pytest.raises(ValueError, match=r"comes after site 'mlp' of layer layers\.1"):
        fe.patch(tiny.build("llama"), fe.Steer(vector(1), site="mlp", layers=1).when(fe.Gate(vector(1), layer=1, site="block")))
    with pytest.raises(ValueError, match="another stack's tokens"):
        fe.patch(tiny.build("t5"), fe.Steer(vector(1), layers=2).when(fe.Gate(vector(1), layer=0)))


def test_what_a_gate_says_is_bounded_where_rows_are_zero():
    sensor = Sensor(fe.Gate(vector(1), kind="cosine"), "g", Spot("layers.0", 0, 1), 32, "cpu")
    for kind in ("cosine", "cast"):
        sensor.kind = kind
        rows = torch.zeros(2, 32, requires_grad=True)
        score = sensor.score(rows)
        assert torch.equal(score, torch.zeros(2))
        score.sum().backward()
        assert rows.grad.isfinite().all()


def test_left_out_padding_is_not_in_the_mean():
    hidden = torch.randn(4, 8, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = prompts()[1]
    given = LEAVES["cosine, prompt mean"][0]
    assert not torch.equal(said(hidden, given, mask, 8), said(hidden, given, torch.ones_like(mask), 8))
