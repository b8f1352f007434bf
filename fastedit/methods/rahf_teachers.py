"""RAHF's first step (arXiv 2312.15997, released code): the models whose activity patterns the student is fitted to.

    base, rejected = rahf_teachers.teach(model, tokenizer, pairs, "scit")        # one hindsight model; rejected is None
    base, rejected = rahf_teachers.teach(model, tokenizer, pairs, "dual")        # fine-tuned on chosen, and on rejected

A teacher is fine-tuned whole (as published), by LoRA, or by an edit. LoRA and edits are merged into its weights at the
end. What trains is fp32, whatever the model's dtype, in which the forwards run. The model has its own dtype again
afterwards.
"""

import copy
import tempfile
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import PrinterCallback, Trainer, TrainingArguments

from ..patching.handle import patch
from .rahf import BAD, GOOD, Collator, hindsight_loss

MODES = ("scit", "dual")
PUBLISHED = {  # rows per step, epochs; both: lr 2e-5 after 10 % of warm-up, cosine, up to 768 tokens, AdamW
    "scit": {"batch_size": 64, "epochs": 2}, "dual": {"batch_size": 128, "epochs": 3},
}  # fmt: skip
WAYS = ("full", "lora", "red", "red+", "loreft")
TOKENS = 768


def teach(model, tokenizer, pairs, mode="scit", *, by="full", lr=2e-5, epochs=None, steps=None, batch_size=None, micro_batch=None,
          tokens=TOKENS, rank=8, checkpointing=False, seed=0, output_dir=None, resume=False, callbacks=None,
          **arguments):  # fmt: skip
    """(base, rejected or None): the given model, taught in place, and for DUAL a copy taught the rejected responses.

    Args:
        pairs: rows {"prompt", "chosen", "rejected"}, prompts as strings or messages.
        by: "full", "lora", "red" or "red+". An edit that no weights can hold, such as LoReFT at `block`, is refused.
        epochs, batch_size: by default as published. steps: in place of epochs.
        micro_batch: rows per forward, a divisor of batch_size. By default up to 16.
        output_dir: folder of checkpoints and finished teachers, each in a folder of its name. resume: load what is
            finished there and continue what is not.
        callbacks: a function of the teacher's name that returns the Trainer's callbacks.

    Raises:
        ValueError: another mode or way, or a batch that micro-batches do not fill, before any training.
    """
    if mode not in MODES or by not in WAYS:
        raise ValueError(
            f"mode is {mode!r} and by {by!r}, expected one of {', '.join(MODES)} and one of {', '.join(WAYS)}"
        )
    if by == "loreft":
        raise ValueError("LoReFT acts on `block`, which no weights can hold: teach by full, lora, red or red+")
    batch_size = batch_size or PUBLISHED[mode]["batch_size"]
    micro = micro_batch or next(m for m in range(min(16, batch_size), 0, -1) if batch_size % m == 0)
    if batch_size % micro:
        raise ValueError(f"micro_batch={micro} does not divide batch_size={batch_size}")
    length = {"max_steps": steps} if steps else {"num_train_epochs": epochs or PUBLISHED[mode]["epochs"]}
    given = {
        "learning_rate": lr, "per_device_train_batch_size": micro, "gradient_accumulation_steps": batch_size // micro,
        "seed": seed,
        "lr_scheduler_type": "cosine", "warmup_steps": 0.1, "gradient_checkpointing": checkpointing, **length, **arguments,
    }  # fmt: skip
    names = {"scit": ("hindsight",), "dual": ("chosen", "rejected")}[mode]
    models = [model] if mode == "scit" else [model, copy.deepcopy(model)]
    collators = {
        name: _Hindsight(Collator(tokenizer, (GOOD, BAD), tokens, tokens, end=True)) if name == "hindsight"
        else _Said(Collator(tokenizer, ("",), tokens, tokens, end=True), name)
        for name in names
    }  # fmt: skip
    for name, teacher in zip(names, models, strict=True):
        folder = None if output_dir is None else Path(output_dir) / name
        said = [] if callbacks is None else callbacks(name)
        _teach(teacher, tokenizer, pairs, collators[name], by, rank, folder, resume, said, given)
    return models[0], models[1] if mode == "dual" else None


def _teach(model, tokenizer, pairs, collator, by, rank, folder, resume, callbacks, given):
    """Train one teacher in place, or load it if it is finished."""
    finished = folder is not None and folder / "model"
    if resume and finished and finished.is_dir():
        loaded = type(model).from_pretrained(finished, dtype=model.dtype)
        model.load_state_dict(loaded.state_dict())
        return
    collator.check(pairs)
    dtype, flags = model.dtype, [(p, p.requires_grad) for p in model.parameters()]
    trained, finish = _trainable(model, by, rank, given["seed"])
    wide = {"bf16": dtype is torch.bfloat16, "fp16": dtype is torch.float16} if by == "full" else {}
    if by == "full":
        model.float()
    with tempfile.TemporaryDirectory() as unused:
        kept = (
            {"save_strategy": "no"}
            if folder is None
            else {"save_strategy": "steps", "save_steps": 0.2, "save_total_limit": 1}
        )
        options = {
            "output_dir": str(folder or unused), "weight_decay": 0.0, "logging_strategy": "no", "report_to": [],
            "disable_tqdm": True, "remove_unused_columns": False, "dataloader_pin_memory": torch.cuda.is_available(), **kept,
            **wide,
        }  # fmt: skip
        trainer = TeacherTrainer(
            model=trained, args=TrainingArguments(**(options | given)), train_dataset=list(pairs), data_collator=collator,
            callbacks=list(callbacks),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        started = folder is not None and any(folder.glob("checkpoint-*"))
        trainer.train(resume_from_checkpoint=bool(resume and started) or None)
    finish()
    model.to(dtype)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    model.zero_grad()
    model.eval()
    if finished:
        model.save_pretrained(finished)
        tokenizer.save_pretrained(finished)


def _trainable(model, by, rank, seed):
    """(what the Trainer trains, a function that puts the result into the model's own weights)."""
    if by == "full":
        model.requires_grad_(True)
        return model, lambda: None
    torch.manual_seed(seed)
    if by == "lora":
        from peft import LoraConfig, get_peft_model

        wrapped = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))

        def merge():
            wrapped.merge_and_unload()
            if hasattr(model, "peft_config"):
                del model.peft_config

        return wrapped, merge
    import fastedit

    handle = patch(model, fastedit.RED() if by == "red" else fastedit.REDPlus(), freeze=True)

    def keep():
        handle.merge(fp32=True)

    return model, keep


class TeacherTrainer(Trainer):
    """A Trainer for the batches of `_Hindsight` and `_Said`."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mask = inputs["response_mask"]
        if "opposite_ids" in inputs:
            own, opposite = (
                {"input_ids": inputs[f"{side}_ids"], "attention_mask": inputs[f"{side}_mask"]}
                for side in ("own", "opposite")
            )
            loss = hindsight_loss(model, own, opposite, mask)
        else:
            loss = said_loss(model, inputs["input_ids"], inputs["attention_mask"], mask)
        return (loss, {"loss": loss}) if return_outputs else loss


def said_loss(model, ids, attention_mask, response_mask):
    """Cross-entropy of the responses' tokens, which are in the last columns."""
    columns = response_mask.shape[1]
    logits = model(input_ids=ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=columns + 1).logits
    each = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, -columns:], reduction="none")
    return (each * response_mask).sum() / response_mask.sum()


class _Said:
    """Collates pairs to their chosen, or their rejected, responses."""

    def __init__(self, collator, name):
        self.collator, self.name = collator, name

    def __call__(self, pairs):
        given = self.collator([{"prompt": pair["prompt"], "response": pair[self.name]} for pair in pairs])
        return {name: tensor[0] if name != "response_mask" else tensor for name, tensor in given.items()}

    def check(self, pairs):
        for number, pair in enumerate(pairs, 1):
            try:
                self([pair])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"row {number}: {error}") from None


class _Hindsight(_Said):
    """Collates pairs for SCIT: chosen under the good instruction and rejected under the bad, each against the other."""

    def __init__(self, collator):
        super().__init__(collator, None)

    def __call__(self, pairs):
        both = [{"prompt": pair["prompt"], "response": pair[name]} for name in ("chosen", "rejected") for pair in pairs]
        given, count = self.collator(both), len(pairs)
        ids, mask = given["input_ids"], given["attention_mask"]
        return {
            "own_ids": torch.cat([ids[0, :count], ids[1, count:]]), "opposite_ids": torch.cat([ids[1, :count], ids[0, count:]]),
            "own_mask": torch.cat([mask[0, :count], mask[1, count:]]),
            "opposite_mask": torch.cat([mask[1, :count], mask[0, count:]]), "response_mask": given["response_mask"],
        }  # fmt: skip
