"""Patched models whose kernels take the gate: beside the coefficient made of the same gate, and plain hooks."""

import collections
import copy

import pytest
import tiny_models as tiny
import torch
from gate_cases import prompts, vector

import fastedit as fe
from fastedit.edits.per_layer import Spot
from fastedit.ops import public
from fastedit.patching import residual_add as adds
from fastedit.patching.rows.gate_sensors import Sensor

OPEN = fe.Gate(torch.zeros(tiny.WIDTH), threshold=-1.0)  # of any rows: `gate & OPEN` is `gate`, but no kernel's
SITES = ["mlp", "attn", "block"]
KINDS = [("dot", None), ("dot", 2.0), ("cosine", None), ("cosine", 9.0)]


def batch():
    ids, mask = prompts()
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}


def seen_at(model, site, layer, family="llama"):
    """Hidden states (rows, width) at a site, of real tokens, in float64."""
    found = []
    module = tiny.site_module(model, family, site, layer)
    hook = module.register_forward_hook(lambda m, a, out: found.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(**batch())
    hook.remove()
    return found[0].double()[batch()["attention_mask"].bool()]


def gate_for(model, site, layer, kind, sharpness):
    """A gate between the scores of real tokens, in the middle of a gap: no rounding moves one across."""
    condition = vector(2)
    rows = seen_at(tiny.exact(model), site, layer)
    s = rows @ condition.double() / (rows.norm(dim=-1) * condition.double().norm() if kind == "cosine" else 1)
    ordered = s.sort().values
    middle = ordered[len(s) // 4 : -(len(s) // 4)]
    at = int(middle.diff().argmax())
    return fe.Gate(condition, threshold=float(middle[at : at + 2].mean()), kind=kind, sharpness=sharpness)


def hidden_states(model):
    with torch.no_grad():
        out = model(**batch(), output_hidden_states=True)
    return torch.cat([h[batch()["attention_mask"].bool()] for h in (*out.hidden_states, out.logits)], -1)


def logits(model):
    with torch.no_grad():
        return model(**batch()).logits[batch()["attention_mask"].bool()]


def both_ways(model, edit, gate, **options):
    """Hidden states and logits with the kernel's gate, and with a coefficient made of the same one."""
    found = []
    for rule in (gate, gate & OPEN):
        with fe.patch(model, edit.when(rule), **options) as handle:
            stages = [stage for site in model.fastedit.sites.values() for stage in site.stages]
            assert all((stage.looks is not None) == (rule is gate) for stage in stages)
            found.append((hidden_states(model), {row["path"] for row in handle.report().rows}))
    return found


@pytest.mark.parametrize("kind, sharpness", KINDS)
@pytest.mark.parametrize("site", SITES)
def test_the_kernels_gate_is_the_coefficient_made_of_it(site, kind, sharpness):
    model = tiny.build("llama")
    gate = gate_for(model, site, 1, kind, sharpness)
    unedited = hidden_states(model)
    for edit in (fe.Steer(vector(8), site=site, layers=1), fe.Ablate(vector(9), site=site, layers=1, strength=0.6)):
        (ours, path), (made, _) = both_ways(model, edit, gate)
        assert path == {"fused"}
        torch.testing.assert_close(ours, made, rtol=1e-5, atol=1e-5)
        moved = (ours - unedited).abs().amax(-1) > 1e-4
        assert moved.any() and (sharpness is not None or not moved.all())
        if sharpness is None and site != "block" and kind == "dot":
            assert torch.equal(ours, made)


@pytest.mark.parametrize("where", [{"positions": "prompt"}, {"positions": "last 2"}, {"keep_norm": True}])
@pytest.mark.parametrize("site, kind, sharpness", [("mlp", "cosine", None), ("block", "dot", 2.0)])
def test_with_positions_and_keep_norm(site, kind, sharpness, where):
    model = tiny.build("llama")
    gate = gate_for(model, site, 1, kind, sharpness)
    (ours, path), (made, _) = both_ways(model, fe.Steer(vector(8), site=site, layers=1, strength=0.7, **where), gate)
    torch.testing.assert_close(ours, made, rtol=1e-5, atol=1e-5)
    assert path == ({"fused"} if "positions" in where else {"plain: keep_norm rescales each row after the edit"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind, sharpness", [("dot", 2.0), ("cosine", None)])
@pytest.mark.parametrize("site", ["mlp", "block"])
def test_against_plain_hooks(site, kind, sharpness, dtype):
    """The numerics promise behind a gate that no rounding can flip."""
    model = tiny.build("llama", dtype)
    gate = gate_for(model, site, 1, kind, sharpness)
    condition, threshold = gate.condition.all()[0], gate.threshold.all()[0]

    def slow(model):
        slow = copy.deepcopy(model)

        def hook(module, args, output):
            h = output[0] if isinstance(output, tuple) else output
            wide = torch.promote_types(h.dtype, torch.float32)
            s = (h.to(wide) * condition.to(wide)).sum(-1, keepdim=True)
            s = s / h.to(wide).norm(dim=-1, keepdim=True).clamp_min(1e-30) if kind == "cosine" else s
            g = (s > threshold).to(wide) if sharpness is None else torch.sigmoid(sharpness * (s - threshold))
            h = (h + g * vector(8).to(wide)).to(h.dtype)
            return (h, *output[1:]) if isinstance(output, tuple) else h

        tiny.site_module(slow, "llama", site, 1).register_forward_hook(hook)
        return logits(slow)

    with fe.patch(model, fe.Steer(vector(8), site=site, layers=1).when(gate)):
        ours = logits(model)
    tiny.assert_promise(ours, slow(model), slow(tiny.exact(model)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("site", SITES)
def test_a_gated_edit_is_the_one_op_that_the_ungated_one_is(family, site, monkeypatch):
    calls = collections.Counter()

    def counted(name, real):
        def call(*args):
            done = real(*args)
            calls[name] += done is not None
            return done

        return call

    for op in ("edit", "edit_add", "edit_add_norm"):
        monkeypatch.setattr(public, f"try_{op}", counted(op, getattr(public, f"try_{op}")))
    monkeypatch.setattr(public, "try_project", counted("project by ops", public.try_project))
    model = tiny.build(family)
    gate, found = fe.Gate(vector(2), kind="cosine"), []
    for rule in (None, gate, gate & OPEN):
        edit = fe.Steer(vector(8), site=site)
        with fe.patch(model, edit if rule is None else edit.when(rule)) as handle:
            calls.clear()
            with torch.no_grad():
                tiny.output(model, family)
            found.append(dict(calls))
            layers = len(handle.report().rows)
    ungated, gated, composed = found
    assert gated == ungated and "edit" not in gated
    assert composed["project by ops"] >= layers
    assert (composed.get("edit") == layers) == (site == "block")  # a sum that is looked at first is edited in an op more


def test_what_no_kernel_takes_stays_a_coefficient():
    model, one = tiny.build("llama"), fe.Gate(vector(1))
    looks = "plain: its gate looks at the sum before it is edited"
    for rule, path in (
        (one, "fused"), (fe.Gate(vector(1), kind="cosine", sharpness=2.0), "fused"), (one & one, looks), (~one, looks),
        (fe.Gate(vector(1), kind="cast"), looks), (fe.Gate(vector(1), decide="prompt"), looks),
        (fe.Gate(vector(1), layer=0), "fused"),
    ):  # fmt: skip
        with fe.patch(model, fe.Steer(vector(2), layers=[1, 2]).when(rule)) as handle:
            assert {row["path"] for row in handle.report().rows} == {path}
            stages = [s for site in model.fastedit.sites.values() for s in site.stages if hasattr(s, "gating")]
            assert all((stage.looks is not None) == (path == "fused" and rule.layer is None) for stage in stages)


@pytest.mark.parametrize("site, kind, sharpness, checkpointing", [
    ("mlp", "dot", 2.0, False), ("mlp", "cosine", None, True), ("block", "dot", None, False), ("block", "cosine", 9.0, False),
    ("block", "dot", 2.0, True),
])  # fmt: skip
def test_gradients(site, kind, sharpness, checkpointing):
    model = tiny.build("llama").train()
    gate = gate_for(model, site, 1, kind, sharpness)
    weight = torch.randn(4, 8, tiny.VOCABULARY, generator=torch.Generator().manual_seed(3))
    weight = weight * batch()["attention_mask"][..., None]
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    found = []
    for rule in (gate, gate & OPEN):
        with fe.patch(model, fe.Steer(vector(8), site=site, layers=1).when(rule)):
            model.zero_grad()
            logits = model(**batch()).logits
            (logits * weight).sum().backward()
            with torch.no_grad():
                without = model(**batch()).logits
            real = batch()["attention_mask"].bool()
            torch.testing.assert_close(logits.detach()[real], without[real], rtol=1e-5, atol=1e-5)
        found.append([p.grad.clone() for p in model.model.layers[:2].parameters()])
    for ours, made in zip(*found, strict=True):
        torch.testing.assert_close(ours, made, rtol=1e-4, atol=1e-4 * float(made.abs().max()))


def test_a_hard_gate_asks_for_no_gradient():
    """Training behind one keeps what training at a fixed coefficient keeps: nothing is computed for the gate."""
    model = tiny.build("llama")
    gate = gate_for(model, "block", 1, "dot", None)
    with fe.patch(model, fe.Steer(vector(8), layers=1).when(gate)):
        found = model(**batch()).logits
    nodes, names = [found.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in names:
            names.add(node)
            nodes += [following for following, _ in node.next_functions]
    assert not any("ProjectFunction" in type(node).__name__ for node in names)
    assert any("EditAdd" in type(node).__name__ for node in names)


def test_compiled():
    model = tiny.build("llama", num_hidden_layers=2)
    hard, soft = gate_for(model, "mlp", 0, "dot", None), gate_for(model, "block", 1, "cosine", 9.0)
    edits = [fe.Steer(vector(8), site="mlp", layers=0).when(hard), fe.Steer(vector(9), site="block", layers=1).when(soft)]
    handle = fe.patch(model, edits)
    real = batch()["attention_mask"].bool()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        compiled(**batch())
        for strength in (1.0, 0.4):
            handle.strength = strength
            with torch.compiler.set_stance("fail_on_recompile"):
                got = compiled(**batch()).logits
            torch.testing.assert_close(got[real], model(**batch()).logits[real], rtol=1e-4, atol=1e-4)


def test_the_rule_follows_its_threshold_and_stays_where_it_is():
    model = tiny.build("llama")
    handle = fe.patch(model, fe.Steer(vector(8), layers=1).when(fe.Gate(vector(2), threshold=-1e9)))
    (sensor,) = (m for m in model.fastedit.modules() if isinstance(m, Sensor))
    opened, rule = hidden_states(model), sensor.gate()[1]
    name = next(n for n in handle.named_tensors() if n.endswith("threshold"))
    handle.load_tensors(handle.named_tensors() | {name: torch.tensor([1e9])})
    assert sensor.gate()[1].data_ptr() == rule.data_ptr() and rule.tolist() == [1e9, 0, 0]
    shut = hidden_states(model)
    assert not torch.equal(shut, opened)
    copied = copy.deepcopy(model)
    state = copied.state_dict()
    with torch.no_grad():
        next(t for n, t in state.items() if n.endswith("threshold")).fill_(-1e9)
    assert torch.equal(hidden_states(copied), opened) and torch.equal(hidden_states(model), shut)
    model.load_state_dict({n: t.clone() for n, t in state.items()}, assign=True)
    assert torch.equal(hidden_states(model), opened)
    model.to(torch.bfloat16)
    assert sensor.gate()[1].dtype is torch.float32 and sensor.gate()[0].dtype is torch.float32
    handle.remove()


def test_a_gate_of_another_width_never_reaches_a_kernel():
    sensor = Sensor(fe.Gate(torch.ones(32)), "g", Spot("layers.0", 0, 1), 32, "cpu")
    form, rows = (None, torch.ones(64), None, None, None), torch.ones(3, 64)
    with torch.no_grad():
        for call in (lambda: adds.edit(rows, form, None, sensor), lambda: adds.add(rows, rows, form, None, True, looks=sensor)):
            with pytest.raises(ValueError, match=r"gate has shape \(32,\), expected \(64\)"):
                call()


def test_under_autocast():
    model = tiny.build("llama")
    gate = gate_for(model, "mlp", 1, "dot", 2.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for site in ("mlp", "block"):
            (ours, _), (made, _) = both_ways(model, fe.Steer(vector(8), site=site, layers=1), gate)
            torch.testing.assert_close(ours, made, rtol=0.05, atol=0.05)
