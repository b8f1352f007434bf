"""`fastedit train`: by method; here an edit and a linear head on mean-pooled states, fitted to labelled texts."""

import contextlib
import csv
import importlib
import json
import random

import typer
from rich.console import Console

METHODS = {"red": "RED", "direft": "DiReFT", "noreft": "NoReFT", "loreft": "LoReFT"}
OTHERS = ("rahf", "recontrol")  # each in a file of its own, with its own DEFAULTS
DEFAULTS = {
    "rank": 4, "text": None, "label": "label", "evaluate": None, "lr": 2e-2, "epochs": 2, "batch_size": 32, "rows": None,
    "seed": 0,
}  # fmt: skip


def run(model, data, out, method, given):
    """Train by a method; given: {option: value}, None for the method's own default."""
    if method not in (*METHODS, *OTHERS):
        raise typer.BadParameter(f"method is {method!r}, expected one of {', '.join((*METHODS, *OTHERS))}")
    if method in OTHERS:
        module = importlib.import_module(f".train_{method}", __package__)
        module.run(model, data, out, **_options(method, module.DEFAULTS, given))
    else:
        classify(model, data, out, method, **_options(method, DEFAULTS, given))


def _options(method, defaults, given):
    said = {name: value for name, value in given.items() if value is not None}
    for name in said:
        if name not in defaults:
            taken = ", ".join(_flag(known) for known in defaults)
            raise typer.BadParameter(f"{_flag(name)} is not an option of --method {method}, which takes {taken}")
    return {name: int(v) if name == "epochs" and float(v).is_integer() else v for name, v in (defaults | said).items()}


def _flag(name):
    return "--eval" if name == "evaluate" else f"--{name.replace('_', '-')}"


def classify(model, data, out, method, *, rank, text, label, evaluate, lr, epochs, batch_size, rows, seed):
    """A head on mean-pooled states, and an edit under it."""
    console, columns = Console(), (text, label)
    with _readable():
        train, test = _split(data, evaluate, columns, rows, seed)
        names = sorted({label for _, label in train}, key=_natural)
        if len(names) < 2:
            raise ValueError(f"{data} has one label only ({names[0]!r}), expected two or more")
        unknown = sorted({label for _, label in test} - set(names))
        if unknown:
            raise ValueError(f"the held-out rows have a label that training has not: {unknown[0]!r}")
    train, test = ([(text, names.index(label)) for text, label in part] for part in (train, test))
    classifier, handle, tokenizer = _build(model, method, rank, len(names), seed)
    head = sum(p.numel() for p in classifier.classifier.parameters())
    console.print(
        f"{method} on {model}: {handle.num_parameters():,} parameters and a head of {head:,}; {len(train):,} "
        f"rows to train on, {len(test):,} held out"
    )
    before, after = _fit(console, classifier, handle, tokenizer, train, test, lr, epochs, batch_size, seed)
    from ..recipes import save_trained

    summary = {
        "task": "classification", "pooling": "mean", "labels": names, "method": method, "rows": len(train),
        "epochs": epochs, "lr": lr, "batch_size": batch_size, "seed": seed, "held_out": len(test),
        "accuracy": after,
    }  # fmt: skip
    save_trained(classifier, handle, out, base_model=model, training=summary)
    tokenizer.save_pretrained(out)
    console.print(f"held-out accuracy {100 * before:.1f} % before, [bold]{100 * after:.1f} %[/] after")
    console.print(f"saved {out}; look at it with: fastedit show {out}")


def _build(model, method, rank, labels, seed):
    import torch
    from transformers import AutoModel, AutoTokenizer

    import fastedit

    from ..recipes import SentenceClassifier
    from .progress import quiet

    quiet()
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    classifier = SentenceClassifier(AutoModel.from_pretrained(model), labels)
    kind = getattr(fastedit, METHODS[method])
    edit = kind() if method == "red" else kind(rank, seed=seed)
    return classifier, fastedit.patch(classifier, edit, freeze=True), tokenizer


def _fit(console, classifier, handle, tokenizer, train, test, lr, epochs, batch_size, seed):
    """Held-out accuracy before and after."""
    from ..recipes import accuracy, fit, predict
    from .progress import TrainingBar, bars

    texts, labels = [text for text, _ in test], [label for _, label in test]
    before = accuracy(predict(classifier, texts, tokenizer), labels)
    with bars(console) as progress:
        fit(
            classifier, handle, train, tokenizer, lr=lr, epochs=epochs, batch_size=batch_size, seed=seed,
            callbacks=[TrainingBar(progress, "training")],
        )  # fmt: skip
    return before, accuracy(predict(classifier, texts, tokenizer), labels)


def _split(data, evaluate, columns, rows, seed):
    found = read_rows(data, *columns)
    random.Random(seed).shuffle(found)
    if evaluate is not None:
        return found[:rows], read_rows(evaluate, *columns)
    held_out = max(1, len(found[:rows]) // 10)
    train, test = found[:rows][held_out:], found[:rows][:held_out]
    if not train:
        raise ValueError(f"{data} has {len(found)} rows, too few to hold some out")
    return train, test


def read_rows(path, text, label):
    """[(text, label as a string)] of a .tsv with a header or a .jsonl; ValueError says which row is wrong."""
    with open(path, encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            records = [_parse(path, number, line) for number, line in enumerate(file, 1) if line.strip()]
        elif path.suffix == ".tsv":
            records = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        else:
            raise ValueError(f"{path} is neither .tsv nor .jsonl")
    if not records:
        raise ValueError(f"{path} has no rows")
    text = text or next((name for name in ("text", "sentence") if name in records[0]), "text")
    for number, record in enumerate(records, 1):
        for name in (text, label):
            if record.get(name) is None:
                columns = ", ".join(str(key) for key in record)
                raise ValueError(
                    f"row {number} of {path} has no {name!r} (found {columns}); see --text and --label"
                )
    return [(str(record[text]), str(record[label])) for record in records]


def _parse(path, number, line):
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} of {path} is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"line {number} of {path} is not a JSON object")
    return record


def _natural(label):
    return (0, int(label), "") if label.lstrip("-").isdecimal() else (1, 0, label)


@contextlib.contextmanager
def _readable():
    """Mistakes in the data as a line, not a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
