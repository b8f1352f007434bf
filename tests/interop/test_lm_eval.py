"""docs/lm-evaluation-harness.md on a task of four questions: the harness scores the edited model as we do by hand."""

import json

import pages
import pytest
import tiny_models as tiny
import torch
from word_tokenizer import tokenizer

import fastedit as fe

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install lm-eval")

TASK = """
task: four
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""
QUESTIONS = ["the cat was", "a dog was", "the mat is", "it is"]
CHOICES = ["good", "bad", "red"]


def test_the_page_scores_an_edited_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lm_eval.tasks import TaskManager

    said = tokenizer()
    model = tiny.build("llama", vocab_size=len(said), max_position_embeddings=256)
    model.config._name_or_path = "tiny"
    with fe.patch(model, fe.Steer({1: 3 * torch.randn(32, generator=torch.Generator().manual_seed(1))})) as handle:
        handle.save("my-edit")
    rows = [{"question": q, "choices": CHOICES, "answer": n % 3} for n, q in enumerate(QUESTIONS)]
    (tmp_path / "four.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "four.yaml").write_text(TASK.format(file=tmp_path / "four.jsonl"))
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    names = {"fe": fe, "model": model, "tokenizer": said, "tasks": ["four"], "manager": manager}
    _, block = pages.blocks("lm-evaluation-harness.md")
    exec(compile(block.code, str(block), "exec"), names)
    ids = said.convert_tokens_to_ids(CHOICES)
    for strength, found in names["found"].items():
        names["handle"].strength = strength
        hits = 0
        for row in rows:
            given = torch.tensor([said(row["question"])["input_ids"]])
            with torch.no_grad():
                hits += int(model(given).logits[0, -1, ids].argmax()) == row["answer"]
        assert found["four"]["acc,none"] == hits / 4
