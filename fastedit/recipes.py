"""Training edits with the Hugging Face Trainer.

    handle = fastedit.patch(model, fastedit.RED(), freeze=True)
    Trainer(model=model, args=args, train_dataset=data).train()          # works as it is
    EditTrainer(handle=handle, args=args, train_dataset=data).train()    # and keeps checkpoints small

A plain Trainer saves the whole model, edits included. EditTrainer saves what trains, and never lets weight
decay pull a scale towards 0.
"""

import hashlib
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import nn
from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainingArguments

from . import store
from .edit_file import JSON, EditFileError, replace
from .evaluating import evaluating
from .files.sealed import Damaged, read_regular, stored_header

__all__ = [
    "HEAD", "EditTrainer", "SentenceClassifier", "accuracy", "fit", "load_head", "load_trained", "predict",
    "save_trained", "tokenized",
]  # fmt: skip

HEAD = "head.safetensors"


class EditTrainer(Trainer):
    """A Trainer for a handle's model.

    Args:
        handle: from `fastedit.patch(..., freeze=True)`.
        checkpoints: "edit": a checkpoint is the edit (loads with `fastedit.load`) and whatever else trains
            (head.safetensors); "model": the whole model as Trainer saves it. `load_best_model_at_end` and
            `resume_from_checkpoint` work with both.
        others: as for Trainer; `model` is the handle's if not given.

    Raises:
        ValueError: checkpoints="edit" under FSDP or DeepSpeed, which shard what it would save.
    """

    def __init__(self, *, handle, checkpoints="edit", model=None, **others):
        if checkpoints not in ("edit", "model"):
            raise ValueError(f"checkpoints is {checkpoints!r}, expected 'edit' or 'model'")
        self.handle, self.checkpoints = handle, checkpoints
        super().__init__(model=handle.model if model is None else model, **others)
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


def save_trained(model, handle, folder, *, base_model=None, training=None):
    """Save the handle's edit, and in head.safetensors every other parameter of `model` that trains.

    edit.json notes the head's checksum, so a crash between the two is found on loading.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    head = to_bytes({name: p.detach().cpu().contiguous() for name, p in _others(model, handle)})
    replace(folder / HEAD, head)
    note = {**(training or {}), "head": hashlib.sha256(head).hexdigest()}
    return store.save(handle, folder, base_model=base_model, training=note)


def load_trained(model, handle, folder):
    """Copy back, in place, what `save_trained` wrote for this model and this handle's edits.

    Raises:
        EditFileError: the files are damaged, or of other edits or another head; nothing has changed.
    """
    header, tensors = store.read(folder)
    head = _read_head(folder, header)
    own = dict(_others(model, handle))
    _check_head(folder, head, own)
    try:
        handle.load_tensors(tensors)
    except (KeyError, ValueError, TypeError) as error:
        raise EditFileError(f"{folder}: {error}") from error
    _copy(head, own)


def load_head(model, folder):
    """Copy head.safetensors of a folder into the model's parameters of the same names, in place.

    Raises:
        EditFileError: it is damaged, or does not belong to the folder's edit, or not to this model.
    """
    header, _ = store.read(folder)
    head = _read_head(folder, header)
    own = {name: p for name, p in model.named_parameters() if name in head}
    _check_head(folder, head, own)
    _copy(head, own)


def _others(model, handle):
    """(name, parameter) of what trains besides the edit."""
    own = {id(p) for p in handle.parameters()}
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in own]


def _read_head(folder, header):
    path = Path(folder) / HEAD
    training = header.get("training")
    try:
        content = read_regular(path, 64 << 30)
        if hashlib.sha256(content).hexdigest() != (training.get("head") if isinstance(training, dict) else None):
            raise Damaged(f"is not the head of this edit: its checksum differs from the one in {JSON}")
        stored_header(content)
        return from_bytes(content)
    except FileNotFoundError:
        raise EditFileError(
            f"{folder} has no {HEAD}: expected a folder written by EditTrainer or `fastedit train`"
        ) from None
    except OSError as error:
        raise EditFileError(f"{path} cannot be read: {error.strerror or error}") from None
    except Damaged as error:
        raise EditFileError(f"{path} {error}") from None
    except (SafetensorError, ValueError, RuntimeError, LookupError, TypeError, OverflowError) as error:
        raise EditFileError(f"{path} is not a valid safetensors file: {error}") from None


def _check_head(folder, head, own):
    if head.keys() != own.keys():
        missing, extra = sorted(own.keys() - head.keys()), sorted(head.keys() - own.keys())
        raise EditFileError(f"{folder}/{HEAD}: missing {missing[:3]}, not in this model {extra[:3]}")
    for name, tensor in sorted(head.items()):
        if tensor.shape != own[name].shape:
            raise EditFileError(
                f"{folder}/{HEAD}: {name} has shape {tuple(tensor.shape)}, this model's is "
                f"{tuple(own[name].shape)}"
            )


def _copy(tensors, own):
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


class SentenceClassifier(nn.Module):
    """A linear head on an encoder's states, averaged over the attention mask.

    forward(input_ids (batch, tokens), attention_mask, labels=None) → {"logits": (batch, labels)} and, with
    labels, "loss": their cross-entropy.
    """

    def __init__(self, encoder, labels):
        super().__init__()
        self.encoder, self.config = encoder, encoder.config
        self.classifier = nn.Linear(encoder.config.hidden_size, labels)

    def forward(self, input_ids, attention_mask, labels=None):
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        pooled = (states * mask).sum(1) / mask.sum(1)
        logits = self.classifier(pooled)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits.float(), labels), "logits": logits}


def fit(model, handle, rows, tokenizer, *, lr, epochs, batch_size, seed, callbacks=(), **arguments):
    """Train what is trainable on (text, label) rows, without checkpoints.

    AdamW without weight decay, linear schedule after 6 % of warm-up (RED, arXiv 2402.15179), batches of like
    length. handle: None to train without an edit. arguments: further TrainingArguments.
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


def tokenized(rows, tokenizer, max_length=128):
    """(text, label) rows as the dicts that Trainer batches."""
    texts = tokenizer([text for text, _ in rows], truncation=True, max_length=max_length)
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": label}
        for ids, mask, (_, label) in zip(texts["input_ids"], texts["attention_mask"], rows, strict=True)
    ]


@torch.inference_mode()
def predict(model, texts, tokenizer, batch_size=64, max_length=128):
    """Logits (texts, labels) in the texts' order, computed in batches of like length, in eval mode."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    device, found = next(model.parameters()).device, [None] * len(texts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer(
            [texts[i] for i in chosen],
            padding=True,
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
        ).to(device)
        with evaluating(model):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])["logits"]
        for i, row in zip(chosen, logits.float().cpu(), strict=True):
            found[i] = row
    return torch.stack(found)


def accuracy(logits, labels):
    """Share of rows whose largest logit is their label's."""
    return (logits.argmax(-1) == torch.as_tensor(labels)).double().mean().item()
