"""Handles of edits at some positions: recomputation, removal, files, strength, compiled decoding, what is refused."""

import copy

import pytest
import tiny_models as tiny
import torch
from position_cases import SPECS, generated, prompts
from transformers import CompileConfig

import fastedit as fe
from fastedit.edits.positions import Positions, positions
from fastedit.patching.fused_layer import STATE
from fastedit.patching.handle import handles
from fastedit.patching.merge import MergeError


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "t5"])
def test_a_recomputation_has_its_own_forwards_plan(family, reentrant):
    """Two forwards with other prompts, then both backwards: the first one's rows must not be the second's."""
    grads = []
    for checkpointing in (False, True):
        model = tiny.exact(tiny.build(family)).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            for name in ("attention_dropout", "dropout_prob"):
                if hasattr(module, name):
                    setattr(module, name, 0.0)
        handle = fe.patch(model, [fe.RED(positions="first 2"), fe.ScaleBias(site="block", positions="last 1")])
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter.add_(0.1)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        losses = []
        for left in (True, False):
            ids, mask = prompts(left)
            given = {"input_ids": ids, "attention_mask": mask} | ({"decoder_input_ids": ids[:, 1:]} if family == "t5" else {})
            more = {"use_cache": False} if family != "bert" else {}
            handle.prompt(ids.shape[1] if family in ("llama", "gpt2") else None)  # all of it, which training must say
            losses.append(model(**given, **more).logits.square().sum())
        for loss in losses:
            loss.backward()
        grads.append([p.grad.clone() for p in handle.parameters()])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))


def test_a_layer_by_itself_is_refused():
    model = tiny.build("llama")
    fe.patch(model, fe.RED(positions="last 1"))
    with pytest.raises(RuntimeError, match=r"ran outside of LlamaModel\.forward"):
        model.model.layers[0](torch.randn(1, 3, 32), position_embeddings=(torch.ones(1, 3, 8), torch.zeros(1, 3, 8)))


def test_removal_and_other_handles():
    model = tiny.build("llama")
    before = tiny.state(model)
    everywhere = fe.patch(model, fe.RED())
    assert model.model.__dict__[STATE].stack is None, "a plan of each forward though no edit has positions"
    some = fe.patch(model, fe.Steer(torch.randn(32), positions="prompt"))
    assert model.model.__dict__[STATE].stack is not None
    ids, mask = prompts()
    copied = copy.deepcopy(model)
    assert torch.equal(generated(copied, ids, mask)[0], generated(model, ids, mask)[0])
    handles(copied)[1].remove()
    some.remove()
    assert model.model.__dict__[STATE].stack is None
    assert torch.equal(tiny.output(copied, "llama"), tiny.output(model, "llama"))
    everywhere.remove()
    assert type(model.model).__dict__.get("_fastedit_base") is None
    tiny.assert_same_state(model, before)


def test_edits_at_other_positions_do_not_fold():
    model = tiny.build("llama")
    v, s = torch.randn(32), torch.rand(32) + 0.5
    form = fe.Form(scale=s)
    handle = fe.patch(model, [
        fe.ScaleBias(s, False, positions="last 1"), fe.Steer(v, site="mlp"), fe.Steer(v, site="mlp", positions="first 1"),
    ])  # fmt: skip
    slow = copy.deepcopy(model)
    handles(slow)[0].remove()

    def edit(module, args, output):
        rows = output.clone()
        rows[:, -1] = form(rows[:, -1])
        rows += v
        rows[:, 0] += v
        return rows

    for layer in slow.model.layers:
        layer.mlp.down_proj.register_forward_hook(edit)
    ids = prompts()[0][:1]
    torch.testing.assert_close(model(ids).logits, slow(ids).logits, rtol=1e-4, atol=1e-4)
    assert [str(e.positions) for e in handle.edits] == ["last 1", "None", "first 1"]


def test_saved_positions_come_back(tmp_path):
    model = tiny.build("llama")
    handle = fe.patch(model, [fe.RED(positions=spec) for spec in SPECS])
    said = handle.config()
    handle.save(tmp_path / "edit")
    handle.remove()
    assert fe.load(model, tmp_path / "edit").config() == said


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_strength_turns_without_a_new_trace(mode):
    model = tiny.build("llama", num_hidden_layers=1)
    handle = fe.patch(model, [fe.Steer(torch.randn(32), positions="last 2"), fe.Ablate(torch.randn(32), positions="prompt")])
    ids, mask = prompts()
    call = model if mode == "eager" else torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    with torch.no_grad():
        call(**given)
        for strength in (0.3, 2.0, 0.0):
            handle.strength = strength
            with torch.compiler.set_stance("fail_on_recompile" if mode == "compiled" else "default"):
                said = call(**given).logits
            torch.testing.assert_close(said, model(**given).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", ["last 2", {"tokens": list(range(3, 14)), "also": "generated"}], ids=str)
def test_compiled_decoding_with_a_static_cache_is_one_graph(spec):
    model = tiny.build("llama", num_hidden_layers=2)
    handle = fe.patch(model, fe.Steer(torch.randn(32), positions=spec))
    config = CompileConfig(fullgraph=True, backend="eager", mode="default")
    config._compile_all_devices = True
    ids, mask = prompts()
    eager = generated(model, ids, mask)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    static = generated(model, ids, mask, cache_implementation="static", compile_config=config)
    handle.strength = 2.0
    again = generated(model, ids, mask, cache_implementation="static", compile_config=config)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for said, expected in zip(static[1], eager[1], strict=True):
        torch.testing.assert_close(said, expected, rtol=1e-4, atol=1e-4)
    for said, expected in zip(again[1], generated(model, ids, mask)[1], strict=True):
        torch.testing.assert_close(said, expected, rtol=1e-4, atol=1e-4)


WRONG = [
    ("last", ValueError, "expected None or 'all'"), ("first 0", ValueError, "'first 0'"),
    ("first 2 + first 3", ValueError, "twice"),
    ("all + prompt", ValueError, "all tokens"), (3, TypeError, "positions is 3"), ({"tokens": []}, ValueError, "positions is"),
    ({"tokens": [-1]}, ValueError, "whole numbers"), ({"token": [1]}, ValueError, "positions is"),
    ({"tokens": [1], "also": "all"}, ValueError, "all tokens already"),
]  # fmt: skip


@pytest.mark.parametrize("spec, error, message", WRONG, ids=lambda v: str(v)[:20])
def test_wrong_positions(spec, error, message):
    with pytest.raises(error, match=message):
        fe.RED(positions=spec)


def test_wrong_lengths_masks_and_tokens():
    model = tiny.build("llama")
    handle = fe.patch(model, [fe.RED(positions="mask"), fe.Steer(torch.ones(32), positions={"tokens": [5]})])
    ids, _ = prompts()
    for lengths in (0, 1.5, [[1]], [0, 2], [True]):
        with pytest.raises(ValueError, match="lengths is"):
            handle.prompt(lengths)
    for mask in (torch.ones(3), torch.full((1, 3), torch.nan), torch.ones(2, 0)):
        with pytest.raises(ValueError, match="mask h"):
            handle.mask(mask)
    with pytest.raises(RuntimeError, match="no mask was given"):
        model(ids)
    handle.mask(torch.ones(2, 8))
    with pytest.raises(ValueError, match="2 rows, but this forward has 3"):
        model(ids)
    handle.mask(torch.ones(1, 8))
    with pytest.raises(ValueError, match="need input_ids"):
        model(inputs_embeds=model.model.embed_tokens(ids))
    with pytest.raises(MergeError, match="weights act on every token"):
        fe.patch(model, fe.RED(positions="last 1")).merge()


def test_the_words_are_the_parts():
    assert positions("first 4 + last 2") == Positions(first=4, last=2)
    assert positions("all") is None and positions("prompt + generated") is None
    for spec in SPECS:
        assert positions(positions(spec).spec()) == positions(spec)
