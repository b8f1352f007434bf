"""Training edits with the Hugging Face Trainer.

    handle = fastedit.patch(model, fastedit.RED(), freeze=True)
    Trainer(model=model, args=args, train_dataset=data).train()          # works as it is
    EditTrainer(handle=handle, args=args, train_dataset=data).train()    # and keeps checkpoints small

A plain Trainer saves the whole model, edits included. EditTrainer saves what trains. It never lets weight decay pull a
scale toward 0.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainingArguments

from ..files.edit_file import JSON, EditFileError
from ..hints import Folder
from ..patching import edit_folder as store
from ..patching import trained_beside as kept
from ..patching.eval_mode import evaluating
from ..patching.handle import Handle
from ..patching.trained_beside import HEAD

__all__ = [
    "HEAD", "EditTrainer", "SentenceClassifier", "accuracy", "fit", "load_head", "load_trained", "predict",
    "save_trained", "tokenized",
]  # fmt: skip

class EditTrainer(Trainer):
    """A Trainer for a handle's model.

    Args:
        handle: from `fastedit.patch(..., freeze=True)`.
        checkpoints: "edit": a checkpoint is the edit (loads with `fastedit.load`) and whatever else trains
            (head.safetensors). "model": the whole model as Trainer saves it. `load_best_model_at_end` and
            `resume_from_checkpoint` work with both.
        others: as for Trainer. `model` is the handle's if not given.

    Raises:
        ValueError: checkpoints="edit" under FSDP or DeepSpeed, which shard what it would save.
    """

    def __init__(
        self, *, handle: Handle, checkpoints: Literal["edit", "model"] = "edit", model: nn.Module | None = None, **others: Any
    ) -> None:
        if checkpoints not in ("edit", "model"):
            raise ValueError(f"checkpoints is {checkpoints!r}, expected 'edit' or 'model'")
        self.handle, self.checkpoints = handle, checkpoints
        model = handle.model if model is None else model
        with _edits_as_adapters(handle):
            super().__init__(model=model, **others)
        if checkpoints == "edit" and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("checkpoints='edit' does not go with FSDP or DeepSpeed: use checkpoints='model'")

    def get_decay_parameter_names(self, model):
        own = {id(p) for p in self.handle.parameters()}
        kept = {name for name, p in model.named_parameters() if id(p) not in own}
        return [name for name in super().get_decay_parameter_names(model) if name in kept]

    def _save(self, output_dir=None, state_dict=None):
        if self.checkpoints == "model":
            return super()._save(output_dir, state_dict)
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        step = {"step": self.state.global_step, "epoch": self.state.epoch}
        save_trained(self.model, self.handle, folder, training=step)
        processor = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if processor is not None:
            processor.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if not (Path(resume_from_checkpoint) / JSON).exists():
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_trained(self.model, self.handle, resume_from_checkpoint)

    def _load_best_model(self):
        if not (Path(self.state.best_model_checkpoint) / JSON).exists():
            return super()._load_best_model()
        load_trained(self.model, self.handle, self.state.best_model_checkpoint)


@contextlib.contextmanager
def _edits_as_adapters(handle):
    """The Trainer refuses a quantized base without adapters. Edits count as adapters if the base itself does not
    train."""
    model, edits = handle.model, {id(p) for p in handle._root.parameters()}
    extra = edits | {id(p) for p in kept.beside(handle)[0].values()}
    alone = all(id(p) in extra for p in model.parameters() if p.requires_grad)
    if not getattr(model, "is_quantized", False) or not alone or getattr(model, "_hf_peft_config_loaded", False):
        yield
        return
    model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        model._hf_peft_config_loaded = False


def save_trained(
    model: nn.Module, handle: Handle, folder: Folder, *, base_model: str | None = None, training: dict[str, Any] | None = None
) -> Path:
    """Write the edit and every other parameter of the model that trains (fastedit/patching/trained_beside.py).

    Args:
        model: the handle's, or one around it. handle: from `fastedit.patch`. folder: made if it is not there.
        base_model: id of the base, for edit.json. training: a JSON-able summary, kept there too.

    Returns:
        The folder's Path.
    """
    return store.save(handle, folder, base_model=base_model, training=training)


def load_trained(model: nn.Module, handle: Handle, folder: Folder) -> None:
    """Copy back, in place, what `save_trained` wrote to a folder for this model and this handle's edits.

    Raises:
        EditFileError: the files are damaged, or of other edits or another head. Nothing has changed.
    """
    own = kept.beside(handle)[0]
    _, tensors, head = kept.read(folder, model, must=bool(own))
    kept.check_head(folder, head, own)
    try:
        handle.load_tensors(tensors)
    except (KeyError, ValueError, TypeError) as error:
        raise EditFileError(f"{folder}: {error}") from error
    kept.copy_head(head, own)


def load_head(model: nn.Module, folder: Folder) -> None:
    """Copy head.safetensors of a folder into the model's parameters of the same names, in place.

    Raises:
        EditFileError: it is damaged, or does not belong to the folder's edit or to this model.
    """
    *_, head = kept.read(folder, model, must=True)
    own = {name: p for name, p in model.named_parameters() if name in head}
    kept.check_head(folder, head, own)
    kept.copy_head(head, own)


class SentenceClassifier(nn.Module):
    """A linear head on an encoder's states, averaged over the attention mask.

    forward(input_ids (batch, tokens), attention_mask, token_type_ids=None, labels=None) → {"logits": (batch, labels)} and,
    with labels, "loss": their cross-entropy, or for floating labels the mean squared error of the one output.

    Args:
        encoder: a model with `last_hidden_state` and a config, such as AutoModel gives. labels: how many outputs.
    """

    def __init__(self, encoder: nn.Module, labels: int) -> None:
        super().__init__()
        self.encoder, self.config = encoder, encoder.config
        self.classifier = nn.Linear(encoder.config.hidden_size, labels)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **types).last_hidden_state
        pooled = self.pooled(states, attention_mask)
        head = next(self.classifier.parameters(), pooled)  # fp32 over a bf16 encoder; nn.Identity has no parameters
        logits = self.classifier(pooled.to(head.dtype))
        if labels is None:
            return {"logits": logits}
        if labels.is_floating_point():
            return {"loss": nn.functional.mse_loss(logits.float()[:, 0], labels.float()), "logits": logits}
        return {"loss": nn.functional.cross_entropy(logits.float(), labels), "logits": logits}

    def pooled(self, states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """states (batch, tokens, width) → (batch, width): their mean where attention_mask is 1."""
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        return (states * mask).sum(1) / mask.sum(1)


def fit(
    model: nn.Module, handle: Handle | None, rows: Sequence[tuple[Any, float]], tokenizer: Any, *, lr: float, epochs: float,
    batch_size: int, seed: int, callbacks: Iterable[Any] = (), **arguments: Any,
) -> None:  # fmt: skip
    """Train what is trainable on (text, label) rows, without checkpoints.

    AdamW without weight decay, linear schedule after 6 % of warm-up (RED, arXiv 2402.15179), batches of similar length.

    Args:
        model: returns "loss" and "logits", such as SentenceClassifier. handle: None to train without an edit.
        rows: (text or pair of texts, label). tokenizer: for them, 128 tokens at most.
        lr: of AdamW. epochs, batch_size: of the training. seed: of the order of rows and dropout.
        callbacks: for the Trainer. arguments: further TrainingArguments.
    """
    defaults = {
        "learning_rate": lr, "num_train_epochs": epochs, "per_device_train_batch_size": batch_size,
        "seed": seed, "warmup_steps": 0.06, "train_sampling_strategy": "group_by_length",
        "save_strategy": "no", "logging_strategy": "no", "report_to": [], "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }  # fmt: skip
    data = {
        "train_dataset": tokenized(rows, tokenizer), "data_collator": DataCollatorWithPadding(tokenizer),
        "callbacks": list(callbacks),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as unused:
        data["args"] = TrainingArguments(output_dir=unused, **(defaults | arguments))
        trainer = (
            Trainer(model=model, **data)
            if handle is None
            else EditTrainer(model=model, handle=handle, **data)
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def tokenized(rows: Sequence[tuple[Any, float]], tokenizer: Any, max_length: int = 128) -> list[dict[str, Any]]:
    """(text, label) rows as the dicts that Trainer batches, cut to max_length tokens of the tokenizer. A text may be a pair
    of texts."""
    texts = _tokens([text for text, _ in rows], tokenizer, max_length)
    return [
        {**{name: values[n] for name, values in texts.items()}, "labels": label} for n, (_, label) in enumerate(rows)
    ]


def _tokens(texts, tokenizer, max_length, **options):
    """The tokenizer's fields. token_type_ids for pairs alone."""
    pairs = bool(texts) and not isinstance(texts[0], str)
    given = tuple(map(list, zip(*texts, strict=True))) if pairs else (texts,)
    found = tokenizer(*given, truncation=True, max_length=max_length, **options)
    fields = ("input_ids", "attention_mask", *(("token_type_ids",) if pairs else ()))
    return {name: found[name] for name in fields if name in found}


@torch.inference_mode()
def predict(
    model: nn.Module, texts: Sequence[Any], tokenizer: Any, batch_size: int = 64, max_length: int = 128
) -> torch.Tensor:
    """Logits (texts, labels), fp32 on the CPU, in the texts' order.

    Args:
        model: returns "logits", such as SentenceClassifier; run in eval mode. tokenizer: of its encoder.
        texts: texts, or pairs of texts. batch_size: of similar length in one forward. max_length: tokens of each.
    """
    order = sorted(range(len(texts)), key=lambda i: len("".join(texts[i])))
    device, found = next(model.parameters()).device, [None] * len(texts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = _tokens([texts[i] for i in chosen], tokenizer, max_length, padding=True, return_tensors="pt")
        with evaluating(model):
            logits = model(**{name: tensor.to(device) for name, tensor in batch.items()})["logits"]
        for i, row in zip(chosen, logits.float().cpu(), strict=True):
            found[i] = row
    return torch.stack(found)


def accuracy(logits: torch.Tensor, labels: Sequence[int] | torch.Tensor) -> float:
    """The share of rows, 0 to 1, whose largest value in logits (rows, labels) is at their number in labels."""
    return (logits.argmax(-1) == torch.as_tensor(labels)).double().mean().item()
