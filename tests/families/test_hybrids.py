"""Layers of several kinds, streams of several kinds: every layer is edited, or what is left out is said."""

import dataclasses

import pytest
import torch
import transformers

import fastedit as fe
from bench.conformance import tiny
from fastedit.families import Family, find_layers
from fastedit.patching.layer_plan import width_at

IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))


def built(name):
    return tiny.build(getattr(transformers, name))


def hooked(model, modules, vector, given):
    """The logits with a vector added behind some modules, by hooks."""
    hooks = [
        m.register_forward_hook(lambda m, a, o: (o[0] + vector, *o[1:]) if isinstance(o, tuple) else o + vector) for m in modules
    ]
    with torch.no_grad():
        said = model(given).logits
    for hook in hooks:
        hook.remove()
    return said


LISTS = {
    "Qwen3_5ForCausalLM": "model.layers", "JambaForCausalLM": "model.layers", "OlmoHybridForCausalLM": "model.layers",
    "Lfm2ForCausalLM": "model.layers", "BambaForCausalLM": "model.layers", "MambaForCausalLM": "backbone.layers",
    "MllamaForCausalLM": "model.layers", "HYV4ForCausalLM": "model.layers", "XLNetLMHeadModel": "transformer.layer",
}  # fmt: skip


@pytest.mark.parametrize("name", LISTS)
def test_an_edit_of_every_layer_is_at_every_layer(name):
    model, vector = built(name), torch.randn(tiny.WIDTH, generator=torch.Generator().manual_seed(1))
    stack = model.get_submodule(LISTS[name])
    assert [layer.module for layer in find_layers(model)] == list(stack)
    expected, bare = hooked(model, stack, vector, IDS), hooked(model, (), vector, IDS)
    handle = fe.patch(model, fe.Steer(vector))
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    handle.remove()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, bare) and not torch.allclose(expected, bare, atol=1e-2)


@pytest.mark.parametrize("name", ["Qwen3_5ForCausalLM", "OlmoHybridForCausalLM", "Lfm2ForCausalLM"])
def test_an_ffns_output_is_found_in_layers_of_both_kinds(name):
    model = built(name)
    with fe.patch(model, fe.RED()) as handle:
        assert handle.config()[0]["layers"] == [0, 1, 2, 3]


def test_layers_that_a_site_does_not_reach_are_named_unless_they_were_chosen_around():
    model = built("Qwen3_5ForCausalLM")
    there = [layer.index for layer in find_layers(model) if layer.at("q") is not None]
    assert 0 < len(there) < 4
    missed = ", ".join(f"layers.{n}" for n in range(4) if n not in there)
    with pytest.raises(ValueError, match=rf"leave out {4 - len(there)} of 4 layers \({missed}\): say layers=.* to leave"):
        fe.patch(model, fe.ScaleBias(site="q"))
    with pytest.raises(ValueError, match="leave out"):
        fe.Bank(model, 2, sites="q")
    with fe.patch(model, fe.ScaleBias(site="q", layers=there)) as handle:
        assert handle.config()[0]["layers"] == there
    assert "fastedit" not in model._modules


@pytest.mark.parametrize("name", ["HYV4ForCausalLM", "XLNetLMHeadModel", "CpmAntForCausalLM", "ProphetNetForCausalLM"])
def test_rows_that_are_not_one_a_token_are_refused_by_what_must_tell_tokens(name):
    """Several streams, tokens first, tokens put in front, predictions behind each other."""
    model, vector = built(name), torch.ones(tiny.WIDTH)
    patches = {
        "positions": lambda: fe.patch(model, fe.Steer(vector, positions="last 1")),
        "gate": lambda: fe.patch(model, fe.Steer(vector).when(fe.Gate(vector, decide="prompt"))),
        "probe": lambda: fe.patch(model, fe.Probe(vector)),
        "bank": lambda: fe.Bank(model, 2, sites="block"),
        "tenants": lambda: fe.patch(model, fe.ScaleBias(site="block"), tenants=2),
        "capture": lambda: fe.capture(model, None, IDS.tolist(), batch_size=2),
    }
    for patch in patches.values():
        with pytest.raises(ValueError, match=r"passes on hidden states of shape .* for 2 sequences of 5 tokens"):
            patch()
    assert "fastedit" not in model._modules


def test_a_layer_that_runs_again_and_again_is_edited_in_each_run_and_not_read():
    model, vector = built("AlbertForMaskedLM"), torch.ones(tiny.WIDTH)
    (layer,) = find_layers(model)
    expected = hooked(model, [layer.module], vector, IDS)
    with fe.patch(model, fe.Steer(vector)), torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="runs 4 times in a forward"):
        fe.patch(model, fe.Probe(vector))
    with pytest.raises(ValueError, match="runs 4 times in a forward"):
        fe.capture(model, None, IDS.tolist(), batch_size=2)


def test_reading_what_layers_hand_on_leaves_no_trace():
    model = built("XLNetLMHeadModel").train()
    called = []
    model.register_forward_hook(lambda *given: called.append(given))
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    with pytest.raises(ValueError, match="passes on"):
        fe.patch(model, fe.Steer(torch.ones(tiny.WIDTH), positions="last 1"))
    assert torch.equal(torch.get_rng_state(), state) and not called and all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["HrmTextForCausalLM", "XLMWithLMHeadModel", "CLIPModel", "FunnelForMaskedLM"])
def test_of_two_stacks_none_is_picked(name):
    with pytest.raises(ValueError, match=r"found [24] stacks of layers \(.*patch the submodule that holds the one you mean"):
        fe.patch(built(name), fe.RED())


def test_a_model_that_sees_is_edited_where_it_writes():
    model = built("LlavaForConditionalGeneration")
    found = find_layers(model)
    assert [layer.module for layer in found] == list(model.model.language_model.layers)


def test_a_model_without_layers_says_what_was_found():
    with pytest.raises(ValueError, match=r"has no layers to patch.*found no ModuleList at all"):
        fe.patch(torch.nn.Sequential(torch.nn.Linear(4, 4)), fe.RED())


def test_a_width_that_the_config_invents_is_refused():
    model = built("MambaForCausalLM")
    model.config.hidden_size = 77
    with pytest.raises(ValueError, match="the model's config says 77, and no weight of MambaBlock has such a side"):
        fe.patch(model, fe.Steer(torch.ones(77)))


@pytest.mark.parametrize("name, path", [
    ("Phi4MultimodalForCausalLM", "model.layers"), ("GitForCausalLM", "git.encoder.layer"),
    ("LlavaForConditionalGeneration", "model.language_model.layers"),
])  # fmt: skip
def test_what_reads_pictures_within_the_text_s_part_is_told_by_its_config(name, path):
    model = built(name)
    assert [layer.module for layer in find_layers(model)] == list(model.get_submodule(path))


def test_a_layer_narrower_inside_is_as_wide_as_it_hands_on():
    """MobileBERT's maps of attention and FFN end in a bottleneck; neither they nor the embedding are the stream's width."""
    model = built("MobileBertForMaskedLM")
    assert tiny.WIDTH not in find_layers(model)[0].ends()
    vector = torch.randn(tiny.WIDTH, generator=torch.Generator().manual_seed(1))
    expected = hooked(model, [layer.module for layer in find_layers(model)], vector, IDS)
    with fe.patch(model, fe.Steer(vector)), torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_of_the_config_the_embedding_and_the_maps_two_must_agree():
    def width(name, **changes):
        return width_at(dataclasses.replace(find_layers(built(name))[0], **changes), "block")

    assert width("RwkvForCausalLM", width=48) == 32  # the config alone says 48, which is a side of some weight
    assert width("MambaForCausalLM", width=64, embedded=64) == 64  # the maps alone say 32
    alone = {"family": Family(name="no maps", sites={"block": ""}, final=None)}
    assert width("MambaForCausalLM", **alone) == 32
    with pytest.raises(ValueError, match=r"looked for one number in the model's config, its embedding .* found \[32, 64\]"):
        width("MambaForCausalLM", width=64, **alone)


def test_a_tuple_with_names_is_refused_when_patching():
    """Reformer's layers hand on two streams by name: which one an edit means is not known."""
    with pytest.raises(ValueError, match="expected hidden states 32 wide, but ReformerLayer passes on something else"):
        fe.patch(built("ReformerModelWithLMHead"), fe.Steer(torch.ones(tiny.WIDTH)))
