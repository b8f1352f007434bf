"""`fastedit train --method rahf`: teachers from preference rows, then a student that meets their patterns."""

import json
import random
from pathlib import Path

import typer
from rich.console import Console

from .texts import load_model

DEFAULTS = {
    "mode": "scit", "student": "lora", "rank": 8, "teacher_steps": 450, "teacher_lr": 2e-5, "steps": None, "lr": None,
    "batch_size": None, "alpha": 5.0, "rows": None, "seed": 0,
}  # fmt: skip
PUBLISHED = {"scit": (450, 64, 3e-4, 512), "dual": (2500, 8, 9e-6, 64)}  # steps, batch, lr, response tokens
STUDENTS = ("lora", "red", "loreft")


def run(model, data, out, *, mode, student, rank, teacher_steps, teacher_lr, steps, lr, batch_size, alpha, rows, seed):
    console = Console()
    if mode not in PUBLISHED or student not in STUDENTS:
        raise typer.BadParameter(f"mode is {mode!r} and student {student!r}, expected scit or dual, and {', '.join(STUDENTS)}")
    if mode == "dual" and not teacher_steps:
        raise typer.BadParameter("dual trains a model of chosen and one of rejected responses: --teacher-steps from 1 on")
    try:
        pairs = read_pairs(data)[:rows]
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    published = PUBLISHED[mode]
    steps, batch_size, lr = (p if v is None else v for v, p in zip((steps, batch_size, lr), published, strict=False))
    loaded, tokenizer = load_model(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    from .progress import TrainingBar, bars

    try:
        with bars(console) as progress:
            taught = {"steps": teacher_steps, "lr": teacher_lr, "batch_size": batch_size, "seed": seed, "length": published[3]}
            base, rejected = _teach(mode, loaded, tokenizer, pairs, progress, **taught)
            if teacher_steps:
                base.save_pretrained(Path(out) / "model")
                tokenizer.save_pretrained(Path(out) / "model")
            module, keep, collator = _student(student, rank, base, rejected, tokenizer, alpha, published[3], seed)
            fitted = [{"prompt": p["prompt"], "response": p["chosen"]} for p in pairs]
            before = _loss(module, collator, fitted[:batch_size])
            from ..methods import rahf

            rahf.train(
                module, fitted, collator, steps=steps, batch_size=batch_size, lr=lr, seed=seed,
                callbacks=[TrainingBar(progress, f"{mode}: student")],
            )  # fmt: skip
            after = _loss(module, collator, fitted[:batch_size])
            summary = {
                "task": "alignment", "method": "rahf", "mode": mode, "student": student, "rows": len(pairs), "steps": steps,
                "lr": lr, "batch_size": batch_size, "alpha": alpha, "seed": seed, "teacher_steps": teacher_steps,
                "layers": list(module.layers), "loss_before": before, "loss_after": after,
            }  # fmt: skip
            keep(out, str(Path(out) / "model") if teacher_steps else model, summary)
    except (ValueError, OSError, ImportError) as error:
        raise typer.BadParameter(str(error)) from None
    where = f"{out}/model" if teacher_steps else model
    console.print(f"distance to the target pattern {before:.4g} before, [bold]{after:.4g}[/] after {steps} steps")
    hint = f"fastedit generate {where} --edit {out} --prompt '…'" if student != "lora" else "peft.PeftModel.from_pretrained"
    console.print(f"saved {out}, for the model {where}; try it with: {hint}", markup=False)


def read_pairs(path):
    """[{"prompt", "chosen", "rejected"}] of a .jsonl or a .json list; ValueError says which row is wrong."""
    text = Path(path).read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        found = [json.loads(line) for line in text.splitlines() if line.strip()]
    elif path.suffix == ".json":
        found = json.loads(text)
    else:
        raise ValueError(f"{path} is neither .json nor .jsonl")
    if not isinstance(found, list) or not found:
        raise ValueError(f"{path} holds no list of rows")
    for number, row in enumerate(found, 1):
        for name in ("prompt", "chosen", "rejected"):
            if not isinstance(row, dict) or not isinstance(row.get(name), str) or not (row[name] or name == "prompt"):
                raise ValueError(f"row {number} of {path} has no text {name!r}; expected prompt, chosen and rejected")
    return found


# --- teachers -----------------------------------------------------------------------------------------------------------


def _teach(mode, model, tokenizer, pairs, progress, *, length, **fitting):
    """(the base, the model of rejected responses or None): SCIT's hindsight model, or DUAL's two."""
    import copy

    from ..methods import rahf

    if mode == "scit":
        collator = rahf.Collator(tokenizer, (rahf.GOOD, rahf.BAD), length)
        _fit(model, pairs, lambda rows: _hindsight(model, collator, rows), progress, "scit: hindsight", **fitting)
        return model, None
    rejected, collator = copy.deepcopy(model), rahf.Collator(tokenizer, ("",), length)
    for teacher, name in ((model, "chosen"), (rejected, "rejected")):
        _fit(teacher, pairs, lambda rows, t=teacher, n=name: _said(t, collator, rows, n), progress, f"dual: {name}", **fitting)
    return model, rejected


def _hindsight(model, collator, rows):
    """Chosen responses under the good instruction and rejected ones under the bad, each against the other."""
    import torch

    from ..methods import rahf

    both = [{"prompt": row["prompt"], "response": row[name]} for name in ("chosen", "rejected") for row in rows]
    given, count = collator(both), len(rows)
    fields = ("input_ids", "attention_mask")
    own = {f: torch.cat([given[f][0, :count], given[f][1, count:]]).to(model.device) for f in fields}
    opposite = {f: torch.cat([given[f][1, :count], given[f][0, count:]]).to(model.device) for f in fields}
    return rahf.hindsight_loss(model, own, opposite, given["response_mask"].to(model.device))


def _said(model, collator, rows, name):
    """Cross-entropy of the responses `name`, their tokens alone."""
    from torch.nn import functional as F

    given = collator([{"prompt": row["prompt"], "response": row[name]} for row in rows])
    given = {field: value.to(model.device) for field, value in given.items()}
    ids, columns = given["input_ids"][0], given["response_mask"].shape[1]
    logits = model(ids, attention_mask=given["attention_mask"][0], use_cache=False, logits_to_keep=columns + 1).logits
    each = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, -columns:], reduction="none")
    return (each * given["response_mask"]).sum() / given["response_mask"].sum()


def _fit(model, pairs, loss_of, progress, name, *, steps, lr, batch_size, seed):
    """AdamW on every parameter, batches drawn by the seed."""
    import torch

    task, draw = progress.add_task(name, total=steps), random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    torch.manual_seed(seed)
    model.train()
    for _ in range(steps):
        loss = loss_of(draw.sample(pairs, min(batch_size, len(pairs))))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.advance(task)
    model.zero_grad()
    model.eval()


# --- the student --------------------------------------------------------------------------------------------------------


def _student(student, rank, base, rejected, tokenizer, alpha, length, seed):
    """(the Rahf, keep(folder, base's name, summary), its Collator)"""
    import torch

    import fastedit

    from ..families import find_layers
    from ..methods import rahf

    dual = rejected is not None
    layers = rahf.default_layers(len(find_layers(base)), dual)
    collator = rahf.Collator(tokenizer, ("",) if dual else ("", rahf.GOOD, rahf.BAD), length)
    if student == "lora":
        model = rahf.lora(base, layers, dual=dual, rank=rank, alpha=2 * rank, seed=seed)

        def keep(out, name, summary):
            model.peft_config["default"].base_model_name_or_path = name
            model.save_pretrained(out)

    else:
        torch.manual_seed(seed)
        where = {"layers": range(max(layers))}
        edit = fastedit.RED(**where) if student == "red" else fastedit.LoReFT(rank, seed=seed, **where)
        model, handle = base, fastedit.patch(base, edit, freeze=True)

        def keep(out, name, summary):
            fastedit.store.save(handle, out, base_model=name, training=summary)

    return rahf.Rahf(model, layers, rejected=rejected, alpha=alpha), keep, collator


def _loss(module, collator, rows):
    import torch

    given = {name: value.to(module.model.device) for name, value in collator(rows).items()}
    with torch.no_grad():
        return float(module.eval()(**given)["loss"])
