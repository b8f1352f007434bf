"""What a handle says that its edits did: the tokens, the strengths, the gates."""

import io

import pytest
import tiny_models as tiny
import torch
from patch_cases import paths, scrambled
from rich.console import Console

import fastedit as fe

V = torch.randn(tiny.WIDTH, generator=torch.Generator().manual_seed(4))
V = V / V.norm()


def inputs(family):
    return tiny.inputs(family)  # two rows of seven; the first has two of padding at the end


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_tokens_strengths_and_layers_are_told(family):
    model = tiny.build(family)
    where = {"layers": "encoder"} if family == "t5" else {}
    handle = fe.patch(model, [fe.RED(**where), fe.Steer(V, strength=0.5, positions="first 2 + last 1", site="attn", **where)])
    handle.strength = 2.0
    said, on = tiny.output(model, family), paths(handle)
    found = handle.explain(inputs(family))
    assert torch.equal(tiny.output(model, family), said) and paths(handle) == on, "the model is as it was"
    layers = range(2 if family == "t5" else tiny.LAYERS)
    assert [(t.number, t.edit, t.site) for t in found.told] == [(0, "RED", "mlp")] * len(layers) + [
        (1, "Steer", "attn")
    ] * len(layers)
    assert all(torch.equal(t.factor, torch.full((2, 7), 2.0)) for t in found.told if t.number == 0)
    expected = torch.tensor([[1.0, 1, 0, 0, 1, 0, 0], [1, 1, 0, 0, 0, 0, 1]])
    assert all(torch.equal(t.factor, expected) for t in found.told if t.number == 1)
    stack = "encoder" if family == "t5" else "layers"
    lines = list(found.lines())
    assert lines[0] == ("0 RED", "mlp", f"{stack}.0–{layers[-1]}", "0", "0–6", "2", "")
    assert lines[2] == ("1 Steer", "attn", f"{stack}.0–{layers[-1]}", "0", "0–1,4", "1", "")
    assert "0–1,6" in str(found) and str(found).splitlines()[0].startswith("edit")
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(found)
    assert "0–1,6" in console.export_text()


@pytest.mark.parametrize("gate", [{}, {"sharpness": 2.0}, {"decide": "prompt"}, {"layer": 0, "site": "block"}])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_gate_s_share_is_what_the_hidden_states_say(family, gate):
    """Against the row that the edit's own layer leaves: it moves by factor · V, no more."""
    model = tiny.build(family)
    seen = []
    layer = tiny.site_module(model, family, "attn", 2)
    watch = layer.register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    tiny.output(model, family)
    threshold = -100.0 if gate.keys() & {"decide", "layer"} else float((seen[0] @ V).flatten().sort()[0][6:8].mean())
    edit = fe.Steer(V, strength=3.0, site="attn", layers=2).when(fe.Gate(V, threshold, **gate))
    handle = fe.patch(model, edit)
    tiny.output(model, family)
    watch.remove()
    moved = (seen[1] - seen[0]) @ V
    (told,) = handle.explain(inputs(family)).told
    torch.testing.assert_close(told.factor, moved, rtol=1e-3, atol=1e-3)
    assert told.gate is not None and bool((told.factor != 0).any()) and told.gated.shape == (2, 7)
    assert "% open" in str(handle.explain(inputs(family)))


def test_tenants_and_other_handles():
    model = tiny.build("llama")
    fe.patch(model, fe.Steer(V))
    handle = scrambled(fe.patch(model, fe.RED(), tenants=2))
    with handle.assign([None, 1]):
        found = handle.explain(inputs("llama"))
    assert len(found.told) == tiny.LAYERS
    assert all(not t.factor[0].any() and t.factor[1].all() for t in found.told)
    assert [line[4] for line in found.lines()] == ["none", "0–6"]


def test_a_picture_is_drawn():
    pytest.importorskip("matplotlib").use("Agg")
    handle = fe.patch(tiny.build("llama"), [fe.RED(), fe.Steer(V, positions="last 2")])

    class Tokenizer:
        def convert_ids_to_tokens(self, ids):
            return [f"t{number}" for number in ids]

    axes = handle.explain(inputs("llama")["input_ids"]).plot(Tokenizer())
    picture = axes.images[0].get_array()
    assert picture.shape == (4, 7) and (picture[0] == 1).all() and list(picture[2]) == [0] * 5 + [1] * 2
    assert axes.get_xticklabels()[0].get_text().startswith("t")


def test_what_cannot_be_explained_is_said():
    model = tiny.build("llama")
    handle = scrambled(fe.patch(model, fe.RED()))
    said = tiny.output(model, "llama")
    with pytest.raises(TypeError, match="expected input_ids"):
        handle.explain("a text")
    with pytest.raises(IndexError):
        handle.explain(torch.full((1, 2), tiny.VOCABULARY))
    assert torch.equal(tiny.output(model, "llama"), said) and paths(handle)["mlp"] == "fused"
    handle.merge()
    with pytest.raises(RuntimeError, match="merged into the weights"):
        handle.explain(inputs("llama"))
    handle.remove()
    with pytest.raises(RuntimeError, match="removed from its model"):
        handle.explain(inputs("llama"))
