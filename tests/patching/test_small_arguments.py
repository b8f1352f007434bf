"""Numbers and layers as NumPy and torch give them, and small things that a user meets first."""

import warnings

import numpy as np
import pytest
import tiny_models as tiny
import torch
from typer.testing import CliRunner

import fastedit as fe
from fastedit.cli import app
from fastedit.patching.handle import handles
from fastedit.patching.merge import MergeError

V = torch.ones(tiny.WIDTH)


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5), 0.5])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_numbers_of_other_libraries(family, number):
    model = tiny.build(family)
    edits = [fe.Steer(V, strength=number), fe.Clamp(V, number), fe.Amplify(V, number),
             fe.Steer(V).when(fe.Gate(V, number, sharpness=number))]  # fmt: skip
    handle = fe.patch(model, edits)
    handle.strength = number
    assert edits[0].strength == 0.5 and type(edits[0].strength) is float and handle.strength == 0.5
    assert all(type(edit["strength"]) is float for edit in handle.config())


@pytest.mark.parametrize("number", [True, np.bool_(True), torch.tensor(True), "1", torch.ones(2), np.nan, None, [0.5]])
def test_what_is_no_number(number):
    with pytest.raises(ValueError, match="strength is"):
        fe.Steer(V, strength=number)


@pytest.mark.parametrize("layers, chosen", [
    (np.arange(1, 3), [1, 2]), (torch.arange(2), [0, 1]), (np.int64(2), [2]), (torch.tensor(1), [1]), (slice(1, None), [1, 2]),
    (slice(None, None, 2), [0, 2]), ([np.int32(0), -1], [0, 2]), (range(2), [0, 1]), (np.str_("layers.1"), [1]),
])  # fmt: skip
def test_layers_of_other_libraries(layers, chosen):
    for family in ("llama", "gpt2", "bert"):
        handle = fe.patch(tiny.build(family), fe.RED(layers=layers))
        assert handle.config()[0]["layers"] == chosen
    embedded = fe.patch(tiny.build("llama"), fe.Steer(V, site="embed", layers=slice(0, 1)))
    assert embedded.config()[0]["layers"] == [0]


@pytest.mark.parametrize("layers", [1.0, np.arange(2.0), [True], np.bool_(True), [None]])
def test_what_is_no_layer(layers):
    with pytest.raises(TypeError, match="layers has"):
        fe.RED(layers=layers)
    with pytest.raises(ValueError, match="there is no layer slice"):
        fe.patch(tiny.build("llama"), fe.RED(layers=slice(7, 9)))


def test_a_bank_is_dialled_by_a_number_without_dimensions():
    model = tiny.build("llama")
    bank = fe.Bank(model, 2)
    bank.add("anna", fe.Steer(V, site="mlp"))
    said = []
    for strength in (0.5, torch.tensor(0.5), np.float32(0.5)):
        with bank.assign(["anna"] * 2, strength):
            said.append(tiny.output(model, "llama"))
    assert torch.equal(said[0], said[1]) and torch.equal(said[0], said[2])


def test_trainable_parameters_are_printed(capsys):
    for family in ("llama", "gpt2", "bert"):
        handle = fe.patch(tiny.build(family), fe.RED(), freeze=True)
        handle.print_trainable_parameters()
        mine = 2 * tiny.WIDTH * tiny.LAYERS
        said = capsys.readouterr().out
        assert f"of these edits: {mine:,d}" in said and "trainable%" in said
        if family != "bert":
            assert said.startswith(f"trainable params: {mine:,d} ||")


def test_the_version_is_said():
    done = CliRunner().invoke(app, ["--version"])
    assert done.exit_code == 0 and done.output.strip() == f"fastedit {fe.__version__}"


def test_a_mixture_of_experts_says_why_it_is_not_merged():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
                           num_key_value_heads=2, num_local_experts=2)  # fmt: skip
    handle = fe.patch(MixtralForCausalLM(config).eval(), fe.RED())
    with pytest.raises(MergeError, match="mixture of experts"):
        handle.merge()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_why_a_path_is_plain_is_said_once(family, monkeypatch):
    from fastedit.patching import model_edits as root
    from fastedit.patching.proof import Verdict

    monkeypatch.setattr(root, "prove", lambda layer, recipe: Verdict("a long reason"))
    model = tiny.build(family)
    for number in range(3):
        tiny.site_module(model, family, "block", number).own_setting = number  # layers of three kinds, plain for one reason
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fe.patch(model, fe.RED())
        fe.patch(model, fe.RED())
    said = [str(w.message) for w in seen if "plain path" in str(w.message)]
    assert said and len(said) == len(set(said)) and all(message.count("a long reason") == 1 for message in said)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_a_ready_batch_padded_on_the_left_is_captured_as_it_stands_alone(family):
    model = tiny.build(family)
    ids = torch.randint(3, tiny.VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    layers = "encoder" if family == "t5" else None
    padded = fe.capture(model, None, [{"input_ids": ids * mask, "attention_mask": mask, "group": [0, 1]}], layers=layers,
                        groups=None, group_names=[0, 1])  # fmt: skip
    alone = fe.capture(model, None, [ids[0, 3:].tolist(), ids[1].tolist()], groups=[0, 1], layers=layers)
    for layer, moments in alone.items():
        torch.testing.assert_close(padded[layer].mean(), moments.mean(), rtol=1e-4, atol=1e-4)


def test_a_model_without_a_head_wants_position_ids_for_it():
    model = tiny.build("gpt2").transformer
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    batch = {"input_ids": torch.full((2, 3), 5), "attention_mask": mask}
    with pytest.raises(ValueError, match="padded on the left and has no position_ids"):
        fe.capture(model, None, [batch])
    fe.capture(model, None, [batch | {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}])
    assert not handles(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_what_needs_numbers_says_so_of_a_model_on_meta(family, tmp_path):
    """`fastedit.load` would copy an edit's numbers to where there are none."""
    edited = tiny.build(family)
    fe.patch(edited, fe.ScaleBias()).save(tmp_path / "edit")
    model = tiny.build(family).to("meta")
    for needs in (
        lambda: fe.load(model, tmp_path / "edit"), lambda: fe.capture(model, None, [[5, 6, 7]], batch_size=1),
        lambda: fe.verify(model, fe.ScaleBias(False)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"needs numbers, and .* is on the meta device, which holds none: give"):
            needs()
        assert "fastedit" not in model._modules
    handle = fe.patch(model, fe.ScaleBias())
    given = {name: torch.ones(tensor.shape) for name, tensor in handle.named_tensors().items()}
    for needs in (
        lambda: handle.save(tmp_path / "other"), lambda: handle.load_tensors(given), lambda: handle.explain(torch.tensor([[5]])),
        lambda: model.save_pretrained(tmp_path / "m"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="is on the meta device"):
            needs()
    assert [path.name for path in tmp_path.iterdir()] == ["edit"]
