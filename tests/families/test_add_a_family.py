"""docs/add-a-family.md as it stands, and what register refuses."""

import pytest
import torch
from pages import blocks

import fastedit as fe
from fastedit import families
from fastedit.families import Family


@pytest.fixture(autouse=True)
def forgotten():
    yield
    families._REGISTERED.clear()


def test_the_worked_family_is_fused_and_says_what_hooks_say():
    names = {}
    exec(blocks("add-a-family.md")[0].code, names)
    model, handle = names["model"], names["handle"]
    assert all("fused" in line for line in str(handle.report()).splitlines() if "mlp" in line)
    given = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    for name, tensor in handle.named_tensors().items():
        tensor.copy_(torch.randn(32, generator=torch.Generator().manual_seed(len(name))))
    values = handle.named_tensors()
    with torch.no_grad():
        got = model(given)
    handle.remove()
    for number, block in enumerate(model.blocks):
        scale, bias = (values[f"0.layers.{number}.mlp.{name}"] for name in ("scale", "bias"))
        block.feed.down.register_forward_hook(lambda m, a, out, s=scale, b=bias: s * out + b)
    with torch.no_grad():
        torch.testing.assert_close(got, model(given), rtol=1e-5, atol=1e-5)
        families._REGISTERED.clear()
    assert [layer.family.name for layer in fe.families.find_layers(names["Mine"]())] == ["unknown"] * 3


def test_report_names_the_path_that_keeps_a_family_away_and_the_step_that_keeps_an_edit_off_the_add():
    names = {}
    exec(blocks("add-a-family.md")[0].code, names)
    names["handle"].remove()
    step, layer = names["Step"], names["ResidualLayer"]
    sites = {"mlp": "feed.down", "attn": "mixer.outside", "block": ""}
    families.register(Family("mine", sites | {"mlp": "feed.dwn"}))
    with pytest.raises(ValueError, match=r"; mine has 'feed\.dwn', which is not in it\. fastedit\.families\.register says"):
        fe.patch(names["Mine"](), fe.RED())
    with fe.patch(names["Mine"](), fe.RED(site="block")) as handle:
        assert "no family describes this layer; mine has 'feed.dwn', which is not in it" in str(handle.report())
    families.register(Family("mine", sites | {"mlp": "f", "attn": "m"}))  # another model's
    with fe.patch(names["Mine"](), fe.RED(site="block")) as handle:
        assert "mine" not in str(handle.report())
    behind = layer((step("mixer", site="attn"), step("feed", site="mlp", behind="second_norm")))
    families.register(Family("mine", sites, fused=(behind,)))
    with fe.patch(names["Mine"](), fe.RED()) as handle:
        assert "plain: a norm stands between it and the add" in str(handle.report())


def test_what_register_refuses():
    whole = {"mlp": "a", "attn": "b", "block": ""}
    for family, error, message in (
        ("llama", TypeError, "expected a fastedit.families.Family"),
        (Family("mine", {"mlp": "a"}), ValueError, r"lack \['attn', 'block'\]"),
        (Family("mine", whole | {"heads": "c"}), ValueError, r"not known: \['heads'\]"),
        (Family("mine", whole | {"q": 3}), TypeError, "site 'q' is 3"),
        (Family("llama", whole), ValueError, "fastedit's own table"),
    ):
        with pytest.raises(error, match=message):
            families.register(family)
    assert not families._REGISTERED
