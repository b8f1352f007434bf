"""What gates compute: gradients, the kernels' promise, closed rows' bits, kept norms, a paper's gate."""

import copy

import pytest
import tiny_models as tiny
import torch
from gate_cases import ATOL, LAYERS, LEAVES, Slow, check_steps, gate, generated, patched, prompts, said, vector
from patch_cases import random_form

import fastedit as fe
from fastedit.edits.per_layer import Spot
from fastedit.patching.rows.gate_sensors import Sensor


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["soft dot", "soft cosine, prompt", "cosine, prompt mean", "cast", "elsewhere or not here"])
def test_gradients_flow_through_soft_gates(name, fused):
    model, _handle, slow = patched("llama", name, ("mlp", "block") if fused else ("block",), fused)
    if name == "elsewhere or not here":
        model, _handle, slow = patched("llama", name, ("block",), fused)
    ids, mask = prompts()
    weight = torch.randn(4, 8, tiny.VOCABULARY, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weight = weight * mask[..., None]
    (model(input_ids=ids, attention_mask=mask, use_cache=False).logits * weight).sum().backward()
    (slow.logits(ids, mask, 8) * weight).sum().backward()
    pairs = list(zip(model.model.layers[0].parameters(), slow.model.model.layers[0].parameters(), strict=True))
    for mine, theirs in pairs:
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=1e-7 * float(theirs.grad.abs().max()))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["soft cosine, prompt", "elsewhere, prompt"])
def test_checkpointing(name, reentrant):
    grads = []
    for checkpointing in (False, True):
        model, handle, _ = patched("llama", name)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        losses = []
        for left in (True, False):
            ids, mask = prompts(left)
            handle.prompt(mask.sum(1))  # all of it, which training must say
            losses.append(model(input_ids=ids, attention_mask=mask, use_cache=False).logits.square().sum())
        if checkpointing and reentrant and name == "elsewhere, prompt":
            with pytest.raises(RuntimeError, match="does not cross a reentrant checkpoint"):
                losses[0].backward()
            return
        for loss in losses:
            loss.backward()
        grads.append([p.grad.clone() for p in model.model.layers.parameters()])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-9, atol=1e-9 * float(plain.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [True, False])
def test_the_kernels_promise_holds_behind_a_gate(dtype, fused):
    """With gates that no rounding can flip: of the same rows in the slow models, eager and exact."""
    model = tiny.build("llama", dtype)
    ids, mask = prompts()
    form = random_form(seed=3)
    name, edits = "dot, prompt", [(site, layer, form) for site in ("mlp", "block") for layer in LAYERS]
    eager, exact = (Slow(m, "llama", name, edits) for m in (model, tiny.exact(model)))
    eager.model.to(dtype)
    with torch.no_grad():
        eagerly, reference = eager.logits(ids, mask, 8), exact.logits(ids, mask, 8)
        assert all(torch.equal(a.double(), b) for a, b in zip(eager.coefficients, exact.coefficients, strict=True))
        low_rank = [fe.Form(*form.tensors())]
        fe.patch(model, [_Whole(low_rank[0], site=s, layers=LAYERS).when(gate(name)) for s in ("mlp", "block")], fused=fused)
        got = model(input_ids=ids, attention_mask=mask).logits
    tiny.assert_promise(got[mask.bool()], eagerly[mask.bool()], reference[mask.bool()])


class _Whole(fe.Edit):
    """A form with all its parts as one edit, so that both models apply it in one step."""

    def __init__(self, form, **where):
        self.whole = form
        super().__init__(("scale", "bias", "read", "offset", "write"), rank=form.rank, **where)

    def values(self, spot, width):
        return dict(zip(self.names, self.whole.tensors(), strict=True))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("site", ["mlp", "block"])
def test_rows_behind_a_closed_gate_keep_their_bits(site, fused):
    model = tiny.build("llama", torch.bfloat16)
    ids, mask = prompts()
    before = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    for keep_norm in (False, True):
        shut = fe.Steer(vector(1), site=site, keep_norm=keep_norm).when(fe.Gate(vector(2), threshold=1e9))
        with fe.patch(model, shut, fused=fused):
            after = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    one = fe.Steer(vector(1), site=site, layers=0).when(fe.Gate(vector(2), kind="cosine", decide="prompt"))
    with fe.patch(model, one, fused=fused):
        after = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    same = [bool(torch.equal(a[m], b[m])) for a, b, m in zip(before[1], after[1], mask.bool(), strict=True)]
    assert any(same) and not all(same)


@pytest.mark.parametrize("sites", [("mlp",), ("block",), ("attn", "mlp", "block")])
@pytest.mark.parametrize("name", ["dot", "soft cosine, prompt"])
def test_keep_norm(name, sites):
    model, handle, slow = patched("llama", name, sites, keep_norm=True)
    ids, mask = prompts()
    sequences, logits = generated(model, ids, mask)
    check_steps(slow, sequences, logits, mask, 8)
    assert all(row["path"] == "plain: keep_norm rescales each row after the edit" for row in handle.report().rows)


def test_keep_norm_without_a_gate_keeps_the_norm_and_the_direction_of_the_edit():
    model = tiny.build("llama")
    seen = {}
    layer = model.model.layers[1].mlp.down_proj
    ids, _mask = prompts()
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda m, a, out: seen.update(plain=out))
    with torch.no_grad():
        model(ids)
        handle = fe.patch(model, fe.Steer(vector(1), site="mlp", layers=1, keep_norm=True))
        x = layer(torch.ones(2, 48))
    handle.remove()
    with torch.no_grad():
        plain = layer(torch.ones(2, 48))
    expected = plain + vector(1)
    expected = expected * plain.norm(dim=-1, keepdim=True) / expected.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(x, expected)


def test_inferaligners_gate():
    """g_l once per prompt at its last token: 1 if x · s_l + b_l > 0, at the layer of the edit (arXiv 2401.11206)."""
    model = tiny.exact(tiny.build("llama"))
    s, b = torch.stack([vector(n) for n in (11, 12, 13)]), [0.4, -0.6, 0.1]
    ids, mask = prompts()
    slow = copy.deepcopy(model)
    decided = []

    def hook(number):
        def edit(module, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            g = (hidden[:, -1] @ s[number].double() + b[number] > 0).double()
            decided.append(g)
            return hidden + 0.5 * g[:, None, None] * vector(8).double()

        return edit

    for number, layer in enumerate(slow.model.layers):
        layer.register_forward_hook(hook(number))
    gate = fe.Gate(s, threshold=[-x for x in b], kind="dot", decide="prompt")
    fe.patch(model, fe.Steer(vector(8), strength=0.5).when(gate))
    with torch.no_grad():
        given = {"input_ids": ids, "attention_mask": mask}
        torch.testing.assert_close(model(**given).logits, slow(**given).logits, rtol=1e-6, atol=ATOL)
    assert 0 < sum(float(g.sum()) for g in decided) < 12


def test_what_a_gate_says_is_bounded_where_rows_are_zero():
    sensor = Sensor(fe.Gate(vector(1), kind="cosine"), "g", Spot("layers.0", 0, 1), 32, "cpu")
    for kind in ("cosine", "cast"):
        sensor.kind = kind
        rows = torch.zeros(2, 32, requires_grad=True)
        score = sensor.score(rows)
        assert torch.equal(score, torch.zeros(2))
        score.sum().backward()
        assert rows.grad.isfinite().all()


def test_left_out_padding_is_not_in_the_mean():
    hidden = torch.randn(4, 8, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = prompts()[1]
    given = LEAVES["cosine, prompt mean"][0]
    assert not torch.equal(said(hidden, given, mask, 8), said(hidden, given, torch.ones_like(mask), 8))
