"""Gradient checkpointing of patched models: it still recomputes, and nothing is carried past it."""

import json
import os
import pathlib
import subprocess
import sys

import checkpointing
import pytest
import tiny_models as tiny
import torch
import transformers
from patch_cases import scrambled
from torch.utils.checkpoint import checkpoint

import fastedit as fe
from fastedit.patching.handle import handles


def check_survey(found, version):
    assert found.pop("version").startswith(version)
    assert len(found) == 4 * len(tiny.FAMILIES)
    for case, result in found.items():
        assert set(result["calls"]) == {2}, f"{case}: checkpointing recomputed {result['calls']}"
        assert result["apart"] < 1e-4, case
        assert ("fused False" in case) == (result["paths"]["mlp"] != "fused"), (case, result["paths"])


def test_checkpointing_still_recomputes():
    check_survey(checkpointing.survey(), transformers.__version__)


def test_checkpointing_still_recomputes_on_transformers_5_17():
    folder = os.environ.get("FASTEDIT_TRANSFORMERS_517")
    if not folder:
        pytest.skip("FASTEDIT_TRANSFORMERS_517 does not name a folder with transformers 5.17")
    here = pathlib.Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([folder, str(here)])}
    done = subprocess.run(
        [sys.executable, str(here / "checkpointing.py")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    check_survey(json.loads(done.stdout.splitlines()[-1]), "5.17")


def test_checkpointing_a_layer_by_hand():
    model = tiny.build("llama")
    scrambled(fe.patch(model, fe.RED()))
    rope = model.model.rotary_emb(torch.zeros(1, 4, tiny.WIDTH), torch.arange(4)[None])
    grads = []
    for reentrant in (None, False, True):
        states = torch.randn(2, 4, tiny.WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out = states
        for layer in model.model.layers:

            def run(hidden, layer=layer):
                return layer(hidden, position_embeddings=rope)

            out = run(out) if reentrant is None else checkpoint(run, out, use_reentrant=reentrant)
        out.square().sum().backward()
        grads.append(states.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads[2], grads[0], rtol=1e-5, atol=1e-5)
    handle = handles(model)[0]
    assert all(not s.carried for i in handle._root.installed.values() for s in i.states.values())


@pytest.mark.parametrize("reentrant", [True, False])
def test_nothing_is_carried_under_checkpointing(reentrant, monkeypatch):
    model = tiny.build("llama").train()
    fe.patch(model, fe.RED())
    norm, calls = type(model.model.norm), []
    monkeypatch.setattr(norm, "forward", lambda self, h, own=norm.forward: calls.append(self) or own(self, h))
    model(**tiny.inputs("llama"))
    entries = [layer.input_layernorm for layer in model.model.layers]
    assert [n for n in calls if n in entries] == entries[:1], "without checkpointing all others are carried"
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls.clear()
    loss = model(**tiny.inputs("llama"), use_cache=False).logits.sum()
    assert [n for n in calls if n in entries] == entries
    calls.clear()
    loss.backward()
    assert [n for n in calls if n in entries] == entries[::-1], "each recomputed once"
