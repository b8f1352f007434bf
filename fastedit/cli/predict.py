"""`fastedit predict`: what a trained edit says of texts: labels, numbers, or replies."""

import json

import typer

from .loading import load_model
from .texts import read_texts
from .train import readable

SENTENCES = ("classification", "pairs", "regression", "reward")


def run(folder, texts, file, model, other, device, dtype, max_new_tokens, out, as_json=False):
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
    loaded, tokenizer = load_model(base, device, dtype, kind=kind)
    with readable():
        rows = (_labels if task in SENTENCES else _replies)(
            loaded, tokenizer, folder, note, texts, other, max_new_tokens
        )
    if out is not None:
        out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    if as_json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    for row in rows:
        typer.echo("\t".join(str(value) for value in row.values()))


def _labels(encoder, tokenizer, folder, note, texts, other, _):
    from .. import load as load_edit
    from ..training.recipes import predict
    from ..training.rewards import RewardModel
    from ..training.sentences import with_head

    names = note.get("labels") or []
    if note["task"] == "reward":
        model = RewardModel(encoder)
        load_edit(encoder, folder)
        scores = model.scorer(tokenizer)([""] * len(texts), texts)
        return [{"reward": round(score, 4), "text": text} for text, score in zip(texts, scores, strict=True)]
    model = with_head(encoder, len(names) or 1, note.get("pooling", "mean"))
    load_edit(model, folder)
    given = list(zip(texts, other, strict=True)) if note["task"] == "pairs" else texts
    logits = predict(model, given, tokenizer)
    if not names:
        return [{"value": round(float(v), 4), "text": text} for v, text in zip(logits[:, 0], texts, strict=True)]
    sure = logits.softmax(-1)
    return [
        {"label": names[int(p.argmax())], "probability": round(float(p.max()), 4), "text": text}
        for p, text in zip(sure, texts, strict=True)
    ]


def _replies(model, tokenizer, folder, note, texts, _, max_new_tokens):
    import torch

    from .. import load as load_edit
    from ..texts.chat import as_messages, prompt_ids

    load_edit(model.eval(), folder)
    found = []
    for text in texts:
        ids = prompt_ids(tokenizer, as_messages(text) if note.get("chat") else text)
        given = torch.tensor([ids], device=model.device)
        made = model.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        found.append({"prompt": text, "reply": tokenizer.decode(made[0, given.shape[1] :], skip_special_tokens=True)})
    return found
