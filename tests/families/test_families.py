"""Where layers and sites are found, and that a published edit has its published size."""

import pytest
import tiny_models as tiny
import torch
import transformers
from torch import nn

import fastedit as fe
from fastedit.families import TABLE, find_layers


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_sites_are_where_the_paper_puts_them(family):
    model = tiny.build(family)
    layers = find_layers(model)
    assert len(layers) == tiny.number_of_layers(family)
    for layer in layers:
        for site in ("mlp", "attn", "block"):
            assert layer.at(site) is tiny.site_module(model, family, site, layer.index)
    names = [f"layers.{n}" for n in range(tiny.LAYERS)]
    names = ["encoder.0", "encoder.1", "decoder.0", "decoder.1"] if family == "t5" else names
    assert [layer.name for layer in layers] == names


LARGE = {
    "roberta-base": (18_432, transformers.RobertaModel, {}),
    "roberta-large": (49_152, transformers.RobertaModel, {
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}),
    "t5-base": (36_864, transformers.T5ForConditionalGeneration, {
        "d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}),
    "gpt2-medium": (49_152, transformers.GPT2LMHeadModel, {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "gpt2-large": (92_160, transformers.GPT2LMHeadModel, {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
    "llama-2-7b": (262_144, transformers.LlamaForCausalLM, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_red_has_its_published_number_of_parameters(name):
    expected, model_class, changes = LARGE[name]
    with torch.device("meta"):
        model = model_class(model_class.config_class(**changes))
    keys = list(model.state_dict())
    handle = tiny.quiet(fe.patch, model, fe.RED(), freeze=True)
    assert handle.num_parameters() == sum(p.numel() for p in handle.parameters()) == expected
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    assert {row["path"] for row in handle.report().rows} == {"fused"}
    handle.remove()
    assert list(model.state_dict()) == keys


def test_layers_are_chosen_by_number_and_name():
    model = tiny.build("t5")

    def layers(wanted):
        with fe.patch(model, fe.RED(layers=wanted)) as handle:
            return handle.config()[0]["layers"]

    assert layers(None) == [0, 1, 2, 3]
    assert layers(-1) == [3] and layers([0, -1, 3]) == [0, 3] and layers(range(1, 3)) == [1, 2]
    assert layers("decoder") == [2, 3] and layers(["encoder.1", "decoder.0"]) == [1, 2]


def test_no_table_entry_claims_another_family():
    for family in tiny.FAMILIES:
        layer = find_layers(tiny.build(family))[0].module
        assert [entry.name for entry in TABLE if entry.matches(layer)] == [
            "bert" if family == "roberta" else family
        ]


# --- models that no entry describes -------------------------------------------------------------------------


class Block(nn.Module):
    """Pre-norm, with names of its own."""

    def __init__(self, width):
        super().__init__()
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "out": nn.Linear(width, width)})
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, hidden):
        q, k, v = self.attention["qkv"](self.before(hidden)).chunk(3, -1)
        hidden = hidden + self.attention["out"](torch.softmax(q @ k.mT, -1) @ v)
        return hidden + self.feed(self.after(hidden)), "cache"


class Unknown(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(width, 2), nn.Linear(width, 2)])
        self.stack = nn.ModuleList([Block(width) for _ in range(3)])

    def forward(self, hidden):
        for block in self.stack:
            hidden, _ = block(hidden)
        return hidden


@pytest.mark.parametrize("site, path", [("mlp", "feed.2"), ("attn", "attention.out"), ("block", "")])
def test_an_unknown_model_is_searched_and_served_plainly(site, path):
    model, hidden, scale = Unknown(), torch.randn(2, 5, 16), torch.rand(16) + 0.5
    assert [layer.at(site) for layer in find_layers(model)] == [b.get_submodule(path) for b in model.stack]
    expected = Unknown()
    expected.load_state_dict(model.state_dict())
    for block in expected.stack:
        block.get_submodule(path).register_forward_hook(
            lambda m, a, o: (o[0] * scale, o[1]) if isinstance(o, tuple) else o * scale
        )
    before = tiny.state(model)
    handle = tiny.quiet(fe.patch, model, fe.ScaleBias(scale, site=site))
    assert {row["path"] for row in handle.report().rows} == {"plain: no family describes this layer"}
    torch.testing.assert_close(model(hidden), expected(hidden))
    handle.remove()
    tiny.assert_same_state(model, before)


def test_an_unknown_model_has_its_inputs_too_but_no_final():
    model, hidden, scale = Unknown(), torch.randn(2, 5, 16), torch.rand(32) + 0.5
    expected = Unknown()
    expected.load_state_dict(model.state_dict())
    expected.stack[0].register_forward_pre_hook(lambda m, a: (a[0] * scale[:16],))
    for block in expected.stack:
        block.feed[2].register_forward_pre_hook(lambda m, a: (a[0] * scale,))
    fe.patch(model, [fe.ScaleBias(scale, site="ffn_in"), fe.ScaleBias(scale[:16], site="embed")])
    torch.testing.assert_close(model(hidden), expected(hidden))
    for site, says in (("final", "what follows the last layer is not known"), ("q", "no linear map there is known")):
        with pytest.raises(ValueError, match=says):
            fe.patch(model, fe.ScaleBias(site=site))


def test_a_site_that_cannot_be_found_is_refused_and_says_what_was():
    model = Unknown()
    for block in model.stack:
        block.attention_again = nn.Linear(16, 16)
    before = tiny.state(model)
    with pytest.raises(ValueError, match=r"site 'attn' was not found in Block.*found 'embed', 'ffn_in', 'mlp', 'block'"):
        fe.patch(model, fe.ScaleBias(site="attn"))
    tiny.assert_same_state(model, before)


def test_several_stacks_that_are_no_encoder_and_decoder_are_refused():
    model = nn.ModuleDict({"left": tiny.build("llama"), "right": tiny.build("llama")})
    with pytest.raises(ValueError, match=r"2 stacks of layers \(left.model.layers, right.model.layers\)"):
        fe.patch(model, fe.RED())
    fe.patch(model["left"], fe.RED()).remove()


def test_a_block_that_returns_something_else_says_so():
    model = Unknown()

    class Odd(Block):
        def forward(self, hidden):
            return {"hidden": hidden}

    model.stack[0].__class__ = Odd
    for block in list(model.stack)[1:]:
        block.__class__ = Odd
    fe.patch(model, fe.Steer(torch.ones(16)))
    with pytest.raises(TypeError, match="Odd returned dict, expected a tensor"):
        model.stack[0](torch.ones(1, 16))


def test_mixtures_of_experts_are_edited_as_a_whole_block():
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, vocab_size=60,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    assert [layer.at("mlp") for layer in find_layers(model)] == [layer.mlp for layer in model.model.layers]
