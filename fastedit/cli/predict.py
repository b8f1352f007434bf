"""`fastedit predict`: what a trained edit says of texts: labels, numbers, or replies."""

import json

import typer

from .loading import load_model
from .texts import read_texts
from .train import readable

SENTENCES = ("classification", "pairs", "regression", "reward")


def run(folder, texts, file, model, other, max_new_tokens, batch_size, out, as_json, **loading):
    from ..patching import edit_folder as store

    texts = [*(texts or ()), *(read_texts(file) if file else ())]
    if not texts:
        raise typer.BadParameter("there is no text: give some, or --texts with a file")
    with readable():
        folder = store.fetch(folder)
        header, _ = store.read(folder)
    note = header.get("training") or {}
    task = note.get("task")
    if task not in (*SENTENCES, "sft", "preference"):
        raise typer.BadParameter(
            f"{folder} was trained for {task!r}; predict knows {', '.join((*SENTENCES, 'sft', 'preference'))}"
        )
    if task == "pairs" and len(other or ()) != len(texts):
        raise typer.BadParameter(
            f"{folder} was trained on pairs: give as many --other as texts ({len(texts)}, not {len(other or ())})"
        )
    base = model or (header.get("base") or {}).get("model")
    if base is None:
        raise typer.BadParameter(f"{folder} does not name its base model: give --model")
    kind = "AutoModel" if task in SENTENCES[:3] else "AutoModelForCausalLM"
    loaded, tokenizer = load_model(base, kind=kind, **loading)
    with readable():
        rows = (_labels if task in SENTENCES else _replies)(
            loaded, tokenizer, folder, note, texts, other, max_new_tokens, batch_size
        )
    if out is not None:
        out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    if as_json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    for row in rows:
        typer.echo("\t".join(str(value) for value in row.values()))


def _labels(encoder, tokenizer, folder, note, texts, other, _, batch_size):
    from .. import load as load_edit
    from ..training.recipes import predict
    from ..training.rewards import RewardModel
    from ..training.sentences import with_head

    names = note.get("labels") or []
    if note["task"] == "reward":
        model = RewardModel(encoder)
        load_edit(encoder, folder)
        scores = model.scorer(tokenizer, batch_size)([""] * len(texts), texts)
        return [{"reward": round(score, 4), "text": text} for text, score in zip(texts, scores, strict=True)]
    model = with_head(encoder, len(names) or 1, note.get("pooling", "mean"))
    load_edit(model, folder)
    given = list(zip(texts, other, strict=True)) if note["task"] == "pairs" else texts
    logits = predict(model, given, tokenizer, batch_size)
    if not names:
        return [{"value": round(float(v), 4), "text": text} for v, text in zip(logits[:, 0], texts, strict=True)]
    sure = logits.softmax(-1)
    return [
        {"label": names[int(p.argmax())], "probability": round(float(p.max()), 4), "text": text}
        for p, text in zip(sure, texts, strict=True)
    ]


def _replies(model, tokenizer, folder, note, texts, _, max_new_tokens, batch_size):
    from .. import load as load_edit
    from ..methods.replies import replies
    from ..texts.chat import as_messages

    load_edit(model, folder)
    asked = [as_messages(text) for text in texts] if note.get("chat") else texts
    said = replies(model, tokenizer, asked, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return [{"prompt": text, "reply": reply} for text, reply in zip(texts, said, strict=True)]
