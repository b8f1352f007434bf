"""Arguments of every kind, right and wrong, drawn by hypothesis; `make arguments` does it at length."""

import pytest
import torch

import fastedit as fe
from tools.argued import models, ops
from tools.argued.__main__ import over_models, over_ops


@pytest.mark.parametrize("name", ops.OPS)
def test_an_op_is_right_or_refuses(name):
    row, found = over_ops(name, 250)
    assert not found, "\n".join(found)
    assert row["served"] > 30 and row["refused"] > 30


@pytest.fixture(scope="module")
def world():
    with models.world() as made:
        yield made


@pytest.mark.parametrize("name", models.TARGETS)
def test_what_takes_a_model_is_right_or_refuses_and_changes_nothing(world, name):
    row, found = over_models(world, name, 25)
    assert not found, "\n".join(found)
    assert row["refused"] > 5


def test_a_fault_would_be_found(world, monkeypatch):
    """An op that scales wrongly, one that takes what it should not, and a refusal that leaves a trace."""
    sound = ops.ops.project
    monkeypatch.setattr(ops.ops, "project", lambda hidden, read, offset=None: sound(hidden, read, offset) * 1.001)
    assert over_ops("project", 60)[0]["findings"]
    monkeypatch.setattr(ops.ops, "project", lambda hidden, read, offset=None: torch.zeros(3))
    assert over_ops("project", 60)[0]["findings"]
    monkeypatch.undo()

    def leaves_a_trace(model, *_, **__):
        model.left = True
        raise ValueError("expected something else than what was given")

    monkeypatch.setattr(fe, "patch", leaves_a_trace)
    assert "the model changed" in models.run(world, "patch", {"edits": "red"})[0]
    del world.model.left


@pytest.mark.parametrize("name", models.TARGETS)
def test_no_number_is_too_large_to_be_refused_in_words(world, name):
    """In the place of each argument: 10^400, which no float holds, and 2^63, which no tensor's size or index holds."""
    for argument in models.TARGETS[name].base:
        for number in (10**400, -(10**400), 1 << 63):
            why, _ = models.run(world, name, models.TARGETS[name].base | {argument: number})
            assert why is None, f"{argument}: {why}"


HUGE = (
    lambda model, n: fe.ValueNet(n, 4),
    lambda model, n: fe.ValueNet(8, n),
    lambda model, n: fe.capture(model, None, [[n]]),
    lambda model, n: fe.sweep(model, fe.Directions({0: models.VECTOR}), lambda _: 0.0, doses=[n], layers=[0]),
)


@pytest.mark.parametrize("call", HUGE)
def test_no_number_in_a_list_is_too_large_to_be_refused_in_words(world, call):
    with pytest.raises(ValueError, match=r"expected .*(2\^31|64 bits hold|finite number)"):
        call(world.model, 10**400)


def test_the_last_of_more_tokens_than_there_are_are_all(world):
    found = [fe.capture(world.model, None, models.IDS, at=f"last {k}")[1].mean() for k in (10**30, 100)]
    assert torch.equal(*found)


def test_what_is_neither_true_nor_false_is_refused_in_words(world):
    directions = fe.Directions({0: models.VECTOR}, {0: {"norm": 1.0, "residual": 2.0}}, {})
    with fe.patch(world.model, fe.Steer(models.VECTOR, site="mlp")) as handle:
        for call in (
            lambda flag: handle.merge(fp32=flag),
            lambda flag: fe.patch(world.model, fe.RED(), fused=flag),
            lambda flag: fe.patch(world.model, fe.RED(), freeze=flag),
            lambda flag: fe.sweep(world.model, directions, lambda _: 0.0, doses=[1.0], layers=[0], control=flag),
            lambda flag: fe.contrast(world.model, None, models.IDS, models.IDS, centre=flag),
        ):
            for flag in (torch.ones(2), torch.ones(2, 0), None, "no"):
                with pytest.raises(TypeError, match="expected True or False"):
                    call(flag)


def test_strengths_and_thresholds_that_are_no_numbers_are_refused_in_words(world):
    with pytest.raises(ValueError, match=r"threshold is .*expected a finite number"):
        fe.Gate(models.VECTOR, threshold=torch.ones(3, device="meta"))
    bank = fe.Bank(world.model, 2)
    try:
        bank.add("a", fe.Steer(models.VECTOR, site="mlp"))
        for strengths in (1j, object(), torch.float32, "1"):
            with pytest.raises(TypeError, match=r"strengths is .*expected one number, or one for each name"):
                bank.assign(["a"], strengths)
    finally:
        bank.close()
