"""Merging into the weights: exact, measured, reloadable, and undone bit for bit."""

import copy

import pytest
import tiny_models as tiny
import torch
from patch_cases import everything, random_form, scaled_then_low_rank, scrambled

import fastedit as fe
from fastedit.patching.handle import handles
from fastedit.patching.merge import MergeError


def mergeable():
    """Edits of every kind on `mlp` and `attn`."""
    return [
        *scaled_then_low_rank(random_form(), "mlp", None),
        *scaled_then_low_rank(random_form(seed=9), "attn", [0, -1]),
        fe.Steer(torch.randn(tiny.WIDTH), site="mlp", layers=1, strength=0.5), fe.NoReFT(2, site="attn"),
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore:merging gave")
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_merged_model_says_what_the_edited_one_says(family):
    model = tiny.build(family)
    before = tiny.state(model)
    handle = scrambled(fe.patch(model, mergeable()))
    handle.strength = 0.75
    edited, exact = tiny.output(model, family), tiny.output(tiny.exact(model), family)
    names = set(handle.named_tensors())
    patched = tiny.state(model)
    handle.merge()
    assert handle.merged and not any(k.startswith("fastedit") for k in model.state_dict())
    assert [type(m) for m in model.modules() if type(m).__name__ != "Root"] == before["classes"]
    tiny.assert_promise(tiny.output(model, family), edited, exact)
    assert {row["path"] for row in handle.report().rows} == {"merged into the weights"}
    assert set(handle.named_tensors()) == names
    for change in (handle.merge, lambda: setattr(handle, "strength", 1.0), lambda: handle.load_tensors({})):
        with pytest.raises(MergeError, match="merged"):
            change()
    handle.unmerge()
    tiny.assert_same_state(model, patched)
    assert torch.equal(tiny.output(model, family), edited)
    handle.merge()
    handle.remove()
    tiny.assert_same_state(model, before)


def test_weights_are_the_formula_rounded_once():
    model, form = tiny.build("gpt2"), random_form()
    conv = model.transformer.h[1].mlp.c_proj
    rows = torch.randn(5, 4 * tiny.WIDTH, dtype=torch.float64)
    wide = copy.deepcopy(conv).double()
    expected = type(form)(*(t.double() for t in form.tensors()))(wide(rows))
    handle = fe.patch(model, scaled_then_low_rank(form, "mlp", 1))
    handle.merge()
    got = copy.deepcopy(conv).double()(rows)
    assert (got - expected).abs().max() < 2e-6 * expected.abs().max()


@pytest.mark.parametrize("site, flag", [("mlp", "mlp_bias"), ("attn", "attention_bias")])
def test_a_merged_llama_is_saved_and_reloaded_with_its_biases(site, flag, tmp_path):
    model = tiny.build("llama")
    handle = scrambled(fe.patch(model, fe.ScaleBias(site=site, layers=[1])))
    edited = tiny.output(model, "llama")
    tiny.quiet(handle.merge)
    merged = tiny.output(model, "llama")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert getattr(again.config, flag) is True
    assert torch.equal(tiny.output(again, "llama"), merged)
    torch.testing.assert_close(merged, edited, rtol=1e-5, atol=1e-5)
    handle.unmerge()
    assert getattr(model.config, flag) is False
    assert (
        model.model.layers[0].mlp.up_proj.bias is None and model.model.layers[1].self_attn.q_proj.bias is None
    )


def test_a_scale_alone_adds_no_bias():
    model = tiny.build("llama")
    handle = fe.patch(model, fe.ScaleBias(torch.full((tiny.WIDTH,), 1.5), bias=False))
    handle.merge()
    assert model.model.layers[0].mlp.down_proj.bias is None and model.config.mlp_bias is False


def test_a_bias_that_cannot_be_reloaded_is_announced():
    model = tiny.build("t5")
    handle = scrambled(fe.patch(model, fe.RED()))
    with pytest.warns(UserWarning, match="has no setting for"):
        handle.merge()


def test_rounding_is_measured_and_refused():
    model = tiny.build("llama", torch.bfloat16)
    before = tiny.state(model)
    small = 1 + 1e-3 * torch.randn(tiny.WIDTH)
    handle = fe.patch(model, fe.ScaleBias(small, bias=False))
    patched, edited = tiny.state(model), tiny.output(model, "llama")
    with pytest.raises(MergeError, match=r"would lose \d+\.\d % of the edit.*fp32=True"):
        handle.merge()
    assert not handle.merged
    tiny.assert_same_state(model, patched)
    handle.merge(fp32=True)
    linears = [layer.mlp.down_proj for layer in model.model.layers]
    assert {m.weight.dtype for m in linears} == {torch.float32}
    rows = torch.randn(4, 48).bfloat16()
    exact = rows.double() @ before["bits"]["model.layers.0.mlp.down_proj.weight"].double().T * small.double()
    got = linears[0](rows)
    assert got.dtype is torch.bfloat16
    assert (got.double() - exact).abs().max() <= 2**-8 * exact.abs().max()
    torch.testing.assert_close(tiny.output(model, "llama"), edited, rtol=0.1, atol=0.05)
    handle.unmerge()
    tiny.assert_same_state(model, patched)
    handle.remove()
    tiny.assert_same_state(model, before)


def test_an_edit_that_bf16_holds_is_merged_in_bf16():
    model = tiny.build("llama", torch.bfloat16)
    handle = fe.patch(model, fe.ScaleBias(torch.full((tiny.WIDTH,), 2.0), bias=False))
    handle.merge()
    assert model.model.layers[0].mlp.down_proj.weight.dtype is torch.bfloat16
    assert max(handle._merged.rounding.values()) == 0.0


def test_a_failure_half_way_leaves_nothing_behind():
    model = tiny.build("llama", torch.bfloat16)
    scales = {0: torch.full((tiny.WIDTH,), 2.0), 2: torch.full((tiny.WIDTH,), 1.001)}
    handle = fe.patch(
        model, fe.ScaleBias(scales, bias={0: torch.ones(tiny.WIDTH), 2: torch.zeros(tiny.WIDTH)})
    )
    patched, config = tiny.state(model), copy.deepcopy(model.config.to_dict())
    with pytest.raises(MergeError, match=r"layer layers\.2"):
        handle.merge()
    tiny.assert_same_state(model, patched)
    assert model.config.to_dict() == config


def quantised(model):
    model.model.layers[1].mlp.down_proj.weight = torch.nn.Parameter(
        torch.ones(tiny.WIDTH, 48, dtype=torch.int8), requires_grad=False
    )


def tied(model):
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight


def subclassed(model):
    class Low(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x)

    model.model.layers[1].mlp.down_proj.__class__ = Low


@pytest.mark.parametrize("change, edit, says", [
    (lambda m: None, fe.ScaleBias(torch.full((tiny.WIDTH,), 2.0), site="block"), "residual stream is a sum"),
    (quantised, fe.RED(), "torch.int8"), (tied, fe.RED(), "tied to 1 other"),
    (subclassed, fe.RED(), "output of a Low"),
    (lambda m: m.to("meta"), fe.RED(), "meta device"),
])  # fmt: skip
def test_what_cannot_be_merged_is_refused_with_the_reason(change, edit, says):
    model = tiny.build("llama")
    change(model)
    before = tiny.state(model)
    handle = fe.patch(model, edit)
    with pytest.raises(MergeError, match=says):
        handle.merge()
    handle.remove()
    tiny.assert_same_state(model, before)


def test_adapters_are_refused():
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(tiny.build("llama"), peft.LoraConfig(target_modules=["down_proj"], r=2))
    with pytest.raises(MergeError, match="merge the adapter"):
        fe.patch(wrapped, fe.RED()).merge()


def test_handles_merge_in_the_order_of_their_edits():
    model = tiny.build("llama")
    before = tiny.state(model)
    first = scrambled(fe.patch(model, fe.RED()), seed=1)
    second = scrambled(fe.patch(model, fe.RED()), seed=2)
    third = scrambled(fe.patch(model, fe.Steer(torch.ones(tiny.WIDTH))), seed=3)
    edited = tiny.output(model, "llama")
    with pytest.raises(MergeError, match="come first"):
        second.merge()
    first.merge()
    torch.testing.assert_close(tiny.output(model, "llama"), edited, rtol=1e-4, atol=1e-5)
    second.merge()
    torch.testing.assert_close(tiny.output(model, "llama"), edited, rtol=1e-4, atol=1e-5)
    with pytest.raises(MergeError, match="unmerge that one first"):
        first.unmerge()
    second.unmerge()
    first.unmerge()
    assert torch.equal(tiny.output(model, "llama"), edited)
    for handle in (second, third, first):
        handle.remove()
    tiny.assert_same_state(model, before)


def test_a_copy_of_a_merged_model_unmerges_by_itself():
    model = tiny.build("bert")
    handle = scrambled(fe.patch(model, fe.RED()))
    edited = tiny.output(model, "bert")
    handle.merge()
    merged, other = tiny.output(model, "bert"), copy.deepcopy(model)
    (copied,) = handles(other)
    copied.unmerge()
    assert torch.equal(tiny.output(other, "bert"), edited)
    assert torch.equal(tiny.output(model, "bert"), merged)


def test_everything_that_holds_a_block_edit_is_refused_whole():
    model = tiny.build("llama")
    handle = fe.patch(model, everything())
    patched = tiny.state(model)
    with pytest.raises(MergeError, match="block"):
        handle.merge()
    tiny.assert_same_state(model, patched)


def test_a_merged_model_generates_the_same_text():
    model, ids = tiny.build("llama"), {"input_ids": torch.tensor([[3, 8, 5]]), "attention_mask": torch.ones(1, 3).long()}
    handle, told = scrambled(fe.patch(model, fe.RED())), []
    for _ in range(2):
        torch.manual_seed(0)
        told.append(model.generate(**ids, max_new_tokens=24, do_sample=True))
        handle.merge() if len(told) == 1 else handle.unmerge()
    assert torch.equal(*told) and len(set(told[0][0].tolist())) > 5


def vector(seed=3):
    return torch.randn(tiny.WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.filterwarnings("ignore:merging gave")
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_a_vector_at_block_is_a_bias_of_the_last_map(family):
    """Behind an edit of that map, whichever is named first."""
    steer, others = fe.Steer(vector(), site="block"), scaled_then_low_rank(random_form(), "mlp", None)
    for edits in ([steer], [steer, *others]):
        model = tiny.build(family)
        before = tiny.state(model)
        handle = fe.patch(model, edits)
        handle.strength = 0.75
        edited, exact = tiny.output(model, family), tiny.output(tiny.exact(model), family)
        handle.merge()
        tiny.assert_promise(tiny.output(model, family), edited, exact)
        assert not any(k.startswith("fastedit") for k in model.state_dict())
        handle.remove()
        tiny.assert_same_state(model, before)


@pytest.mark.parametrize("family, edit, message", [
    ("bert", fe.Steer(vector(), site="block"), "not proved of BertLayer"),
    ("llama", fe.ScaleBias(torch.full((tiny.WIDTH,), 2.0), site="block"), "a sum of many maps"),
    ("gpt2", fe.Ablate(vector() / vector().norm(), site="block"), "a sum of many maps"),
    ("gpt2", fe.Steer(vector(), site="embed"), "not the table's row alone"),
    ("t5", fe.Steer(vector(), site="embed"), "not the table's row alone"),
    ("bert", fe.Steer(vector(), site="embed"), "not the table's row alone"),
])  # fmt: skip
def test_what_no_map_takes_is_refused(family, edit, message):
    model = tiny.build(family)
    handle = fe.patch(model, edit)
    patched = tiny.state(model)
    with pytest.raises(MergeError, match=message):
        handle.merge()
    tiny.assert_same_state(model, patched)


@pytest.mark.parametrize("changes", [{"residual_multiplier": 0.5}, {}])
def test_a_layer_that_scales_or_normalises_what_it_adds_takes_no_vector(changes):
    from transformers import Gemma2ForCausalLM, GraniteForCausalLM

    from bench.conformance import tiny as small

    model = small.build(GraniteForCausalLM if changes else Gemma2ForCausalLM)
    with pytest.raises(MergeError, match="not proved of"):
        fe.patch(model, fe.Steer(vector(), site="block")).merge()


def test_a_vector_at_block_does_not_reach_another_handles_edit_of_the_map():
    model = tiny.build("llama")
    other = fe.patch(model, fe.ScaleBias(torch.full((tiny.WIDTH,), 2.0), site="mlp", layers=[1]))
    handle = fe.patch(model, fe.Steer(vector(), site="block"))
    with pytest.raises(MergeError, match="would become part of what another handle's edit"):
        handle.merge()
    other.remove()
    handle.merge()


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen3ForCausalLM", "OlmoForCausalLM"])
def test_an_edit_at_embed_is_in_the_table(name):
    import transformers

    from bench.conformance import tiny as small

    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    model = small.build(getattr(transformers, name))
    unit = vector() / vector().norm()
    table = model.get_input_embeddings().weight
    before = table.detach().clone()
    handle = fe.patch(model, [fe.Ablate(unit, site="embed"), *scaled_then_low_rank(random_form(), "embed", None)])
    with torch.no_grad():
        edited, plain = model(ids).logits, None
        handle.merge()
        torch.testing.assert_close(model(ids).logits, edited, rtol=1e-4, atol=1e-5)
        handle.remove()
        plain = model(ids).logits
    assert torch.equal(table, before) and not torch.allclose(plain, edited, atol=1e-2)


def test_a_table_that_is_the_head_too_is_left_alone():
    model = tiny.build("llama", tie_word_embeddings=True)
    with pytest.raises(MergeError, match="tied to 1 other"):
        fe.patch(model, fe.Ablate(vector() / vector().norm(), site="embed")).merge()


def test_a_setting_that_reaches_other_layers_keeps_the_order_of_undoing():
    """The first merge gives every layer a bias by the config's setting, the second one puts numbers there."""
    model = tiny.build("llama")
    first = fe.patch(model, fe.Steer(vector(), site="mlp", layers=[0]))
    second = fe.patch(model, fe.Steer(vector(4), site="mlp", layers=[1]))
    first.merge()
    second.merge()
    merged = tiny.output(model, "llama")
    with pytest.raises(MergeError, match="unmerge that one first"):
        first.unmerge()
    assert torch.equal(tiny.output(model, "llama"), merged)
    second.unmerge()
    first.unmerge()
    assert model.config.mlp_bias is False and model.model.layers[1].mlp.down_proj.bias is None


def test_weights_made_in_inference_mode_are_refused():
    with torch.inference_mode():
        model = tiny.build("llama")
    handle = fe.patch(model, fe.Steer(torch.ones(tiny.WIDTH), site="mlp"))
    with pytest.raises(MergeError, match="inference_mode"):
        handle.merge()
    handle.remove()
