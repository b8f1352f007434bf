"""A tiny random chat model whose tokenizer knows the words of the project's example texts."""

import json
from pathlib import Path

import tiny_models
import torch
from word_tokenizer import tokenizer

EXAMPLES = Path(__file__).resolve().parents[1] / "fastedit" / "examples"


def words(more=()):
    """The words of fastedit/examples and of the texts `more`, sorted."""
    texts = [path.read_text() for path in sorted(EXAMPLES.glob("*.txt"))]
    for line in (EXAMPLES / "preferences.jsonl").read_text().splitlines():
        texts += json.loads(line).values()
    return sorted({word for text in [*texts, *more] for word in text.split()})


def build(layers=3, more=(), sharp=8.0, **changes):
    """(model, tokenizer): a Llama of width 32; `sharp` multiplies the head, so that some tokens are likelier than others."""
    said = tokenizer(words(more))
    model = tiny_models.build(
        "llama", vocab_size=len(said), num_hidden_layers=layers, **{"max_position_embeddings": 256} | changes
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(sharp)
    return model, said


def save(folder, *args, **changes):
    """`build`, as a folder."""
    for part in build(*args, **changes):
        part.save_pretrained(folder)
    return folder
