"""Folders of PEFT's (IA)3 and of pyreft, read without those libraries, and written for them."""

import json
import os
import subprocess
import sys

import pytest
import tiny_models as tiny
import torch
from peer_cases import needs
from safetensors.torch import save_file

import fastedit as fe
from fastedit.edits.form import Form
from fastedit.interop import folders

PLACES = {"mlp": "mlp.down_proj", "ffn_in": "mlp.down_proj", "attn": "self_attn.o_proj", "k": "self_attn.k_proj"}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("save", [fe.save_peft, fe.save_pyreft])
def test_tenants_are_not_written(save, tmp_path):
    handle = fe.patch(tiny.build("llama"), fe.ScaleBias({0: torch.ones(32)}, False, site="mlp"), tenants=3)
    with pytest.raises(ValueError, match="holds tenants"):
        save(handle, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def not_written(save, edits, message, folder):
    handle = fe.patch(tiny.build("llama"), edits)
    with pytest.raises(ValueError, match=message):
        save(handle, folder)
    assert not folder.exists()


# --- PEFT -------------------------------------------------------------------------------------------------------


def peft_folder(folder, vectors, **config):
    """A folder as PEFT writes it: {(site, layer): scale}."""
    folder.mkdir(exist_ok=True)
    tensors = {
        f"base_model.model.model.layers.{layer}.{PLACES[site]}.ia3_l": v.reshape((1, -1) if site == "ffn_in" else (-1, 1))
        for (site, layer), v in vectors.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"} | config))
    return folder


def some():
    widths = {"ffn_in": 48, "attn": 32, "k": 16}
    return {(site, layer): 1 + 0.3 * drawn(width, seed=layer) for site, width in widths.items() for layer in range(3)}


def reference(vectors):
    """The exact output of the model with the scales as plain hooks."""
    forms = [(site, layer, Form(scale=v.double())) for (site, layer), v in vectors.items() if site in ("mlp", "attn")]
    model = tiny.hook_reference(tiny.exact(tiny.build("llama")), "llama", forms)
    for (site, layer), v in vectors.items():
        if site == "ffn_in":
            module = model.model.layers[layer].mlp.down_proj
            module.register_forward_pre_hook(lambda m, args, v=v: (args[0] * v.double(), *args[1:]))
        if site == "k":
            model.model.layers[layer].self_attn.k_proj.register_forward_hook(lambda m, a, out, v=v: out * v.double())
    return tiny.output(model, "llama")


def test_a_peft_folder_says_what_hooks_say_and_needs_no_peft(tmp_path):
    folder = peft_folder(tmp_path / "ia3", some())
    model = tiny.build("llama")
    handle = fe.load_adapter(model, folder)
    torch.testing.assert_close(tiny.output(model, "llama").double(), reference(some()), rtol=1e-4, atol=1e-4)
    assert handle.num_parameters() == sum(v.numel() for v in some().values()) and not list(handle.parameters())
    code = (
        "import sys; sys.modules['peft'] = None; import tiny_models as tiny, fastedit as fe\n"
        f"print(fe.load_adapter(tiny.build('llama'), {str(folder)!r}).num_parameters())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd="tests", capture_output=True, text=True, check=True)
    assert int(done.stdout) == handle.num_parameters()


def test_what_fastedit_writes_peft_reads(tmp_path):
    peft = pytest.importorskip("peft", reason="needs PEFT")
    model = tiny.build("llama")
    scales = {site: {layer: some()[site, layer] for layer in range(3)} for site in ("ffn_in", "attn", "k")}
    edits = [fe.ScaleBias(scales[site], False, site=site, strength=0.5 if site == "attn" else 1.0) for site in scales]
    handle = fe.patch(model, edits)
    handle.strength = 0.8
    said = tiny.output(model, "llama")
    fe.save_peft(handle, tmp_path, task_type="CAUSAL_LM")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == 9 and len(config["feedforward_modules"]) == 3
    theirs = peft.PeftModel.from_pretrained(tiny.build("llama"), tmp_path).eval()
    torch.testing.assert_close(tiny.output(theirs, "llama"), said, rtol=1e-4, atol=1e-4)
    again = tiny.build("llama")
    fe.load_adapter(again, tmp_path)
    torch.testing.assert_close(tiny.output(again, "llama"), said, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("save, last", [(fe.save_peft, "adapter_config.json"), (fe.save_pyreft, "config.json")])
def test_no_crash_leaves_some_of_an_old_adapter_beside_some_of_a_new_one(save, last, tmp_path, monkeypatch):
    """Once the renames begin nobody reads the folder, PEFT included; after the last it is the new one."""

    def said(scale):
        edit = fe.ScaleBias if save is fe.save_peft else fe.Steer
        more = {"bias": False, "site": "mlp"} if save is fe.save_peft else {}
        layers = [0, int(scale)]
        with fe.patch(tiny.build("llama"), edit(torch.full((32,), scale), layers=layers, **more)) as handle:
            save(handle, tmp_path / "out")
            return tiny.output(handle.model, "llama")

    def read():
        model = tiny.build("llama")
        fe.load_adapter(model, tmp_path / "out", positions=None if save is fe.save_peft else "all")
        return tiny.output(model, "llama")

    old, real, done, refused = said(1.0), os.replace, [], 0
    for stop in range(1, 9):

        def crash(*paths, stop=stop):
            done.append(paths)
            if len(done) == stop:
                raise KeyboardInterrupt
            real(*paths)

        done.clear()
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", crash)
            try:
                new = said(2.0)
                break
            except KeyboardInterrupt:
                pass
        refused += 1
        assert not (tmp_path / "out" / last).exists()
        with pytest.raises(fe.EditFileError, match=r"expected adapter_config\.json"):
            read()
        if save is fe.save_peft:
            peft = pytest.importorskip("peft", reason="needs PEFT")
            with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):
                peft.PeftModel.from_pretrained(tiny.build("llama"), tmp_path / "out")
        assert not list((tmp_path / "out").glob(".*")), "a file is left"
        torch.testing.assert_close(said(1.0), old)
        torch.testing.assert_close(read(), old, rtol=1e-4, atol=1e-4)
    assert refused == (2 if save is fe.save_peft else 3)
    torch.testing.assert_close(read(), new, rtol=1e-4, atol=1e-4)


def test_an_adapter_that_is_written_while_it_is_read_is_refused(tmp_path, monkeypatch):
    edits = [fe.ScaleBias(torch.full((32,), scale), False, site="mlp", layers=[int(scale)]) for scale in (1.0, 2.0)]
    handles = [fe.patch(tiny.build("llama"), edit) for edit in edits]
    fe.save_peft(handles[0], tmp_path)
    real = folders.plain_tensors

    def meanwhile(content):
        fe.save_peft(handles[1], tmp_path)
        return real(content)

    with monkeypatch.context() as patch:
        patch.setattr(folders, "plain_tensors", meanwhile)
        with pytest.raises(fe.EditFileError, match="changed while it was read"):
            fe.load_adapter(tiny.build("llama"), tmp_path)
    fe.load_adapter(tiny.build("llama"), tmp_path)


def test_what_peft_saves_is_read(tmp_path):
    peft = pytest.importorskip("peft", reason="needs PEFT")
    config = peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = peft.get_peft_model(tiny.build("llama"), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3_l" in name:
                parameter.add_(0.3 * drawn(*parameter.shape, seed=len(name)))
    model.save_pretrained(tmp_path)
    plain = tiny.build("llama")
    fe.load_adapter(plain, tmp_path)
    torch.testing.assert_close(tiny.output(plain, "llama"), tiny.output(model, "llama"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (fe.RED({0: torch.ones(32)}, {0: torch.ones(32)}), "has a bias, a low-rank part, or no scale"),
        (fe.ScaleBias({0: torch.ones(32)}, False, site="mlp", positions="last 1"), "scales every token"),
        (fe.ScaleBias({0: torch.ones(32)}, False, site="block"), "not a linear map of its own"),
        ([fe.ScaleBias({0: torch.full((n,), 2.0)}, False, site=s) for s, n in (("mlp", 32), ("ffn_in", 48))], "one vector there"),
    ],
)
def test_what_ia3_does_not_express_is_not_written(edit, message, tmp_path):
    not_written(fe.save_peft, edit, message, tmp_path / "out")


def test_folders_that_are_none_are_named(tmp_path):
    model = tiny.build("llama")
    before = tiny.state(model)
    cases = {
        "empty": (lambda f: f.mkdir(), "expected adapter_config.json"),
        "nothing": (lambda f: peft_folder(f, {}), "nothing to load"),
        "lora": (lambda f: peft_folder(f, some(), peft_type="LORA"), "'LORA', of which"),
        "nan": (lambda f: peft_folder(f, {("attn", 0): torch.full((32,), float("nan"))}), "NaN"),
        "wide": (lambda f: peft_folder(f, {("attn", 0): torch.ones(7)}), "7 wide, but site 'attn'"),
        "deep": (lambda f: peft_folder(f, {("attn", 9): torch.ones(32)}), "no module 'model.layers.9.self_attn.o_proj'"),
        "cut": (lambda f: (peft_folder(f, some()) / "adapter_model.safetensors").write_bytes(b"12345678"), "adapter_model"),
        "text": (lambda f: (peft_folder(f, some()) / "adapter_config.json").write_text("{"), "adapter_config.json could not"),
    }
    for name, (make, message) in cases.items():
        make(tmp_path / name)
        with pytest.raises(fe.EditFileError, match=message):
            fe.load_adapter(model, tmp_path / name)
    with pytest.raises(fe.EditFileError, match="acts on every token"):
        fe.load_adapter(model, peft_folder(tmp_path / "ia3", some()), positions="last 1")
    tiny.assert_same_state(model, before)


# --- pyreft -----------------------------------------------------------------------------------------------------

STATES = {
    "Loreft": lambda r, n: {"weight": drawn(r, n), "bias": drawn(r), "rotate_layer": torch.linalg.qr(drawn(n, r, seed=1))[0]},
    "Direft": lambda r, n: {"weight": drawn(r, n), "bias": drawn(r), "rotate_layer": torch.linalg.qr(drawn(n, r, seed=1))[0]},
    "Noreft": lambda r, n: {"learned_source.weight": drawn(r, n), "learned_source.bias": drawn(r),
                            "proj_layer.weight": drawn(r, n, seed=1), "proj_layer.bias": drawn(r, seed=2)},
    "Nodireft": lambda r, n: {"learned_source.weight": drawn(r, n), "learned_source.bias": drawn(r),
                              "proj_layer.weight": drawn(r, n, seed=1)},
}  # fmt: skip


def pyreft_folder(folder, kind, components=("block_output",) * 3, layers=(0, 1, 2), **changes):
    """A folder as pyvene 0.1.8 writes it."""
    folder.mkdir(exist_ok=True)
    keys = [f"layer_{layer}_comp_{c}_unit_pos_nunit_1#0" for layer, c in zip(layers, components, strict=True)]
    members = [[layer, c, "pos", 1, 3, *[None] * 9] for layer, c in zip(layers, components, strict=True)]
    config = {
        "sorted_keys": keys, "mode": "parallel", "representations": members,
        "intervention_types": [f"<class 'pyreft.interventions.{kind}Intervention'>"] * len(keys),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | changes))
    for key in keys:
        torch.save({name: 0.2 * t if "rotate" not in name else t for name, t in STATES[kind](3, 32).items()},
                   folder / f"intkey_{key}.bin")  # fmt: skip
    return folder


def expected(kind, hidden):
    """pyreft's own formulas, in float64."""
    s = {name: (0.2 * t if "rotate" not in name else t).double() for name, t in STATES[kind](3, 32).items()}
    if kind in ("Loreft", "Direft"):
        rotated = hidden @ s["rotate_layer"] if kind == "Loreft" else 0
        return hidden + (hidden @ s["weight"].T + s["bias"] - rotated) @ s["rotate_layer"].T
    projected = hidden @ s["proj_layer.weight"].T + s["proj_layer.bias"] if kind == "Noreft" else 0
    source = hidden @ s["learned_source.weight"].T + s["learned_source.bias"]
    return hidden + (source - projected) @ s["proj_layer.weight"]


@pytest.mark.parametrize("kind", STATES)
def test_pyreft_folders_say_what_pyrefts_formulas_say(kind, tmp_path):
    folder = pyreft_folder(tmp_path / "reft", kind)
    model = tiny.build("llama")
    with pytest.raises(fe.EditFileError, match="give positions="):
        fe.load_adapter(model, folder)
    fe.load_adapter(model, folder, positions="all")
    exact = tiny.exact(tiny.build("llama"))
    for layer in exact.model.layers:
        layer.register_forward_hook(lambda m, a, out: expected(kind, out))
    torch.testing.assert_close(
        tiny.output(model, "llama").double(), tiny.output(exact, "llama"), rtol=1e-4, atol=1e-4 * 30
    )


def test_pyreft_folders_by_component_and_position(tmp_path):
    names = ("model.layers[0].mlp.output", "attention_output", "block_output")
    model = tiny.build("llama")
    handle = fe.load_adapter(model, pyreft_folder(tmp_path / "reft", "Loreft", names), positions="last 1")
    assert {(e["site"], *e["layers"]) for e in handle.config()} == {("mlp", 0), ("attn", 1), ("block", 2)}
    assert all(e["positions"] == "last 1" for e in handle.config())
    for changes, message in (
        ({"mode": "serial"}, "serial"), ({"sorted_keys": ["../a"] * 3}, "names an intervention"),
        ({"intervention_types": ["<class 'mine.Odd'>"] * 3}, "is Odd; read are"), ({"representations": 3}, "none that pyreft"),
        ({"representations": [[0, ["block_output"], "pos", 1, 3, *[None] * 9]] * 3}, "which is no site here"),
    ):  # fmt: skip
        with pytest.raises(fe.EditFileError, match=message):
            fe.load_adapter(model, pyreft_folder(tmp_path / "bad", "Loreft", **changes), positions="all")


def test_a_pyreft_file_that_announces_more_than_it_holds_is_refused(tmp_path):
    folder = pyreft_folder(tmp_path / "reft", "Loreft")
    path = next(folder.glob("intkey_*.bin"))
    torch.save(torch.load(path) | {"weight": torch.ones(1).expand(1 << 16, 1 << 15)}, path)
    with pytest.raises(fe.EditFileError, match=r"announces 2,147,483,648 numbers in weight and holds fewer"):
        fe.load_adapter(tiny.build("llama"), folder, positions="all")


def test_what_pyreft_saves_is_read(tmp_path):
    pyreft = needs("pyreft")
    made = [pyreft.LoreftIntervention(embed_dim=32, low_rank_dimension=3, dtype=torch.float32) for _ in range(3)]
    places = [{"layer": n, "component": "block_output", "low_rank_dimension": 3, "intervention": m} for n, m in enumerate(made)]
    torch.manual_seed(0)
    model = pyreft.get_reft_model(tiny.build("llama"), pyreft.ReftConfig(representations=places))
    with torch.no_grad():
        for one in made:
            one.learned_source.weight.add_(0.2 * drawn(3, 32))
    model.eval()
    model.save(save_directory=str(tmp_path / "reft"))
    said = model(base=tiny.inputs("llama"))[1].logits
    plain = tiny.build("llama")
    fe.load_adapter(plain, tmp_path / "reft", positions="all")
    torch.testing.assert_close(tiny.output(plain, "llama"), said.detach(), rtol=1e-4, atol=1e-3)


def low_rank():
    """A LoReFT and a vector at one place, an ablation at another, a rank-2 map at a third; strengths of their own."""
    basis = torch.linalg.qr(drawn(32, 2))[0].T.contiguous()
    return [
        fe.LowRank(read=0.3 * drawn(2, 32, seed=2), write=basis, offset=drawn(2, seed=3), layers=[1], strength=0.5),
        fe.Steer({1: drawn(32, seed=4)}, strength=0.7), fe.Ablate({0: drawn(32, seed=5)}, site="mlp"),
        fe.LowRank(read=0.3 * drawn(3, 32, seed=6), offset=None, write=0.3 * drawn(3, 32, seed=7), site="attn", layers=[2]),
    ]  # fmt: skip


def test_what_is_written_for_pyreft_is_the_same_edit(tmp_path):
    model = tiny.build("llama")
    handle = fe.patch(model, low_rank())
    handle.strength = 0.8
    said, plain = tiny.output(model, "llama"), tiny.output(tiny.build("llama"), "llama")
    assert (said - plain).abs().max() > 0.1
    fe.save_pyreft(handle, tmp_path / "reft")
    again = tiny.build("llama")
    fe.load_adapter(again, tmp_path / "reft", positions="all")
    torch.testing.assert_close(tiny.output(again, "llama"), said, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        (fe.RED({0: torch.full((32,), 2.0)}, {0: torch.ones(32)}), "LoReFT scales nothing"),
        (fe.Steer({0: torch.ones(32)}, keep_norm=True), "no keep_norm"),
        (fe.Steer({0: torch.ones(48)}, site="ffn_in"), "at block, mlp and attn"),
        ([fe.Steer({0: torch.ones(32)}), fe.Steer({0: torch.ones(32)}, positions="last 1")], "different tokens"),
    ],
)
def test_what_loreft_does_not_express_is_not_written(edits, message, tmp_path):
    not_written(fe.save_pyreft, edits, message, tmp_path / "out")


def test_pyreft_reads_what_is_written_for_it(tmp_path):
    pyreft = needs("pyreft")
    model = tiny.build("llama")
    fe.save_pyreft(fe.patch(model, low_rank()), tmp_path)
    theirs = pyreft.ReftModel.load(str(tmp_path), tiny.build("llama"))
    for key, one in theirs.interventions.items():  # its load makes them bfloat16
        one.float()
        one.load_state_dict(torch.load(tmp_path / f"intkey_{key}.bin"))
    theirs.eval()
    said = theirs(base=tiny.inputs("llama"))[1].logits
    torch.testing.assert_close(said.detach(), tiny.output(model, "llama"), rtol=1e-4, atol=1e-3)
