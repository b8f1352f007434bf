"""`fastedit train --task classify|pairs|regress`: an edit and a head on an encoder, fitted to labelled texts."""

import random

from rich.console import Console

from ..texts.data_files import read_rows as read_file
from .loading import SIZES, load_model, trainer_options
from .train import edits_of

_OWN = {
    "rank": 4, "layers": None, "positions": None, "site": None, "text": None, "label": "label", "evaluate": None, "lr": 2e-2,
    "epochs": 2, "batch_size": 32, "rows": None, "head": "mean", "seed": 0,
}  # fmt: skip


def defaults(task):
    other = {"other": None} if task == "pairs" else {}
    return _OWN | other | {name: value for name, value in SIZES.items() if name != "resume"}


def run(model, data, out, method, task, *, rank, layers, positions, site, text, label, evaluate, lr, epochs, batch_size, rows,
        head, seed, device, dtype, device_map, quantize, accumulate, checkpointing, other=None):  # fmt: skip
    columns = (text, label, other) if task == "pairs" else (text, label)
    train, test = _split(data, evaluate, columns, rows, seed, pairs=task == "pairs")
    names, train, test = _numbered(data, train, test, task)
    from .. import patch
    from ..patching.trained_beside import beside
    from ..training.recipes import predict, save_trained
    from ..training.sentences import with_head

    import torch  # isort: skip

    edits = edits_of(method, rank=rank, seed=seed, layers=layers, positions=positions, site=site)
    encoder, tokenizer = load_model(model, device, dtype, device_map, quantize, kind="AutoModel")
    torch.manual_seed(seed)
    classifier = with_head(encoder, len(names) or 1, head)
    handle, console = patch(classifier, edits, freeze=True), Console()
    size = sum(p.numel() for p in beside(handle)[0].values())
    console.print(
        f"{method} on {model}: {handle.num_parameters():,} parameters and a head of {size:,}; {len(train):,} rows to train on, "
        f"{len(test):,} held out"
    )
    texts, wanted = [text for text, _ in test], [value for _, value in test]
    before = _measured(predict(classifier, texts, tokenizer), wanted, task)
    sizes = trainer_options(device=device, accumulate=accumulate, checkpointing=checkpointing)
    _fit(console, classifier, handle, train, tokenizer, lr=lr, epochs=epochs, batch_size=batch_size, seed=seed, **sizes)
    after = _measured(predict(classifier, texts, tokenizer), wanted, task)
    summary = {
        "task": {"classify": "classification", "regress": "regression"}.get(task, task), "pooling": head, "labels": names,
        "method": method, "rows": len(train), "epochs": epochs, "lr": lr, "batch_size": batch_size, "seed": seed,
        "held_out": len(test), **after,
    }  # fmt: skip
    save_trained(classifier, handle, out, base_model=model, training=summary)
    tokenizer.save_pretrained(out)
    for name, value in after.items():
        shown = (f"{100 * v:.1f} %" if name == "accuracy" else f"{v:.3f}" for v in (before[name], value))
        was, now = shown
        console.print(f"held-out {name} {was} before, [bold]{now}[/] after")
    console.print(f"saved {out}; use it with: fastedit predict {out} --model {model} 'a text'", markup=False)


def _fit(console, classifier, handle, train, tokenizer, **given):
    from ..training.recipes import fit
    from .progress import TrainingBar, bars

    with bars(console) as progress:
        fit(classifier, handle, train, tokenizer, callbacks=[TrainingBar(progress, "training")], **given)


def _measured(logits, wanted, task):
    from ..training.recipes import accuracy
    from ..training.sentences import correlations

    return correlations(logits, wanted) if task == "regress" else {"accuracy": accuracy(logits, wanted)}


def _numbered(data, train, test, task):
    """(labels' names, train, test) with labels as numbers."""
    if task == "regress":
        return [], *([(text, _number(data, value)) for text, value in part] for part in (train, test))
    names = sorted({label for _, label in train}, key=_natural)
    if len(names) < 2:
        raise ValueError(f"{data} has one label only ({names[0]!r}), expected two or more")
    unknown = sorted({label for _, label in test} - set(names))
    if unknown:
        raise ValueError(f"the held-out rows have a label that training has not: {unknown[0]!r}")
    return names, *([(text, names.index(label)) for text, label in part] for part in (train, test))


def _number(data, value):
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{data} has the label {value!r}, and --task regress needs numbers") from None


def _split(data, evaluate, columns, rows, seed, pairs=False):
    found = read_rows(data, *columns, pairs=pairs)
    random.Random(seed).shuffle(found)
    if evaluate is not None:
        return found[:rows], read_rows(evaluate, *columns, pairs=pairs)
    held_out = max(1, len(found[:rows]) // 10)
    train, test = found[:rows][held_out:], found[:rows][:held_out]
    if not train:
        raise ValueError(f"{data} has {len(found)} rows, too few to hold some out")
    return train, test


def read_rows(path, text, label, other=None, *, pairs=False):
    """[(text, label as a string)] of a file, a text being a pair of texts for `pairs`; ValueError names the bad row."""
    records = read_file(path)
    guesses = (
        (("text", "sentence"), ("other", "sentence2", "text2"))
        if not pairs
        else (("text", "sentence1", "sentence"), ("other", "sentence2", "text2"))
    )
    text, other = (
        given or next((n for n in names if n in records[0]), names[0])
        for given, names in zip((text, other), guesses, strict=True)
    )
    wanted = (text, other, label) if pairs else (text, label)
    for number, record in enumerate(records, 1):
        for name in wanted:
            if record.get(name) is None:
                columns = ", ".join(str(key) for key in record)
                raise ValueError(
                    f"row {number} of {path} has no {name!r} (found {columns}); see --text, --other and --label"
                )
    return [((str(r[text]), str(r[other])) if pairs else str(r[text]), str(r[label])) for r in records]


def _natural(label):
    return (0, int(label), "") if label.lstrip("-").isdecimal() else (1, 0, label)
