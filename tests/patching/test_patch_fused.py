"""The fused path: that it is used, what it costs, and where it steps back."""

import copy

import pytest
import tiny_models as tiny
import torch
import torch.utils._python_dispatch as dispatch
from patch_cases import everything, paths, scrambled, tiny_plain

import fastedit as fe
from fastedit.patching.handle import handles
from fastedit.patching.residual_add import Add, Norm
from fastedit.patching.site import Ride, Stage

# --- what it does -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_add_is_fused_without_a_warning(family):
    model = tiny.build(family)
    handle = tiny.quiet(fe.patch, model, [fe.ScaleBias(site=site) for site in ("mlp", "attn", "block")])
    plain = {"block"} if family in ("bert", "roberta") else set()
    assert {site for site, path in paths(handle).items() if path != "fused"} == plain


@pytest.mark.parametrize("on_sum", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_identity_edit_is_the_plain_add_to_the_bit(dtype, on_sum):
    model = tiny.build("llama")
    handle = fe.patch(model, [fe.RED(), fe.ScaleBias(site="mlp")])
    x, residual = torch.randn(2, 3, 5, tiny.WIDTH).to(dtype)
    masters = [m for _, _, m in handle._each()]
    for several in (masters[:1], [masters[0], masters[3]]):
        site = FakeSite([Stage(several)])
        add = Add(sum=site) if on_sum else Add(x=site)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                assert torch.equal(add(x, residual), residual + x)


class FakeSite:
    def __init__(self, stages):
        self.stages, self.ride = stages, Ride(())


def test_identity_edits_leave_the_bits_where_no_norm_is_fused():
    model = tiny.build("t5")
    before = tiny.output(model, "t5")
    for site in ("mlp", "attn", "block"):
        with fe.patch(model, fe.ScaleBias(site=site, layers=[1, 3])) as handle:
            assert paths(handle) == {site: "fused"}
            assert torch.equal(tiny.output(model, "t5"), before)
            scrambled(handle)
            assert not torch.equal(tiny.output(model, "t5"), before)


class Counter(dispatch.TorchDispatchMode):
    """Counts operations that compute; views and allocations are free."""

    free = (
        "view", "_unsafe_view", "reshape", "empty", "empty_like", "t", "transpose", "expand", "slice",
        "select", "unsqueeze", "detach", "alias", "split", "permute", "as_strided", "lift_fresh",
    )  # fmt: skip

    def __init__(self, monkeypatch):
        super().__init__()
        self.count = 0
        for owner, name in ((fe.ops, "edit"), (fe.ops, "edit_add"), (fe.ops, "edit_add_norm")):
            self._watch(monkeypatch, owner, name)

    def _watch(self, monkeypatch, owner, name):
        real = getattr(owner, name)

        def counted(*args, **kwargs):
            self.count += 1
            with dispatch._disable_current_modes():
                return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.__name__.partition(".")[0] not in self.free
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("site", ["mlp", "attn", "block"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_operations_of_an_edited_layer(family, site, monkeypatch):
    model, layers = tiny.build(family), tiny.number_of_layers(family)

    def operations(**patch):
        edited = fe.patch(model, fe.ScaleBias(site=site), **patch) if patch else torch.no_grad()
        with edited, monkeypatch.context() as patched, Counter(patched) as counter:
            tiny.output(model, family)
        return counter.count

    unedited = operations()
    assert operations(fused=False) == unedited + layers
    if site == "block" and family in ("bert", "roberta"):
        assert operations(fused=True) == unedited + layers
    else:
        assert operations(fused=True) <= unedited


def test_a_whole_stack_of_edits_costs_no_operation(monkeypatch):
    model, count = tiny.build("llama"), {}
    for patched in (False, True):
        if patched:
            fe.patch(model, everything())
            tiny.output(model, "llama")  # the first forward folds
        with monkeypatch.context() as patches, Counter(patches) as counter:
            tiny.output(model, "llama")
        count[patched] = counter.count
    assert count[True] <= count[False]


# --- what it steps back for ---------------------------------------------------------------------------------


def between(family, layer):
    """Modules whose outputs other people may watch or change, in one layer."""
    names = {
        "llama": [
            "mlp",
            "mlp.down_proj",
            "self_attn.o_proj",
            "post_attention_layernorm",
            "input_layernorm",
            "",
        ],
        "gpt2": ["mlp", "mlp.c_proj", "mlp.dropout", "attn.c_proj", "ln_2", "ln_1", ""],
        "bert": ["output", "output.dense", "output.LayerNorm", "attention.output.dense", ""],
        "roberta": ["output.dense", "attention.output.LayerNorm"],
        "t5": ["layer.0.SelfAttention.o", "layer.0.layer_norm", "layer.0", ""],
    }[family]
    return [(name, layer.get_submodule(name)) for name in names]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_hooks_see_and_change_what_they_do_on_the_plain_path(family):
    model = tiny.build(family)
    scrambled(fe.patch(model, [fe.ScaleBias(site=site) for site in ("mlp", "attn", "block")]))
    plain = tiny_plain(model)
    for number in (0, 1):
        for name, _ in between(family, tiny.site_module(model, family, "block", number)):
            seen, results = [], []
            for edited in (model, plain):
                layer = tiny.site_module(edited, family, "block", number)

                def change(module, args, output, seen=seen):
                    rows = output[0] if isinstance(output, tuple) else output
                    seen.append(rows.clone())
                    rows = torch.tanh(rows) * 1.5
                    return (rows, *output[1:]) if isinstance(output, tuple) else rows

                hook = layer.get_submodule(name).register_forward_hook(change)
                results.append(tiny.output(edited, family))
                hook.remove()
            assert len(seen) == 2, name
            torch.testing.assert_close(seen[0], seen[1], rtol=2e-5, atol=2e-5, msg=f"seen at {name!r}")
            torch.testing.assert_close(*results, rtol=2e-5, atol=2e-5, msg=f"after a change at {name!r}")


DROPOUT = {
    "t5": "dropout_rate",
    "gpt2": "resid_pdrop",
    "bert": "hidden_dropout_prob",
    "roberta": "hidden_dropout_prob",
}


@pytest.mark.parametrize("family", DROPOUT)
def test_active_dropout_drops_what_it_drops_on_the_plain_path(family):
    model = tiny.build(family, **{DROPOUT[family]: 0.3}).train()
    scrambled(fe.patch(model, [fe.ScaleBias(site=site) for site in ("mlp", "attn", "block")]))
    results = []
    for edited in (model, tiny_plain(model)):
        torch.manual_seed(4)
        results.append(tiny.output(edited, family))
    torch.testing.assert_close(*results, rtol=2e-5, atol=2e-5)


def test_layer_norm_is_left_to_autocast():
    """On a GPU autocast computes it in fp32, whatever the dtype of its input."""
    x, w = torch.randn(2, 8).bfloat16(), torch.nn.LayerNorm(8).bfloat16()
    norm, wide = Norm(w, "layer", w.eps), Norm(torch.nn.LayerNorm(8), "layer", w.eps)
    assert norm.fits(x, x) and wide.fits(x, x.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert not norm.fits(x, x) and wide.fits(x, x.float())


def test_a_normed_tensor_is_not_carried_past_a_change():
    model = tiny.build("llama")
    scrambled(fe.patch(model, [fe.RED(), fe.ScaleBias(site="block")]))
    plain = tiny_plain(model)
    said = tiny.output(model, "llama")

    shift = torch.linspace(-1, 1, tiny.WIDTH)  # which a norm does not undo, as it would a factor

    def replaced(module, args, output):
        return output + shift

    def in_place(module, args, output):
        return output.add_(shift)

    def in_place_later(module, args):
        args[0].add_(shift)

    for register, change in (("register_forward_hook", replaced), ("register_forward_hook", in_place),
                             ("register_forward_pre_hook", in_place_later)):  # fmt: skip
        results = []
        for edited in (model, plain):
            hook = getattr(edited.model.layers[1], register)(change)
            results.append(tiny.output(edited, "llama"))
            hook.remove()
        torch.testing.assert_close(*results, rtol=2e-5, atol=2e-5)
        assert not torch.allclose(results[0], said, rtol=1e-2, atol=1e-2)


def test_the_carried_norm_is_used_and_let_go():
    model = tiny.build("llama")
    handle = fe.patch(model, fe.RED())
    states = [next(iter(i.states.values())) for i in handle._root.installed.values()]
    assert [s.successor for s in states] == [states[1], states[2], None]
    calls = []
    model.model.layers[1].input_layernorm.forward = counted(
        model.model.layers[1].input_layernorm.forward, calls
    )
    tiny.output(model, "llama")
    assert calls == [1], "a norm whose forward was replaced must be called"
    del model.model.layers[1].input_layernorm.forward
    original, used = type(model.model.layers[1].input_layernorm).forward, []
    try:
        type(model.model.layers[1].input_layernorm).forward = counted_method(original, used)
        tiny.output(model, "llama")
    finally:
        type(model.model.layers[1].input_layernorm).forward = original
    assert len(used) == 2, "the first layer's norm and the last one are all that is left to call"
    assert all(not s.carried for s in states)


def counted(forward, calls):
    return lambda *args: calls.append(1) or forward(*args)


def counted_method(forward, calls):
    return lambda self, *args: calls.append(1) or forward(self, *args)


def test_neighbours_alone_carry():
    model = tiny.build("llama")
    handle = fe.patch(model, fe.RED(layers=[0, 2]))
    assert all(s.successor is None for i in handle._root.installed.values() for s in i.states.values())
    between = fe.patch(model, fe.Steer(torch.ones(tiny.WIDTH), layers=1))
    assert (
        sum(s.successor is not None for i in handle._root.installed.values() for s in i.states.values()) == 2
    )
    between.remove()
    assert all(s.successor is None for i in handle._root.installed.values() for s in i.states.values())


def test_generation_and_hidden_states_are_those_of_the_plain_path():
    model = tiny.build("llama")
    scrambled(fe.patch(model, everything()))
    plain = tiny_plain(model)
    ids = tiny.inputs("llama")
    ways = ({"do_sample": False}, {"num_beams": 2, "do_sample": False})
    for way in ways:
        told = [m.generate(**ids, max_new_tokens=8, **way) for m in (model, plain)]
        assert torch.equal(*told)
    with torch.no_grad():
        states = [m(**ids, output_hidden_states=True, output_attentions=True) for m in (model, plain)]
    for ours, theirs in zip(states[0].hidden_states, states[1].hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


def test_t5_in_fp16_clamps_before_the_edit():
    model = tiny.build("t5", torch.float16)
    block = model.encoder.block[1]
    with torch.no_grad():
        block.layer[1].DenseReluDense.wo.weight.mul_(1e4)
    handle = fe.patch(model, fe.ScaleBias(torch.full((tiny.WIDTH,), 0.5), site="block"))
    assert paths(handle) == {"block": "fused"}
    hidden = torch.full((1, 3, tiny.WIDTH), 6e4, dtype=torch.float16)
    with torch.no_grad():
        fused, plain = block(hidden)[0], tiny_plain(model).encoder.block[1](hidden)[0]
    assert torch.equal(fused, plain)
    assert fused.abs().max() == (65504 - 1000) / 2, "an overflow is clamped first, then halved"


def test_copies_of_a_fused_model_carry_among_themselves():
    model = tiny.build("llama")
    handle = fe.patch(model, fe.RED())
    other = copy.deepcopy(model)
    (copied,) = handles(other)
    ours = {id(s) for i in handle._root.installed.values() for s in i.states.values()}
    theirs = [s for i in copied._root.installed.values() for s in i.states.values()]
    assert all(id(s) not in ours and id(s.successor) not in ours for s in theirs)
    assert [s.module for s in theirs] == list(other.model.layers)
