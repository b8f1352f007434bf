"""`fastedit.verify` and its command: what is right, what is wrong and is seen, what is refused."""

import json

import pytest
import tiny_models as tiny
import torch
import transformers
from typer.testing import CliRunner

import fastedit as fe
from fastedit import verifying
from fastedit.cli import app
from fastedit.verifying import modes

QUICK = [mode for mode in modes.MODES if mode not in ("compile", "threads", "packing")]
WIDTH = 32


def vector(seed=0, width=WIDTH):
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def verdicts(outcome):
    return {row.mode: row.verdict for row in outcome.rows}


def small(name="llama"):
    model = tiny.build(name)
    return model, model.config.hidden_size


def test_an_edited_model_is_right_in_every_mode_and_given_back():
    model, width = small()
    before = tiny.state(model)
    outcome = fe.verify(model, fe.Steer(vector(width=width)), modes=QUICK)
    assert outcome.ok and set(verdicts(outcome).values()) == {"right"} and len(outcome.rows) == len(QUICK) + 1
    assert all(row.effect > 100 * row.difference for row in outcome.rows[1:]), str(outcome)
    tiny.assert_same_state(model, before)
    assert not any(m._forward_hooks for m in model.modules()) and "cache" in str(outcome)


EDITS = {
    "fresh RED": lambda w: fe.RED(),
    "positions": lambda w: fe.Steer(vector(1, w), positions="first 2 + last 1 + generated"),
    "tokens": lambda w: fe.Steer(vector(1, w), positions={"tokens": list(range(3, 30))}),
    "keep norm": lambda w: fe.Steer(vector(1, w), keep_norm=True, strength=0.5),
    "low rank": lambda w: fe.LoReFT(2, site="block", positions="prompt"),
    "gate": lambda w: fe.Steer(vector(1, w)).when(fe.Gate(vector(2, w), kind="cosine", sharpness=2.0)),
    "gate elsewhere": lambda w: fe.Steer(vector(1, w), layers=[-1]).when(
        fe.Gate(vector(2, w), layer=0, decide="prompt mean", sharpness=1.0)
    ),
    "input": lambda w: fe.ScaleBias(site="ffn_in"),
    "two": lambda w: [fe.Ablate(vector(1, w), site="attn"), fe.Steer(vector(2, w), positions="last 2")],
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_every_kind_of_edit_has_a_reference(name):
    model, width = small()
    outcome = fe.verify(model, EDITS[name](width), modes=["forward", "cache", "padding"], new_tokens=3)
    assert set(verdicts(outcome).values()) == {"right"}, str(outcome)


@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_two_stacks_and_fused_projections(family):
    model, edit = tiny.build(family), fe.ScaleBias(site="q" if family == "gpt2" else "mlp", positions="last 1 + generated")
    outcome = fe.verify(model, edit, modes=["forward", "cache", "no cache", "beams"])
    assert outcome.ok and verdicts(outcome)["forward"] == "right", str(outcome)


def test_an_edit_at_another_strength_is_seen(monkeypatch):
    """The model runs at half the strength that its handle says."""

    def dialled(model, edits):
        handle = fe.patch(model, edits, fused=False)
        for _, _, masters in handle._each():
            masters.dial.mul_(0.5)
            masters.dialled = True
        return handle

    monkeypatch.setattr(verifying, "patch", dialled)
    model, width = small()
    outcome = fe.verify(model, fe.Steer(vector(width=width)), modes=["forward", "cache"])
    assert not outcome.ok and verdicts(outcome) == {"layers": "right", "forward": "wrong", "cache": "wrong"}


def test_an_edit_on_other_tokens_is_seen_where_it_matters(monkeypatch):
    """A model that edits generated tokens only in its first forward is right without a cache and wrong with one."""
    from fastedit.patching.site import Stage

    apply = Stage.apply
    monkeypatch.setattr(Stage, "apply", lambda self, h: h if h.shape[-2] == 1 else apply(self, h))
    model, width = small()
    edit = fe.Steer(vector(width=width), site="block", keep_norm=True)
    outcome = fe.verify(model, edit, modes=["forward", "no cache", "cache"])
    assert verdicts(outcome) == {"layers": "right", "forward": "right", "no cache": "right", "cache": "wrong"}


def test_a_layer_left_out_is_seen(monkeypatch):
    def partly(model, edits):
        handle = fe.patch(model, edits)
        handle._members[0] = handle._members[0][:-1]
        return handle

    monkeypatch.setattr(verifying, "patch", partly)
    model, width = small()
    assert verdicts(fe.verify(model, fe.Steer(vector(width=width)), modes=["forward"]))["layers"] == "wrong"


def test_what_cannot_be_patched_is_refused_with_its_reason():
    outcome = fe.verify(tiny.build("llama"), fe.Steer(torch.ones(7)), modes=["forward"])
    assert outcome.ok and verdicts(outcome) == {"patch": "refused"} and "wide" in outcome.rows[0].note


def test_bad_arguments_are_refused_before_anything_runs():
    model, width = small()
    edit = fe.Steer(vector(width=width))
    for message, given in (
        ("there is no mode 'fast'", {"modes": ["fast"]}), ("modes is empty", {"modes": []}),
        ("expected token ids", {"inputs": [torch.ones(2, 2)]}), ("expected a list of requests", {"inputs": "text"}),
        ("expected a batch of one", {"inputs": [{"input_ids": torch.ones(2, 3, dtype=torch.long)}]}),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=message):
            fe.verify(model, edit, **given)
    with fe.patch(model, edit), pytest.raises(ValueError, match="the model is patched"):
        fe.verify(model, edit)


@pytest.fixture
def folder(tmp_path):
    model, width = small()
    model.save_pretrained(tmp_path / "model")
    with fe.patch(model, fe.Steer(vector(width=width))) as handle:
        handle.save(tmp_path / "edit")
    return tmp_path


def test_the_command_says_what_is_right(folder):
    given = ["verify", str(folder / "model"), "--edit", str(folder / "edit"), "--mode", "forward", "--mode", "cache"]
    result = CliRunner().invoke(app, [*given, "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    found = {row["mode"]: row["verdict"] for row in said["rows"]}
    assert said["ok"] and found == dict.fromkeys(("layers", "forward", "cache"), "right")
    result = CliRunner().invoke(app, given[:2] + given[4:6], env={"COLUMNS": "200"})
    assert result.exit_code == 0 and "right" in result.output, result.output


def test_the_command_fails_where_something_is_wrong(folder, monkeypatch):
    wrong = verifying.Outcome(transformers.LlamaModel, [verifying.Row("cache", "wrong", 1.0, 0.1, 2.0)])
    monkeypatch.setitem(vars(fe), "verify", lambda *given, **more: wrong)
    result = CliRunner().invoke(app, ["verify", str(folder / "model")], env={"COLUMNS": "200"})
    assert result.exit_code == 1 and "wrong" in result.output
    assert CliRunner().invoke(app, ["verify", str(folder / "nowhere")]).exit_code == 2
