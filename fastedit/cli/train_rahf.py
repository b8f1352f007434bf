"""`fastedit train --method rahf`: teachers from preference rows, then a student that meets their patterns."""

from pathlib import Path

import typer
from rich.console import Console

from ..texts.data_files import read_rows
from .loading import SIZES, load_model, trainer_options
from .train_responses import as_chat, split

DEFAULTS = {
    "mode": "scit", "student": "lora", "rank": 8, "teacher": "full", "teacher_steps": None, "teacher_epochs": None,
    "teacher_lr": 2e-5, "fitted": None, "steps": None, "lr": None, "batch_size": None, "micro_batch": None, "alpha": 5.0,
    "evaluate": None, "rows": None, "chat": False, "seed": 0,
    **{name: value for name, value in SIZES.items() if name != "accumulate"},
}  # fmt: skip
PUBLISHED = {
    "scit": (450, 64, 3e-4, 512, "random"),
    "dual": (2500, 8, 9e-6, 64, "all"),
}  # steps, batch, lr, tokens, rows
STUDENTS = ("lora", "red", "loreft")


def run(model, data, out, *, mode, student, rank, teacher, teacher_steps, teacher_epochs, teacher_lr, fitted, steps, lr,
        batch_size, micro_batch, alpha,
        evaluate, rows, chat, seed, device, dtype, device_map, quantize, checkpointing, resume):  # fmt: skip
    console = Console()
    _check(mode, student, teacher, teacher_steps, quantize)
    steps, batch, lr, tokens, kind = (
        p if v is None else v for v, p in zip((steps, batch_size, lr, None, fitted), PUBLISHED[mode], strict=True)
    )
    micro = micro_batch or next(m for m in range(min(16, batch), 0, -1) if batch % m == 0)
    try:
        pairs, held = split(data, evaluate, rows, seed, read_pairs)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    if chat:
        pairs, held = ([as_chat(pair) for pair in part] for part in (pairs, held))
    loaded, tokenizer = load_model(model, device, dtype, device_map, quantize)
    from ..methods import rahf
    from ..methods.rahf_student import margins
    from .progress import TrainingBar, bars

    sizes = trainer_options(device=device, accumulate=1, checkpointing=checkpointing)
    cpu = {"use_cpu": True} if sizes.get("use_cpu") else {}
    try:
        with bars(console) as progress:
            rejected = None
            if teacher_steps != 0:
                loaded, rejected = _teach(
                    loaded, tokenizer, pairs, mode, teacher, progress, out, resume, checkpointing, steps=teacher_steps,
                    epochs=teacher_epochs, lr=teacher_lr, batch_size=batch_size, micro_batch=micro_batch, rank=rank, seed=seed,
                    **cpu,
                )  # fmt: skip
            module, keep, collator = _student(student, rank, loaded, rejected, tokenizer, alpha, tokens, seed)
            given, judged = rahf.rows_of(pairs, kind, seed), rahf.rows_of(held, kind, seed)[:micro]
            with rahf.teacher(module.model):
                base_margins = margins(module.model, collator, held)
            before = _loss(module, collator, judged)
            rahf.train(
                module, given, collator, steps=steps, batch_size=batch, micro_batch=micro, lr=lr, seed=seed,
                resume=_last(out, resume), output_dir=str(Path(out) / "checkpoints"), save_strategy="steps",
                save_steps=max(1, steps // 5), save_total_limit=1,
                callbacks=[TrainingBar(progress, f"{mode}: student")],
                **{name: value for name, value in sizes.items() if name != "gradient_accumulation_steps"},
            )  # fmt: skip
            after, said = _loss(module, collator, judged), margins(module.model, collator, held)
            shares = [sum(m > 0 for m in part) / len(part) for part in (base_margins, said)]
            means = [sum(part) / len(part) for part in (base_margins, said)]
            summary = {
                "task": "alignment", "method": "rahf", "mode": mode, "student": student, "rows": len(pairs), "fitted": kind,
                "steps": steps, "lr": lr, "batch_size": batch, "alpha": alpha, "seed": seed, "teacher": teacher,
                "teacher_steps": teacher_steps, "layers": list(module.layers), "loss_before": before, "loss_after": after,
                "held_out": len(held), "margin_before": means[0], "margin_after": means[1],
                "preferred_before": shares[0], "preferred_after": shares[1],
            }  # fmt: skip
            keep(out, str(Path(out) / "model") if teacher_steps != 0 else model, summary)
    except (ValueError, OSError, ImportError) as error:
        raise typer.BadParameter(str(error)) from None
    where = f"{out}/model" if teacher_steps != 0 else model
    _tell(console, summary, where, out)


def _tell(console, told, where, out):
    """Losses and margins of the summary, and what to do next."""
    held = f"{told['held_out']} held-out pair{'s' * (told['held_out'] != 1)}"
    console.print(
        f"distance to the target pattern on held-out pairs {told['loss_before']:.4g} before, "
        f"[bold]{told['loss_after']:.4g}[/] after {told['steps']} steps"
    )
    console.print(
        f"log P(chosen) − log P(rejected) on {held}: {told['margin_before']:.4g} for the teacher, "
        f"[bold]{told['margin_after']:.4g}[/] "
        f"with the student; positive in {100 * told['preferred_before']:.0f} % and {100 * told['preferred_after']:.0f} %",
        highlight=False,
    )
    hint = (
        f"fastedit generate {where} --edit {out} --prompt '…'"
        if told["student"] != "lora"
        else "peft.PeftModel.from_pretrained"
    )
    console.print(f"saved {out}, for the model {where}; try it with: {hint}", markup=False)


def _check(mode, student, teacher, teacher_steps, quantize):
    if mode not in PUBLISHED or student not in STUDENTS:
        raise typer.BadParameter(
            f"mode is {mode!r} and student {student!r}, expected scit or dual, and {', '.join(STUDENTS)}"
        )
    if mode == "dual" and teacher_steps == 0:
        raise typer.BadParameter(
            "dual trains a model of chosen and one of rejected responses: --teacher-steps from 1 on"
        )
    if quantize is not None and teacher == "full" and teacher_steps != 0:
        raise typer.BadParameter(
            "quantized weights do not train: --teacher lora, or --teacher-steps 0 with a ready teacher"
        )


def read_pairs(path):
    """[{"prompt", "chosen", "rejected"}] of a file, the prompt as text or messages; ValueError says which row is wrong."""
    from ..texts.chat import read_conversation

    found = read_rows(path)
    for number, row in enumerate(found, 1):
        for name in ("chosen", "rejected"):
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise ValueError(f"row {number} of {path} has no text {name!r}; expected prompt, chosen and rejected")
        if not isinstance(row.get("prompt"), str):
            if row.get("prompt") is None:
                raise ValueError(f"row {number} of {path} has no text 'prompt'; expected prompt, chosen and rejected")
            read_conversation(row["prompt"], f"row {number} of {path}, column 'prompt'")
    return found


def _teach(model, tokenizer, pairs, mode, by, progress, out, resume, checkpointing, **given):
    """(the model to fit a student on, the one of rejected responses or None); the first and the tokenizer go to OUT/model."""
    from ..methods import rahf_teachers
    from .progress import TrainingBar

    chosen, rejected = rahf_teachers.teach(
        model, tokenizer, pairs, mode, by=by, output_dir=Path(out) / "teachers", resume=resume, checkpointing=checkpointing,
        callbacks=lambda name: [TrainingBar(progress, f"{mode}: {name}")], **given,
    )  # fmt: skip
    chosen.save_pretrained(Path(out) / "model")
    tokenizer.save_pretrained(Path(out) / "model")
    return chosen, rejected


def _last(out, resume):
    """The student's last checkpoint, if it is to go on and there is one."""
    return True if resume and any((Path(out) / "checkpoints").glob("checkpoint-*")) else None


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

    from ..patching.eval_mode import evaluating

    given = {name: value.to(next(module.parameters()).device) for name, value in collator(rows).items()}
    with torch.no_grad(), evaluating(module):
        return float(module(**given)["loss"])
