"""RED's authors' delta_vector.pth: read without running anything in it, and put where it was trained."""

import collections
import os
import random

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)  # fmt: skip

import fastedit as fe
from fastedit.interop import red as interop_red

WIDTH = 16


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=WIDTH, num_hidden_layers=2, intermediate_size=24, num_attention_heads=2, vocab_size=30
        )
    )


def bert(kind=BertForSequenceClassification):
    torch.manual_seed(0)
    return kind(
        BertConfig(
            hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=30
        )
    )


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=WIDTH, n_layer=2, n_head=2, vocab_size=30, n_positions=16))


def t5():
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            d_model=WIDTH, d_kv=4, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=2, vocab_size=30
        )
    )


FAMILIES = {
    "llama": (llama, ["model.layers.{}.mlp.down_proj"]),
    "bert": (bert, ["bert.encoder.layer.{}.output.dense"]),
    "gpt2": (gpt2, ["transformer.h.{}.mlp.c_proj"]),
    "t5": (t5, ["encoder.block.{}.layer.1.DenseReluDense.wo", "decoder.block.{}.layer.2.DenseReluDense.wo"]),
}


def state(paths, layers=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(4)

    def draw(centre):
        return (torch.randn(1, WIDTH, generator=generator) + centre).to(dtype)

    return {
        f"{path.format(layer)}.delta_vector.activation_{part}": draw(centre)
        for path in paths
        for layer in range(layers)
        for part, centre in (("scaling", 1.0), ("bias", 0.0))
    }  # fmt: skip


def test_values_reach_their_layers_in_every_family(tmp_path):
    for name, (build, paths) in FAMILIES.items():
        saved = state(paths)
        torch.save(saved, tmp_path / "delta_vector.pth")
        model = build()
        handle = fe.load_red_checkpoint(model, tmp_path)
        assert len(saved) == len(handle.named_tensors()), name
        stack = ["encoder", "decoder"] if len(paths) == 2 else ["layers"]
        for side, path in zip(stack, paths, strict=True):
            for layer in range(2):
                for part, ours in (("scaling", "scale"), ("bias", "bias")):
                    theirs = saved[f"{path.format(layer)}.delta_vector.activation_{part}"].reshape(-1)
                    assert torch.equal(handle.named_tensors()[f"0.{side}.{layer}.mlp.{ours}"], theirs), (
                        name,
                        path,
                    )


def test_red_plus_reaches_the_projections_too(tmp_path):
    paths = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "attn": "self_attn.o_proj", "mlp": "mlp.down_proj"}
    saved = state([f"model.layers.{{}}.{path}" for path in paths.values()])
    torch.save(saved, tmp_path / "delta_vector.pth")
    handle = fe.load_red_checkpoint(llama(), tmp_path)
    assert len(handle.named_tensors()) == len(saved)
    for number, edit in enumerate(handle.edits):
        theirs = saved[f"model.layers.1.{paths[edit.site]}.delta_vector.activation_scaling"].reshape(-1)
        assert torch.equal(handle.named_tensors()[f"{number}.layers.1.{edit.site}.scale"], theirs)


def test_the_model_computes_what_the_authors_wrapper_computes(tmp_path):
    saved = state(["model.layers.{}.mlp.down_proj"])
    torch.save(saved, tmp_path / "delta_vector.pth")
    ids = torch.tensor([[3, 9, 1, 7]])
    wrapped = llama().double()
    for layer in range(2):
        key = f"model.layers.{layer}.mlp.down_proj"
        scale, bias = (
            saved[f"{key}.delta_vector.activation_{part}"].double() for part in ("scaling", "bias")
        )
        wrapped.get_submodule(key).register_forward_hook(lambda m, a, out, s=scale, b=bias: out * s + b)
    model = llama().double()
    plain = model(ids).logits
    fe.load_red_checkpoint(model, tmp_path / "delta_vector.pth")
    assert torch.allclose(model(ids).logits, wrapped(ids).logits, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(model(ids).logits, plain)


def test_a_wrapper_prefix_more_or_less(tmp_path):
    path = tmp_path / "delta_vector.pth"
    torch.save(state(["bert.encoder.layer.{}.output.dense"]), path)
    assert fe.load_red_checkpoint(bert(BertModel), path).num_parameters() == 4 * WIDTH
    torch.save(state(["base_model.bert.encoder.layer.{}.output.dense"]), path)
    assert fe.load_red_checkpoint(bert(), path).num_parameters() == 4 * WIDTH
    torch.save(state(["bert.encoder.layer.{}.attention.output.dense"]), path)
    handle = fe.load_red_checkpoint(bert(), path)
    assert {name.split(".")[3] for name in handle.named_tensors()} == {"attn"}


def test_some_layers_half_of_a_pair_and_16_bits(tmp_path):
    saved = state(["model.layers.{}.mlp.down_proj"], dtype=torch.bfloat16)
    torch.save(
        {k: v for k, v in saved.items() if ".1." in k and k.endswith("bias")}, tmp_path / "delta_vector.pth"
    )
    tensors = fe.load_red_checkpoint(llama(), tmp_path).named_tensors()
    assert set(tensors) == {"0.layers.1.mlp.scale", "0.layers.1.mlp.bias"}
    assert torch.equal(tensors["0.layers.1.mlp.scale"], torch.ones(WIDTH))
    theirs = saved["model.layers.1.mlp.down_proj.delta_vector.activation_bias"].reshape(-1).float()
    assert torch.equal(tensors["0.layers.1.mlp.bias"], theirs)


def test_the_known_defect_and_foreign_keys_are_pointed_out(tmp_path, caplog):
    saved = state(["model.layers.{}.mlp.down_proj"])
    saved = {k: torch.ones_like(v) if k.endswith("scaling") else v for k, v in saved.items()}
    torch.save(saved | {"score.weight": torch.ones(2, WIDTH)}, tmp_path / "delta_vector.pth")
    fe.load_red_checkpoint(llama(), tmp_path)
    assert "every scale" in caplog.text and "is exactly 1" in caplog.text
    assert "ignored 1 keys that are not RED's, such as score.weight" in caplog.text


def test_freeze_leaves_the_edit_trainable(tmp_path):
    torch.save(state(["model.layers.{}.mlp.down_proj"]), tmp_path / "delta_vector.pth")
    model = llama()
    handle = fe.load_red_checkpoint(model, tmp_path, freeze=True)
    own = {id(p) for p in handle.parameters()}
    assert own and {id(p) for p in model.parameters() if p.requires_grad} == own


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("code in the file ran",))


KEY = "model.layers.0.mlp.down_proj.delta_vector.activation_scaling"


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({KEY: Bomb()}, "not a plain state dict"),
        ([1, 2], "holds a list, expected a state dict"),
        ({}, "has no key ending in"),
        ({"model.layers.0.mlp.down_proj.weight": torch.ones(2)}, "found model.layers.0.mlp.down_proj.weight"),
        ({KEY: torch.ones(2, WIDTH)}, r"shape \(2, 16\), expected \(1, width\)"),
        ({KEY: torch.ones(1, WIDTH, dtype=torch.int64)}, "torch.int64, expected floats"),
        ({KEY: "scale"}, "is a str, expected floats"),
        ({KEY: torch.full((1, WIDTH), float("nan"))}, "NaN or infinite"),
        ({KEY: torch.ones(1, WIDTH), KEY.replace("scaling", "bias"): torch.ones(1, 3)}, "differ in width"),
        ({KEY: torch.ones(1, WIDTH + 1)}, "width 17"),
        (
            {KEY.replace("layers.0", "layers.7"): torch.ones(1, WIDTH)},
            "layers.7.mlp.down_proj, which is not a site",
        ),
        (
            {KEY.replace("mlp.down_proj", "self_attn.c_attn"): torch.ones(1, WIDTH)},
            "q, k and v of a fused projection have no vectors of their own",
        ),
    ],
)
def test_what_is_not_such_a_file_is_refused(tmp_path, content, match):
    torch.save(content, tmp_path / "delta_vector.pth")
    model = llama()
    names = list(model.state_dict())
    with pytest.raises(fe.EditFileError, match=match):
        fe.load_red_checkpoint(model, tmp_path)
    assert list(model.state_dict()) == names


def test_missing_truncated_and_other_files(tmp_path):
    with pytest.raises(fe.EditFileError, match=r"there is no .*delta_vector.pth"):
        fe.load_red_checkpoint(llama(), tmp_path)
    torch.save(
        collections.OrderedDict(state(["model.layers.{}.mlp.down_proj"])), tmp_path / "delta_vector.pth"
    )
    whole = (tmp_path / "delta_vector.pth").read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"not a checkpoint"):
        (tmp_path / "delta_vector.pth").write_bytes(content)
        with pytest.raises(fe.EditFileError, match=r"not an archive of torch\.save"):
            fe.load_red_checkpoint(llama(), tmp_path)


# --- hostile files ------------------------------------------------------------------------------------------


def small(tmp_path):
    path = tmp_path / "delta_vector.pth"
    torch.save(state(["model.layers.{}.mlp.down_proj"]), path)
    return path


def test_a_bomb_is_refused_before_it_grows(tmp_path):
    """A kilobyte that announces eight gigabytes: an expanded storage, and an archive that unpacks."""
    import resource
    import zipfile

    path = tmp_path / "delta_vector.pth"
    key = "model.layers.0.mlp.down_proj.delta_vector.activation_scaling"
    torch.save({key: torch.ones(1).expand(1, 1 << 31)}, path)
    assert path.stat().st_size < 4096
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(fe.EditFileError, match=r"announces 2,147,483,648 numbers in .* and holds fewer"):
        interop_red._grouped(path, interop_red.read_state(path, "RED"))
    with zipfile.ZipFile(small(tmp_path)) as archive:
        parts = {part: archive.read(part) for part in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content + bytes(50 << 20 if name.endswith("data/0") else 0))
    with pytest.raises(fe.EditFileError, match="compressed archive"):
        interop_red.read_state(path, "RED")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KB


def test_flipped_bits_of_numbers_are_refused(tmp_path):
    path = small(tmp_path)
    whole, loaded = path.read_bytes(), 0
    expected = interop_red._grouped(path, interop_red.read_state(path, "RED"))
    draw = random.Random(0)
    for _ in range(300):
        content = bytearray(whole)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        try:
            found = interop_red._grouped(path, interop_red.read_state(path, "RED"))
        except fe.EditFileError:
            continue
        loaded += 1  # in bytes that say nothing: padding, dates
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[m][n], t) for m, parts in expected.items() for n, t in parts.items())
    assert loaded < 200


def test_only_regular_files_are_read(tmp_path):
    path = tmp_path / "delta_vector.pth"
    path.symlink_to("/dev/zero")
    with pytest.raises(fe.EditFileError, match="is not a regular file"):
        interop_red.read_state(path, "RED")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(fe.EditFileError, match="is not a regular file"):
        interop_red.read_state(path, "RED")
    path.unlink()
    torch.save(state(["model.layers.{}.mlp.down_proj"]), path, _use_new_zipfile_serialization=False)
    with pytest.raises(fe.EditFileError, match=r"is not an archive of torch\.save"):
        interop_red.read_state(path, "RED")
