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
