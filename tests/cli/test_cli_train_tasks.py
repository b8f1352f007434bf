"""`fastedit train --task …` and `fastedit predict`, on tiny models."""

import json

import pytest
import torch
from chat_tokenizers import tokenizer_of
from test_cli import encoder, invoke, reviews, tsv  # noqa: F401 (encoder is a fixture)
from transformers import LlamaConfig, LlamaForCausalLM

import fastedit as fe

ROWS = [
    {"messages": [{"role": "user", "content": f"say {c}"}, {"role": "assistant", "content": c * 4}]} for c in "abcdefgh"
]
PAIRS = [{"prompt": f"say {c}: ", "chosen": c * 3, "rejected": "z" * n} for n, c in enumerate("abcdefgh", 2)]


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A tiny chat model with SmolLM2's template, as a folder."""
    folder = tmp_path_factory.mktemp("chat")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=160, eos_token_id=129,
        bos_token_id=128, pad_token_id=129, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer_of("smollm2").save_pretrained(folder)
    return folder


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def note(folder):
    return json.loads((folder / "edit.json").read_text())["training"]


@pytest.mark.parametrize("method", ["red", "red+", "loreft", "vector"])
def test_sft_learns_is_resumed_and_replies(chat, tmp_path, method):
    data, out = written(tmp_path / "rows.jsonl", ROWS), tmp_path / "edit"
    given = ["train", chat, data, "--task", "sft", "--method", method, "--out", out, "--batch-size", 4, "--device", "cpu",
             "--eval", data, "--accumulate", 2, "--checkpointing"]  # fmt: skip
    if method in ("red", "loreft"):
        given += ["--positions", "last 2"]
    output = invoke(*given, "--epochs", 6, "--lr", 0.03)
    kept = note(out)
    assert kept["loss_after"] < kept["loss_before"] - 0.02 and f"{kept['loss_after']:.4f}" in output and kept["chat"]
    assert sorted((out / "checkpoints").iterdir()), "there is something to resume"
    invoke(*given, "--epochs", 8, "--lr", 0.03, "--resume")
    handle = fe.load(LlamaForCausalLM.from_pretrained(chat), out)
    assert not all(bool((t == t.flatten()[0]).all()) for t in handle.named_tensors().values())
    invoke(
        "predict",
        out,
        "say a",
        "--model",
        chat,
        "--device",
        "cpu",
        "--max-new-tokens",
        4,
        "--out",
        tmp_path / "said.jsonl",
    )
    assert json.loads((tmp_path / "said.jsonl").read_text())["prompt"] == "say a"


@pytest.mark.parametrize("loss, more", [("dpo", ["--store"]), ("orpo", []), ("bipo", ["--method", "vector"])])
def test_preferences_widen_the_held_out_margin(chat, tmp_path, loss, more):
    data, out = written(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "edit"
    invoke("train", chat, data, "--task", "preference", "--loss", loss, "--out", out, "--epochs", 8, "--lr", 0.05, "--eval", data,
           "--batch-size", 4, "--chat", *more)  # fmt: skip
    kept = note(out)
    assert kept["margin_after"] > kept["margin_before"] + 0.5 and kept["chat"]
    assert (out / "reference.safetensors").is_file() == (loss == "dpo")


def test_a_reward_ranks_held_out_pairs_and_scores_texts(chat, tmp_path):
    data, out = written(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "reward"
    invoke(
        "train",
        chat,
        data,
        "--task",
        "reward",
        "--out",
        out,
        "--epochs",
        10,
        "--lr",
        0.02,
        "--eval",
        data,
        "--batch-size",
        4,
    )
    assert note(out)["ranked_after"] >= 0.9 > note(out)["ranked_before"] - 0.4
    output = invoke("predict", out, "aaa", "zzz", "--model", chat)
    good, bad = (float(line.split("\t")[0]) for line in output.strip().splitlines())
    assert good > bad


def test_pairs_and_regression(encoder, tmp_path):  # noqa: F811
    rows = [(text, other, kind) for (text, kind), (other, _) in zip(reviews(60), reversed(reviews(60)), strict=True)]
    data = tsv(tmp_path / "pairs.tsv", rows, ("sentence1", "sentence2", "label"))
    invoke("train", encoder, data, "--task", "pairs", "--out", tmp_path / "p", "--epochs", 8, "--lr", 0.03, "--batch-size", 16,
           "--head", "token")  # fmt: skip
    assert note(tmp_path / "p")["task"] == "pairs" and note(tmp_path / "p")["pooling"] == "token"
    output = invoke("predict", tmp_path / "p", rows[0][0], "--other", rows[0][1], "--model", encoder)
    assert output.split("\t")[0] in ("positive", "negative")
    assert "as many --other as texts" in invoke("predict", tmp_path / "p", "x", "--model", encoder, code=2)
    numbers = tsv(tmp_path / "n.tsv", [(text, "1.5" if kind == "positive" else "-1") for text, kind in reviews()])
    invoke(
        "train",
        encoder,
        numbers,
        "--task",
        "regress",
        "--out",
        tmp_path / "n",
        "--epochs",
        20,
        "--lr",
        0.03,
        "--batch-size",
        16,
    )
    assert note(tmp_path / "n")["pearson"] > 0.5
    assert float(invoke("predict", tmp_path / "n", "good", "--model", encoder).split("\t")[0]) > 0


@pytest.mark.parametrize("given, said", [
    (["--task", "sum"], "expected one of classify, pairs, regress"),
    (["--task", "sft", "--loss", "dpo"], "--loss is not an option of --task sft"),
    (["--task", "sft", "--device", "cuda:0"], "torch sees no GPU here"),
    (["--task", "sft", "--dtype", "int8"], "expected one of float32, bfloat16"),
    (["--task", "sft", "--quantize", "2bit"], "expected 8bit or 4bit"),
    (["--task", "sft", "--method", "red+", "--site", "mlp"], "red+ acts on q, k, v"),
    (["--task", "sft", "--rank", 2], "--rank is of low-rank edits, and red has none"),
    (["--task", "preference", "--loss", "orpo", "--store"], "orpo has no reference"),
    (["--task", "preference"], "there is no column 'chosen'"),
    (["--method", "rahf", "--task", "sft"], "is a task of its own"),
])  # fmt: skip
def test_bad_options_are_one_line(chat, tmp_path, given, said):
    import re

    if "cuda:0" in given and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    data = written(tmp_path / "rows.jsonl", ROWS)
    output = invoke("train", chat, data, "--out", tmp_path / "edit", *given, code=2)
    assert said in re.sub(r"[\s│]+", " ", output), output
    assert not (tmp_path / "edit").exists()
