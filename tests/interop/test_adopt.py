"""adopt: the same outputs from fused edits, and the neighbour back in force. PEFT's (IA)³ and RED's wrappers; the
neighbours that are not in the test environment are in test_adopt_peers.py."""

import copy
import io

import pytest
import tiny_models as tiny
import torch
from patch_cases import scrambled
from torch import nn

import fastedit as fe
from fastedit.patching.handle import handles

TARGETS = {
    "llama": ["down_proj", "o_proj"], "gpt2": ["mlp.c_proj", "attn.c_proj"], "bert": ["output.dense"],
    "t5": r".*(SelfAttention\.o|wo)",
}  # fmt: skip


def with_ia3(family, dtype=torch.float32, targets=None, feedforward=()):
    """A PeftModel with random (IA)³ vectors."""
    peft = pytest.importorskip("peft", reason="needs PEFT")
    feedforward = feedforward if isinstance(feedforward, str) else list(feedforward)
    config = peft.IA3Config(
        target_modules=targets or TARGETS[family], feedforward_modules=feedforward, fan_in_fan_out=family == "gpt2"
    )
    model = peft.get_peft_model(tiny.build(family, dtype), config)
    randomise(model, "ia3_l")
    return model.eval()


def randomise(model, name, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if name in path:
                parameter.add_(torch.randn(parameter.shape, generator=g) * 0.3)


def said_by(model, family):
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return tiny.output(inner, family)


class RedWrapper(nn.Module):
    """As RED's authors wrap a linear map."""

    def __init__(self, linear, width, parts=("activation_scaling", "activation_bias")):
        super().__init__()
        self.update_layer = linear
        self.delta_vector = nn.ParameterDict({p: nn.Parameter(torch.randn(1, width) * 0.3) for p in parts})

    @property
    def weight(self):  # whose dtype T5 asks for
        return self.update_layer.weight

    def forward(self, x):
        hidden = self.update_layer(x)
        if "activation_scaling" in self.delta_vector:
            hidden = hidden * self.delta_vector["activation_scaling"]
        if "activation_bias" in self.delta_vector:
            hidden = hidden + self.delta_vector["activation_bias"]
        return hidden


def with_red_wrappers(family, sites=("mlp",), kind=RedWrapper, dtype=torch.float32, **options):
    model = tiny.build(family)
    for layer in range(tiny.number_of_layers(family)):
        for site in sites:
            linear = tiny.site_module(model, family, site, layer)
            path = next(name for name, m in model.named_modules() if m is linear)
            owner, _, name = path.rpartition(".")
            setattr(model.get_submodule(owner), name, kind(linear, tiny.WIDTH, **options))
    return model.to(dtype)


CARRIERS = {
    **{f"(IA)3 on {family}": (family, lambda dtype, f=family: with_ia3(f, dtype)) for family in TARGETS},
    **{
        f"RED wrappers on {family}": (family, lambda dtype, f=family: with_red_wrappers(f, dtype=dtype))
        for family in tiny.FAMILIES
    },
    "RED wrappers on mlp and attn": ("llama", lambda dtype: with_red_wrappers("llama", ("mlp", "attn"), dtype=dtype)),
    "RED scaling alone": ("llama", lambda dtype: with_red_wrappers("llama", parts=("activation_scaling",), dtype=dtype)),
    "RED bias alone": ("llama", lambda dtype: with_red_wrappers("llama", parts=("activation_bias",), dtype=dtype)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CARRIERS)
def test_an_adopted_model_says_the_same_and_comes_back(case, dtype):
    family, build = CARRIERS[case]
    model = build(dtype)
    before, eager = tiny.state(model), said_by(model, family)
    reference = said_by(tiny.exact(model), family)
    handle = tiny.quiet(fe.adopt, model)
    assert handle.model is model and not handle.left
    tiny.assert_promise(said_by(model, family), eager, reference)
    assert {row["path"] for row in handle.report().rows} == {"fused"}
    handle.strength = 0.0
    assert not torch.allclose(said_by(model, family), eager)  # the edits are fastedit's, not the neighbour's
    handle.remove()
    tiny.assert_same_state(model, before)
    assert torch.equal(said_by(model, family), eager)
    handle.remove()


def test_training_flags_and_modules_are_the_same_objects():
    model = with_ia3("llama").train()
    modules, flags = list(model.modules()), [p.requires_grad for p in model.parameters()]
    handle = fe.adopt(model)
    assert [m for m in model.modules() if m not in modules] == list(model.fastedit.modules())
    assert not list(handle.parameters()) and all(m.training for m in modules)
    handle.remove()
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert [p.requires_grad for p in model.parameters()] == flags


def test_an_adopted_edit_is_saved_as_an_ordinary_one(tmp_path):
    model = with_ia3("llama")
    said = said_by(model, "llama")
    fe.adopt(model).save(tmp_path / "edit")
    plain = tiny.build("llama")
    fe.load(plain, tmp_path / "edit")
    torch.testing.assert_close(said_by(plain, "llama"), said, rtol=1e-5, atol=1e-5)


def test_several_active_adapters_multiply():
    peft = pytest.importorskip("peft")
    model = with_ia3("llama")
    model.add_adapter("other", peft.IA3Config(target_modules=["down_proj"], feedforward_modules=[]))
    randomise(model, "other", seed=1)
    model.base_model.set_adapter(["default", "other"])
    eager = said_by(model, "llama")
    with fe.adopt(model):
        torch.testing.assert_close(said_by(model, "llama"), eager, rtol=1e-5, atol=1e-5)
    model.set_adapter("other")
    other = said_by(model, "llama")
    assert not torch.allclose(other, eager)
    with pytest.warns(UserWarning, match=r"o_proj.*none of its adapters \['default'\] is active"):
        handle = fe.adopt(model)
    assert len(handle.adopted) == len(handle.left) == tiny.LAYERS
    torch.testing.assert_close(said_by(model, "llama"), other, rtol=1e-5, atol=1e-5)


def merged(model):
    model.merge_adapter()


def switched_off(model):
    model.base_model.disable_adapter_layers()


def not_finite(model):
    for name, parameter in model.named_parameters():
        if "ia3_l" in name:
            parameter.data[0] = float("inf")


def replaced_forward(model):
    for module in model.modules():
        if hasattr(module, "ia3_l"):
            module.forward = module.forward


def subclassed(model):
    for module in model.modules():
        if hasattr(module, "ia3_l"):
            more = {"forward": lambda self, x: 1.01 * super(type(self), self).forward(x)}
            module.__class__ = type("More", (type(module),), more)


REFUSED = {
    merged: "merged into the weights", switched_off: "switched off", not_finite: "NaN or infinite",
    replaced_forward: "forward was replaced on the instance", subclassed: "gave something else than its formula",
}  # fmt: skip


@pytest.mark.parametrize("change", REFUSED)
def test_what_cannot_be_adopted_is_named_and_left(change):
    model = with_ia3("llama", targets=["down_proj"])
    change(model)
    before = tiny.state(model)
    with pytest.raises(ValueError, match=f"(?s)nothing can be adopted.*layers.0.mlp.down_proj: .*{REFUSED[change]}"):
        fe.adopt(model)
    tiny.assert_same_state(model, before)


def test_places_that_are_no_sites_stay_in_force_beside_adopted_ones():
    model = with_ia3("llama", targets=["lm_head", "down_proj"])
    eager = said_by(model, "llama")
    with pytest.warns(UserWarning, match=r"(?s)left as they were.*lm_head: its output is not a site of this model"):
        handle = fe.adopt(model)
    assert len(handle.adopted) == tiny.LAYERS and len(handle.left) == 1
    torch.testing.assert_close(said_by(model, "llama"), eager, rtol=1e-5, atol=1e-5)


PAPER = {  # (IA)³ as its paper puts it: on keys, values and the input of the FFN's last linear map
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"], {"k", "v", "ffn_in"}),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"], {"q", "k", "v", "ffn_in"}),  # PEFT's own choice for GPT-2
    "bert": (["key", "value", "layer.1.output.dense"], ["layer.1.output.dense"], {"k", "v", "ffn_in"}),
    "t5": (r".*SelfAttention\.[kv]|.*wo", r".*wo", {"k", "v", "ffn_in"}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", PAPER)
def test_ia3_at_the_papers_places(family, dtype):
    targets, feedforward, sites = PAPER[family]
    model = with_ia3(family, dtype, targets=targets, feedforward=feedforward)
    before, eager = tiny.state(model), said_by(model, family)
    reference = said_by(tiny.exact(model), family)
    with tiny.quiet(fe.adopt, model) as handle:
        assert {edit.site for edit in handle.edits} == sites
        tiny.assert_promise(said_by(model, family), eager, reference)
        handle.strength = 0.0
        assert not torch.allclose(said_by(model, family), eager)
    tiny.assert_same_state(model, before)
    assert torch.equal(said_by(model, family), eager)


def test_a_warning_that_is_made_an_error_comes_before_anything_changes():
    model = with_ia3("llama", targets=["lm_head", "down_proj"])
    before = tiny.state(model)
    with pytest.raises(UserWarning, match="left as they were"):
        tiny.quiet(fe.adopt, model)
    tiny.assert_same_state(model, before)


def test_a_wrapper_that_does_more_than_red_is_left():
    class Scaled(RedWrapper):
        def forward(self, x):
            return super().forward(x) * 1.001

    class Reading(RedWrapper):
        def forward(self, x):
            return super().forward(2 * x)

    for kind in (Scaled, Reading):
        with pytest.raises(ValueError, match=r"mlp.down_proj: in a trial .*\(off by"):
            fe.adopt(with_red_wrappers("llama", kind=kind))


def test_a_model_without_neighbours_says_what_was_looked_for():
    model = tiny.build("llama")
    before = tiny.state(model)
    with pytest.raises(ValueError, match=r"carries nothing to adopt; looked for PEFT \(IA\)3"):
        fe.adopt(model)
    tiny.assert_same_state(model, before)
    fe.patch(model, fe.RED())
    with pytest.raises(ValueError, match="adopt first, then patch"):
        fe.adopt(model)


@pytest.mark.parametrize("number", [1, 4])
def test_a_failure_half_way_leaves_the_model_as_it_was(number, monkeypatch):
    from fastedit.patching import installation

    model, calls = with_ia3("llama"), []
    before, said = tiny.state(model), said_by(model, "llama")

    def failing(*args, real=installation.swap):
        calls.append(args)
        if len(calls) == number:
            raise MemoryError("no room")
        return real(*args)

    monkeypatch.setattr(installation, "swap", failing)
    with pytest.raises(MemoryError):
        fe.adopt(model)
    tiny.assert_same_state(model, before)
    assert torch.equal(said_by(model, "llama"), said)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("first", ["adopted", "patched"])
def test_an_edit_patched_afterwards_acts_behind_and_handles_leave_in_any_order(first, fused):
    model = with_ia3("llama")
    said = said_by(model, "llama")
    before = tiny.state(model)
    slow = copy.deepcopy(model)
    own = {"adopted": fe.adopt(model)}
    own["patched"] = scrambled(fe.patch(model, fe.ScaleBias(site="mlp"), fused=fused))
    scrambled(fe.patch(slow, fe.ScaleBias(site="mlp")))
    expected = said_by(slow, "llama")  # (IA)³ in the wrapper, then the patch
    torch.testing.assert_close(said_by(model, "llama"), expected, rtol=1e-5, atol=1e-5)
    own.pop(first).remove()
    left = expected if first == "adopted" else said
    torch.testing.assert_close(said_by(model, "llama"), left, rtol=1e-5, atol=1e-5)
    next(iter(own.values())).remove()
    tiny.assert_same_state(model, before)
    assert torch.equal(said_by(model, "llama"), said)


def test_peft_cannot_change_an_adopted_adapter_unnoticed():
    model = with_ia3("llama")
    said = said_by(model, "llama")
    handle = fe.adopt(model)
    with pytest.raises(RuntimeError, match=r"cannot be switched off now: handle.remove\(\) first"), model.disable_adapter():
        pass
    for change in (model.merge_adapter, lambda: model.set_adapter("default")):
        with pytest.raises(RuntimeError, match=r"handle\.remove"):
            change()
    torch.testing.assert_close(said_by(model, "llama"), said, rtol=1e-5, atol=1e-5)
    handle.remove()
    with model.disable_adapter():
        assert not torch.allclose(said_by(model, "llama"), said)
    assert torch.equal(said_by(model, "llama"), said)


def test_hooks_of_others_stay_in_force_and_see_the_edited_output():
    model, seen = with_ia3("llama", targets=["down_proj"]), {}
    wrapper = model.base_model.model.model.layers[0].mlp.down_proj

    def watch(name):
        return lambda module, args, output: seen.setdefault(name, output)

    before = wrapper.register_forward_hook(watch("around")), wrapper.base_layer.register_forward_hook(watch("inside"))
    said_by(model, "llama")
    expected = dict(seen)
    handle = fe.adopt(model)
    seen.clear()
    wrapper.register_forward_hook(watch("later"))
    said_by(model, "llama")
    torch.testing.assert_close(seen["around"], expected["around"])
    torch.testing.assert_close(seen["inside"], expected["inside"])
    assert not torch.allclose(seen["inside"], seen["around"]) and seen["later"] is seen["around"]
    handle.remove()
    assert len(wrapper._forward_hooks) == 2 and before[0].id in wrapper._forward_hooks


def test_layers_that_accelerate_has_hooked():
    hooks = pytest.importorskip("accelerate.hooks", reason="needs accelerate")
    model, calls = with_ia3("llama", targets=["down_proj"]), []

    class Counting(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    wrappers = [layer.mlp.down_proj for layer in model.base_model.model.model.layers]
    for wrapper in wrappers:
        hooks.add_hook_to_module(wrapper, Counting())
    eager = said_by(model, "llama")
    handle = fe.adopt(model)
    torch.testing.assert_close(said_by(model, "llama"), eager, rtol=1e-5, atol=1e-5)
    handle.strength = 0.0
    assert not torch.allclose(said_by(model, "llama"), eager)
    handle.remove()
    assert torch.equal(said_by(model, "llama"), eager) and calls == wrappers * 4


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_of_an_adopted_model_is_given_back_by_itself(way):
    model = with_ia3("bert")
    said = said_by(model, "bert")
    fe.adopt(model)
    adopted = said_by(model, "bert")
    if way == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    (handle,) = handles(other)
    assert torch.equal(said_by(other, "bert"), adopted)
    handle.remove()
    assert torch.equal(said_by(other, "bert"), said)
    assert torch.equal(said_by(model, "bert"), adopted)


def test_offloaded_and_meta_models():
    model = with_ia3("llama").to("meta")
    with pytest.raises(ValueError, match="meta device"):
        fe.adopt(model)


def test_generation_is_the_same():
    model = with_ia3("llama")
    ids = tiny.inputs("llama")["input_ids"]
    story = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    with fe.adopt(model):
        assert torch.equal(model.generate(input_ids=ids, max_new_tokens=8, do_sample=False), story)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=8, do_sample=False), story)
