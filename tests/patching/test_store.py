"""save and load through a model: what comes back, and what is refused before the model has changed."""

import hashlib
import json
import shutil

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, T5Config, T5Model

import fastedit as fe
from fastedit import store


def llama(width=32, depth=3, **changes):
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=depth, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50, **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


IDS = torch.tensor([[3, 7, 11, 2], [5, 5, 1, 0]])


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def randomise(handle):
    generator = torch.Generator().manual_seed(5)
    handle.load_tensors(
        {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in handle.named_tensors().items()}
    )


def edits():
    generator = torch.Generator().manual_seed(3)
    plane = torch.randn(2, 32, generator=generator)
    return [
        fe.RED(layers=[0, 2]),
        fe.ScaleBias(bias=False, site="attn"),
        fe.Steer(plane[0], layers=[1], strength=0.5),
        fe.Ablate(plane),
        fe.Clamp(plane[1], 0.25),
        fe.Amplify(plane[0], 1.5, site="mlp"),
        fe.Rotate(plane, 0.3, layers=[-1]),
        fe.LowRank(plane, None, -plane, strength=0.1),
        fe.DiReFT(4),
        fe.NoReFT(2, layers=[1]),
    ]


def saved(tmp_path, model=None, name="edit", **options):
    """A folder with a RED edit of random values; the model is left as it was."""
    with fe.patch(model or llama(), fe.RED()) as handle:
        randomise(handle)
        return store.save(handle, tmp_path / name, **options)


def test_every_kind_comes_back_to_the_bit(tmp_path):
    model = llama()
    base = logits(model)
    handle = fe.patch(model, edits())
    randomise(handle)
    handle.strength = 0.75
    edited, tensors, config = logits(model), handle.named_tensors(), handle.config()
    handle.save(tmp_path / "edit")
    handle.remove()
    assert torch.equal(logits(model), base) and not torch.equal(edited, base)

    again = fe.load(model, tmp_path / "edit")
    assert torch.equal(logits(model), edited)
    assert again.config() == config and again.strength == 0.75
    assert again.named_tensors().keys() == tensors.keys()
    assert all(
        torch.equal(t, tensors[n]) and t.dtype == torch.float32 for n, t in again.named_tensors().items()
    )
    trainable = {n for n, p in model.named_parameters() if "fastedit" in n}
    assert len(trainable) == 2 * 2 + 3 + 3 * 3 + 3  # RED, ScaleBias, DiReFT, NoReFT


def test_one_edit_on_a_bf16_model_stays_fp32(tmp_path):
    model = llama().to(torch.bfloat16)
    with fe.patch(model, fe.RED()) as handle:
        handle.load_tensors({n: t + 1e-4 for n, t in handle.named_tensors().items()})
        handle.save(tmp_path)
    handle = fe.load(model, tmp_path)
    assert all(
        torch.equal(t, torch.full_like(t, 1.0001 if n.endswith("scale") else 1e-4))
        for n, t in handle.named_tensors().items()
    )


def test_both_stacks_of_an_encoder_decoder(tmp_path):
    model = T5Model(
        T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=2, num_decoder_layers=3, num_heads=2, vocab_size=40)
    )
    with fe.patch(model, fe.RED()) as handle:
        randomise(handle)
        tensors = handle.named_tensors()
        handle.save(tmp_path)
    again = fe.load(model, tmp_path).named_tensors()
    assert {"0.encoder.1.mlp.scale", "0.decoder.2.mlp.bias"} <= again.keys() and len(again) == 10
    assert all(torch.equal(again[n], t) for n, t in tensors.items())


def test_what_edit_json_says(tmp_path):
    model = llama()
    model.config.name_or_path = "anna/tiny-llama"
    folder = saved(tmp_path, model, training={"steps": 12, "loss": 0.5})
    header = json.loads((folder / "edit.json").read_text())
    assert (header["format"], header["version"], header["fastedit"]) == ("fastedit", 2, fe.__version__)
    assert header["edits"][0]["kind"] == "RED" and header["edits"][0]["site"] == "mlp"
    assert header["edits"][0]["layers"] == [0, 1, 2]
    assert header["training"] == {"steps": 12, "loss": 0.5}
    base = header["base"]
    assert (base["model"], base["type"], base["width"], base["depth"]) == ("anna/tiny-llama", "llama", 32, 3)
    assert (
        header["tensors"]["sha256"] == hashlib.sha256((folder / "edit.safetensors").read_bytes()).hexdigest()
    )
    assert header["tensors"]["parameters"] == 2 * 3 * 32


def test_a_local_path_of_the_base_is_not_published(tmp_path):
    llama().save_pretrained(tmp_path / "private" / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "private" / "base")
    folder = saved(tmp_path, model)
    text = (folder / "edit.json").read_text()
    assert json.loads(text)["base"]["model"] == "base" and "private" not in text
    assert (
        json.loads((saved(tmp_path, model, base_model="x/y") / "edit.json").read_text())["base"]["model"]
        == "x/y"
    )


def test_values_that_are_not_finite_are_not_saved(tmp_path):
    folder = saved(tmp_path)
    before = (folder / "edit.json").read_text()
    handle = fe.patch(llama(), fe.RED())
    next(iter(handle.parameters())).data[0] = float("nan")
    with pytest.raises(ValueError, match=r"0.layers.0.mlp.*not saved"):
        handle.save(folder)
    with pytest.raises(ValueError, match="training is not JSON-able"):
        store.save(fe.patch(llama(), fe.RED()), folder, training={"loss": float("nan")})
    assert (folder / "edit.json").read_text() == before


def refused(model, folder, match):
    """load raises with this message and leaves model, parameters and names as they were."""
    before, names, base = (
        logits(model),
        list(model.state_dict()),
        {n: p.requires_grad for n, p in model.named_parameters()},
    )
    with pytest.raises(fe.EditFileError, match=match) as caught:
        fe.load(model, folder, freeze=True)
    assert isinstance(caught.value, ValueError)
    assert list(model.state_dict()) == names and torch.equal(logits(model), before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == base


def test_another_width_or_depth_is_refused(tmp_path):
    folder = saved(tmp_path)
    refused(llama(width=64), folder, "base of width 32 .*this model has width 64")
    refused(llama(depth=4), folder, "base of depth 3 .*this model has depth 4")


def test_another_base_of_the_same_size_is_warned_of(tmp_path, caplog):
    folder = saved(tmp_path)
    fe.load(llama(), folder).remove()
    assert not caplog.records
    bert = BertModel(
        BertConfig(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, vocab_size=50
        )
    )
    fe.load(bert, folder)
    assert "made on a model of type 'llama', this model is 'bert'" in caplog.text


def rewrite(folder, change):
    """Change edit.json as a hand or a hostile tool would, in a file of version 1, which has no checksum of its own."""
    header = json.loads((folder / "edit.json").read_text())
    del header["sha256"]
    header["version"] = 1
    change(header)
    (folder / "edit.json").write_text(json.dumps(header))


def first(key, value):
    def change(header):
        header["edits"][0][key] = value

    return change


def top(key, value):
    def change(header):
        header[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (first("kind", "os.system"), "unknown kind of edit 'os.system'"),
        (first("kind", ["RED"]), r"kind of edit 0 is \['RED'\], expected a string"),
        (first("site", None), "site of edit 0 is None, expected a string"),
        (first("site", "../mlp"), "there is no site '../mlp'"),
        (first("layers", [0, 1]), "not described 0.layers.2.mlp"),
        (first("layers", [0, 1, 2, 3]), "layer 3, but this model has layers 0 to 2"),
        (first("layers", [0, 1, -1]), "layer -1"),
        (first("layers", [0, 1, "layers.2"]), "expected a list of int"),
        (first("layers", None), "layers of edit 0 is None, expected a list of"),
        (first("layers", 7), "layers of edit 0 is 7, expected a list of"),
        (first("layers", [[0]]), "expected a list of int"),
        (first("tensors", ["scale"]), "not described 0.layers.0.mlp.bias"),
        (first("tensors", ["scale", "pickle"]), "pickle"),
        (first("tensors", ["scale", ["bias"]]), "expected a list of str"),
        (first("tensors", 3), "tensors of edit 0 is 3, expected a list of"),
        (first("rank", 10**12), "rank is 1000000000000"),
        (first("strength", "much"), "strength is 'much'"),
        (first("positions", "promt"), "positions is 'promt'"),
        (first("colour", 1), "unknown key 'colour'"),
        (top("edits", []), "holds no edits"),
        (top("strength", "much"), "strength is 'much', expected a number"),
        (top("strength", float("inf")), "strength is inf"),
        (top("strength", 1e39), r"strength is 1e\+39, beyond what fp32 holds"),
        (top("strength", 10**400), "strength is 1000000000"),
        (top("comment", "by hand"), "has the key 'comment', which no edit has"),
        (top("tensors", {"sha256": "0" * 64, "comment": 1}), "has the key 'comment'"),
        (top("base", {"model": "\ud800"}), "is not valid JSON .*surrogates not allowed"),
        (first("gate", {"not": {"not": 3}}), "a gate is described by 3"),
        (first("layers", [10**400]), "layer 1000"),
        (top("strength", None), "strength is None, expected a number"),
        (top("base", None), '"base" is None'),
        (top("base", {"width": "32", "depth": 3}), "base of width '32'"),
    ],
)
def test_a_json_that_does_not_fit_is_refused(tmp_path, change, match):
    folder = saved(tmp_path)
    rewrite(folder, change)
    refused(llama(), folder, match)


def test_a_folder_of_no_edits_is_refused(tmp_path):
    folder = saved(tmp_path)
    store.write(folder, store.read(folder)[0] | {"edits": []}, {})
    refused(llama(), folder, "holds no edits")


def test_many_edits_promised_for_few_tensors_build_nothing(tmp_path):
    folder = saved(tmp_path)
    rewrite(folder, lambda header: header.update(edits=header["edits"] * 10_000))
    refused(llama(), folder, "missing 1.layers.0.mlp.bias")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop("0.layers.1.mlp.scale"), "missing 0.layers.1.mlp.scale"),
        (lambda t: t.update(extra=torch.ones(1)), "not described extra"),
        (
            lambda t: t.update({"0.layers.1.mlp.scale": torch.ones(31)}),
            r"shape \(31,\), this model needs \(32,\)",
        ),
        (
            lambda t: t.update({"0.layers.1.mlp.scale": torch.ones(1, 32)}),
            r"shape \(1, 32\), this model needs \(32,\)",
        ),
        (lambda t: t.update({"0.layers.1.mlp.scale": torch.full((32,), float("nan"))}), "not finite"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, change, match):
    folder = saved(tmp_path)
    header, tensors = store.read(folder)
    change(tensors)
    for key in ("format", "version", "tensors"):
        del header[key]
    store.write(folder, header, tensors)
    refused(llama(), folder, match)


def test_a_failure_after_patching_is_undone(tmp_path, monkeypatch):
    folder = saved(tmp_path)
    model = llama()

    def broken(handle, tensors):
        raise ValueError("too late")

    monkeypatch.setattr(fe.Handle, "load_tensors", broken)
    refused(model, folder, "too late")


def test_from_the_hub(tmp_path, monkeypatch):
    folder = saved(tmp_path)
    asked = []

    def snapshot_download(repo, revision, allow_patterns):
        asked.append((repo, revision))
        shutil.copytree(folder, tmp_path / "cache")
        return str(tmp_path / "cache")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    model = llama()
    handle = fe.load(model, "anna/my-edit", revision="v2")
    assert asked == [("anna/my-edit", "v2")] and handle.num_parameters() == 2 * 3 * 32
    handle.remove()
    refused(model, tmp_path / "no" / "such" / "folder", "is not a folder")
    assert len(asked) == 1

    def offline(repo, revision, allow_patterns):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    refused(
        model,
        "anna/my-edit",
        "there is no folder anna/my-edit, and as a Hub repo .*ConnectionError: no network",
    )


def test_a_copied_folder_and_a_leftover_of_a_crash_load(tmp_path):
    folder = saved(tmp_path)
    digest = json.loads((folder / "edit.json").read_text())["tensors"]["sha256"]
    (folder / "edit.safetensors").rename(
        folder / f"edit-{digest}.safetensors"
    )  # killed before the last rename
    shutil.copytree(folder, tmp_path / "copy")
    fe.load(llama(), tmp_path / "copy")
