"""`fastedit merge` and `fastedit evaluate`."""

import math

import typer

from .loading import load_model
from .texts import read_texts

HEADS = ("classification", "pairs", "regression")


def merged(model, edit, out, strength, fp32, **loading):
    """Merge an edit into a model and save it. Returns what was done, JSON-able."""
    import fastedit

    base, tokenizer = load_model(model, kind=None, **loading)
    handle = fastedit.load(base, edit, head=False)
    if strength is not None:
        handle.strength = strength
    handle.merge(fp32=fp32)
    base.save_pretrained(out)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    lost = max(handle._merged.rounding.values(), default=0.0)
    return {"saved": str(out), "strength": handle.strength, "rounding": lost, "layers_merged": len(handle._merged.rounding)}


def evaluated(model, data, edit, strengths, columns, batch_size, **loading):
    """Figures of an edit on data, [dict], one a strength."""
    from ..patching import edit_folder

    folder = edit_folder.fetch(edit)
    note = edit_folder.read(folder)[0].get("training")
    task = note.get("task") if isinstance(note, dict) else None
    if any(not math.isfinite(strength) for strength in strengths or ()):
        raise typer.BadParameter("--strength is not a finite number")
    if task in HEADS:
        return _with_head(model, data, folder, note, strengths, columns, batch_size, loading)
    return _language(model, data, folder, strengths, batch_size, loading)


def _dials(handle, strengths):
    for strength in strengths or [handle.strength]:
        handle.strength = strength
        yield strength


def _with_head(model, data, folder, note, strengths, columns, batch_size, loading):
    import fastedit

    from ..training.recipes import accuracy, predict
    from ..training.sentences import correlations, with_head
    from .train_sentences import read_rows

    paired = note["task"] == "pairs"
    rows = read_rows(data, columns["text"], columns["label"], columns["other"], pairs=paired)
    texts, labels = zip(*rows, strict=True)
    names = note.get("labels") or []
    if names and (unknown := sorted(set(labels) - set(names))):
        raise typer.BadParameter(f"{data} has the label {unknown[0]!r}, and {folder} was trained on {', '.join(names)}")
    wanted = [names.index(label) for label in labels] if names else [float(label) for label in labels]
    encoder, tokenizer = load_model(model, kind="AutoModel", **loading)
    whole = with_head(encoder, len(names) or 1, note.get("pooling", "mean"))
    handle, found = fastedit.load(whole, folder), []
    for strength in _dials(handle, strengths):
        logits = predict(whole, list(texts), tokenizer, batch_size)
        figures = {"accuracy": accuracy(logits, wanted)} if names else correlations(logits, wanted)
        found.append({"strength": strength, "rows": len(rows), **figures})
    return found


def _language(model, data, folder, strengths, batch_size, loading):
    """Loss (nats per token) with and without the edit, and the mean KL between them, over the tokens of texts."""
    import fastedit

    texts = read_texts(data)
    if not all(isinstance(text, str) for text in texts):
        raise typer.BadParameter(f"{data} holds chats or rows with responses; perplexity is of texts, column text")
    base, tokenizer = load_model(model, **loading)
    tokenizer.padding_side = "right"
    handle, found = fastedit.load(base, folder), []
    for strength in _dials(handle, strengths):
        total = {"with": 0.0, "without": 0.0, "kl": 0.0, "tokens": 0}
        for at in range(0, len(texts), batch_size):
            _add(total, base, handle, strength, tokenizer(texts[at : at + batch_size], return_tensors="pt", padding=True))
        if not total["tokens"]:
            raise typer.BadParameter(f"{data} holds no text of two tokens or more")
        mean = {name: total[name] / total["tokens"] for name in ("with", "without", "kl")}
        found.append({
            "strength": strength, "tokens": total["tokens"], "loss": mean["with"], "loss_without": mean["without"],
            "kl": mean["kl"], "perplexity": math.exp(mean["with"]) if mean["with"] < 700 else None,
        })  # fmt: skip
    return found


def _add(total, model, handle, strength, given):
    import torch

    given = {name: given[name].to(model.device) for name in ("input_ids", "attention_mask")}
    real = given["attention_mask"][:, 1:].bool()
    said = {}
    with torch.no_grad():
        for name, dial in (("without", 0.0), ("with", strength)):
            handle.strength = dial
            said[name] = model(**given, use_cache=False).logits[:, :-1][real].float().log_softmax(-1)
    target = given["input_ids"][:, 1:][real][:, None]
    for name, logp in said.items():
        total[name] -= float(logp.gather(-1, target).double().sum())
    total["kl"] += float((said["without"].exp() * (said["without"] - said["with"])).double().sum())
    total["tokens"] += len(target)
