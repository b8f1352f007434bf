"""Probes: what they read is the projection of the hidden states that a plain hook sees, and nothing changes."""

import copy

import pytest
import tiny_models as tiny
import torch
from gate_cases import PAD, generated, prompts, vector
from transformers import CompileConfig

import fastedit as fe
from fastedit.patching.merge import MergeError
from fastedit.plots.probes import heat_map

VECTORS, OFFSET = torch.stack([vector(1), vector(2)]), torch.tensor([0.5, -1.0])


def seen_by_hooks(model, family, site, call):
    """(layers, batch, tokens, width) at a site, in the model as it is."""
    found, hooks = {}, []
    for layer in range(tiny.number_of_layers(family)):
        def hook(module, args, output, layer=layer):
            found[layer] = output[0] if isinstance(output, tuple) else output

        hooks.append(tiny.site_module(model, family, site, layer).register_forward_hook(hook))
    call(model)
    for hook in hooks:
        hook.remove()
    return torch.stack([found[layer] for layer in sorted(found)])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("site", ["attn", "mlp", "block"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_readings_are_projections(family, site, fused):
    model = tiny.exact(tiny.build(family))
    plain = tiny.output(model, family)
    hidden = seen_by_hooks(copy.deepcopy(model), family, site, lambda m: tiny.output(m, family))
    handle = fe.patch(model, fe.Probe(VECTORS, OFFSET, site=site), fused=fused)
    assert handle.readings == []
    got = tiny.output(model, family)  # whose fused norms round otherwise than the model's own
    assert torch.equal(got, plain) if not fused else torch.allclose(got, plain, rtol=1e-12, atol=1e-12)
    (read,) = handle.readings
    assert read.shape == (3, 2, 7, 2) and not read.requires_grad
    torch.testing.assert_close(read, hidden @ VECTORS.double().T + OFFSET.double(), rtol=1e-6, atol=1e-6)


def test_a_probe_reads_at_its_place_in_the_stack():
    model = tiny.exact(tiny.build("llama"))
    steer = fe.Steer(vector(3))
    handle = fe.patch(model, [fe.Probe(vector(1)), steer, fe.Probe(vector(1)), fe.Probe(vector(2), layers=[2, 0])])
    tiny.output(model, "llama")
    before, after, two = handle.readings
    torch.testing.assert_close(after - before, (vector(1) @ vector(3)).double().expand_as(before), rtol=1e-5, atol=1e-6)
    assert two.shape == (2, 2, 7, 1)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static", "disable_compile": True}, {"prefill_chunk_size": 3}])
def test_generate_joins_its_forwards_by_token(options):
    model = tiny.exact(tiny.build("llama"))
    handle = fe.patch(model, [fe.Steer(vector(3)), fe.Probe(VECTORS)])
    ids, mask = prompts()
    for _ in range(2):
        sequences, _ = generated(model, ids, mask, **options)
    read = handle.readings[0]
    assert read.shape == (3, 4, sequences.shape[1] - 1, 2)
    full = torch.cat([mask, torch.ones(4, 4, dtype=mask.dtype)], 1)
    with torch.no_grad():
        model(input_ids=sequences[:, :-1], attention_mask=full)
    torch.testing.assert_close(read[:, full.bool()], handle.readings[0][:, full.bool()], rtol=1e-6, atol=1e-7)


def test_compiled_forwards():
    model = tiny.build("llama")
    handle = fe.patch(model, fe.Probe(VECTORS, OFFSET))
    ids, mask = prompts()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    with torch.no_grad():
        compiled(**given)
        with torch.compiler.set_stance("fail_on_recompile"):
            compiled(**given | {"input_ids": ids.flip(0), "attention_mask": mask.flip(0)})
        read = handle.readings[0]
        model(**given)
    torch.testing.assert_close(read.flip(1), handle.readings[0], rtol=1e-4, atol=1e-4)


def test_compiled_decoding_is_one_graph():
    model = tiny.build("llama")
    handle = fe.patch(model, fe.Probe(VECTORS))
    config = CompileConfig(fullgraph=True, backend="eager", mode="default")
    config._compile_all_devices = True
    ids, mask = prompts()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    generated(model, ids, mask, cache_implementation="static", compile_config=config)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    last = handle.readings[0]
    generated(model, ids, mask)
    torch.testing.assert_close(last, handle.readings[0][:, :, -1:], rtol=1e-3, atol=1e-3)


def test_training_is_not_disturbed():
    model = tiny.build("llama").train()
    other = copy.deepcopy(model)
    ids, mask = prompts()
    handle = fe.patch(model, fe.Probe(VECTORS), fused=False)
    for m in (model, other):
        m(input_ids=ids, attention_mask=mask).logits.square().sum().backward()
    for mine, theirs in zip(model.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)
    assert not list(handle.parameters())


def test_saved_probes_come_back_and_removal_leaves_nothing(tmp_path):
    model = tiny.build("llama")
    before = tiny.state(model)
    handle = fe.patch(model, fe.Probe({0: vector(1), 2: vector(2)}, 0.5 * torch.ones(1)))
    tiny.output(model, "llama")
    read, config = handle.readings[0], handle.config()
    assert [row["path"] for row in handle.report().rows] == ["reads only"] * 2
    handle.save(tmp_path / "probe")
    handle.remove()
    tiny.assert_same_state(model, before)
    again = fe.load(model, tmp_path / "probe")
    tiny.output(model, "llama")
    assert again.config() == config and torch.equal(again.readings[0], read)
    with pytest.raises(MergeError, match=r"reads and changes nothing|residual stream"):
        again.merge()


@pytest.mark.parametrize("make, error, message", [
    (lambda: fe.Probe(torch.ones(65, 32)), ValueError, "rank 65"),
    (lambda: fe.Probe(VECTORS, torch.ones(3)), ValueError, r"\[2, 3\] probes"),
    (lambda: fe.Probe(VECTORS).when(fe.Gate(vector(1))), TypeError, "changes nothing"),
])  # fmt: skip
def test_wrong_probes(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_an_encoder_and_a_decoder_read_different_tokens():
    model = tiny.build("t5")
    handle = fe.patch(model, [fe.Probe(VECTORS), fe.Probe(VECTORS, layers="decoder")])
    tiny.output(model, "t5")
    with pytest.raises(ValueError, match="a Probe of its own"):
        handle.readings  # noqa: B018
    handle.remove()
    handle = fe.patch(model, [fe.Probe(VECTORS, layers="encoder"), fe.Probe(VECTORS, layers="decoder")])
    tiny.output(model, "t5")
    assert [z.shape for z in handle.readings] == [(2, 2, 7, 2), (2, 2, 5, 2)]


def test_the_heat_map(tmp_path):
    readings = torch.randn(3, 2, 7, 1)
    heat_map(readings, tmp_path / "a.png", tokens=list("abcdefg"), layers=[4, 5, 6], sequence=1)
    assert (tmp_path / "a.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="7"):
        heat_map(readings, tmp_path / "b.png", tokens=["a"])
    with pytest.raises(ValueError, match="expected \\(layers"):
        heat_map(readings[0], tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists() and PAD == 0
