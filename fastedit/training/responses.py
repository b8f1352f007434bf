"""Training on responses: SFT and preferences, from rows to a trained handle.

    handle = fastedit.patch(model, fastedit.RED(), freeze=True)
    training.sft(handle, tokenizer, rows, lr=2e-3, epochs=3)                      # rows as in fastedit/texts/chat.py
    training.prefer(handle, tokenizer, pairs, loss="dpo", lr=2e-3)                # {"prompt", "chosen", "rejected"}
    handle.save("my-edit")

The edit is told where each prompt ends, so positions such as "last 4" are the prompt's in training as in generation.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from transformers import PrinterCallback, TrainingArguments

from ..hints import Folder, Row
from ..patching.handle import Handle
from ..texts.chat import encode_preference, encode_row
from . import losses
from .batches import Padded, as_features, response_logps, token_logps
from .recipes import EditTrainer
from .reference import at_strength, at_zero, store_reference

DEFAULTS = {
    "warmup_steps": 0.06, "lr_scheduler_type": "cosine", "weight_decay": 0.0, "save_strategy": "no", "logging_strategy": "no",
    "report_to": [], "disable_tqdm": True, "remove_unused_columns": False,
}  # fmt: skip


class ResponseTrainer(EditTrainer):
    """An EditTrainer whose loss is the mean −log p of the responses' tokens, over all rows of a step."""

    def __init__(self, **given):
        super().__init__(**given)
        self.model_accepts_loss_kwargs = True  # the Trainer then leaves the mean over accumulated batches to this loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        said, mask = token_logps(model, self.handle.model, inputs)
        loss = -said.sum() / (mask.sum() if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return (loss, {"loss": loss}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None


class PreferenceTrainer(ResponseTrainer):
    """An EditTrainer for pairs. The reference is the same model at strength 0, run before the policy and without
    gradients.

    Args:
        loss: "dpo", "bipo", "orpo" or "reps" (fastedit/training/losses.py).
        beta: of DPO and BiPO. orpo_weight: λ of ORPO.
        others: as for EditTrainer. Rows that hold "reference" (`store_reference`) need no reference forward.
    """

    def __init__(
        self, *, loss: Literal["dpo", "bipo", "orpo", "reps"] = "dpo", beta: float = 0.1, orpo_weight: float = 0.1, **given: Any
    ) -> None:
        if loss not in losses.LOSSES:
            raise ValueError(f"loss is {loss!r}, expected one of {', '.join(losses.LOSSES)}")
        self.loss, self.beta, self.orpo_weight = loss, beta, orpo_weight
        super().__init__(**given)
        self.model_accepts_loss_kwargs = False  # a mean over pairs
        self.sign, self.draw = 1, torch.Generator().manual_seed(self.args.seed)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward at each strength that the loss needs. A backward needs the strength of its forward."""
        signs = {"bipo": [2 * int(torch.randint(2, (), generator=self.draw)) - 1], "reps": [1, -1]}.get(self.loss, [1])
        inputs, total = self._referred(model, self._prepare_inputs(inputs)), 0.0
        for sign in signs:
            self.sign = sign
            with at_strength(self.handle, self.sign * self.handle.strength):
                total = total + super().training_step(model, dict(inputs), num_items_in_batch)
        self.sign = 1
        return total

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs, total = self._referred(model, self._prepare_inputs(inputs)), 0.0
        with torch.no_grad(), self.compute_loss_context_manager():
            for sign in [1, -1] if self.loss == "reps" else [1]:
                self.sign = sign
                with at_strength(self.handle, self.sign * self.handle.strength):
                    total = total + self.compute_loss(model, dict(inputs)).detach()
        self.sign = 1
        return total, None, None

    def _referred(self, model, inputs):
        if self.loss in losses.WITH_REFERENCE and "reference" not in inputs:
            with at_zero(self.handle.model):
                inputs["reference"] = torch.stack(response_logps(model, self.handle.model, inputs)[0])
        return inputs

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        reference = inputs.pop("reference", None)
        policy, lengths = response_logps(model, self.handle.model, inputs)
        if self.loss == "orpo":
            found = losses.orpo(policy, lengths, weight=self.orpo_weight)
        elif self.loss == "reps":
            found = losses.reps(policy, reference, lengths, sign=self.sign)
        else:
            found = losses.dpo(policy, reference, beta=self.beta, sign=self.sign)
        loss = found.mean()
        return (loss, {"loss": loss}) if return_outputs else loss


# --- from rows ----------------------------------------------------------------------------------------------------------


def sft(
    handle: Handle, tokenizer: Any, rows: Sequence[Row], *, evaluate: Sequence[Row] | None = None, lr: float = 2e-3,
    epochs: float = 3, batch_size: int = 8, prompt: int | None = None, response: int | None = None,
    columns: tuple[str, str] | None = None, seed: int = 0, callbacks: Iterable[Any] = (), output_dir: Folder | None = None,
    resume: Folder | bool | None = None, **arguments: Any,
) -> ResponseTrainer:  # fmt: skip
    """Train a handle on the responses of rows (fastedit/texts/chat.py). Returns the Trainer.

    Args:
        handle: from `fastedit.patch(..., freeze=True)` on a causal language model. tokenizer: of that model.
        rows: {"messages": [...]}, or {"prompt", "response"} with a text or a list of messages as prompt.
        evaluate: held-out rows. With them `Trainer.evaluate()` returns "eval_loss", the mean −log p of a response
            token.
        lr: of AdamW, on a cosine. epochs, batch_size: of the training.
        seed: of the order of rows and of dropout. callbacks: for the Trainer.
        prompt, response: the most tokens of each. A longer prompt loses its beginning, a longer response its end.
        columns: (prompt, response) columns' names, if they are not the usual ones.
        output_dir: folder of checkpoints, one per epoch. None for none. resume: a checkpoint to continue from, or True
            for the last.
        arguments: further TrainingArguments, such as gradient_accumulation_steps, gradient_checkpointing, bf16.

    Raises:
        ValueError: a row that cannot be learned, by number, before any training.
    """
    given = [encode(tokenizer, part, columns, prompt, response) for part in (rows, evaluate or [])]
    return _run(
        ResponseTrainer, handle, tokenizer, *given, lr=lr, epochs=epochs, batch_size=batch_size, seed=seed, callbacks=callbacks,
        output_dir=output_dir, resume=resume, trainer={}, arguments=arguments,
    )  # fmt: skip


def prefer(
    handle: Handle, tokenizer: Any, pairs: Sequence[Row], *, loss: Literal["dpo", "bipo", "orpo", "reps"] = "dpo",
    beta: float = 0.1, orpo_weight: float = 0.1, evaluate: Sequence[Row] | None = None, lr: float = 2e-3, epochs: float = 3,
    batch_size: int = 8, prompt: int | None = None, response: int | None = None, stored: Folder | None = None, seed: int = 0,
    callbacks: Iterable[Any] = (), output_dir: Folder | None = None, resume: Folder | bool | None = None,
    progress: Callable[[int, int], None] | None = None, **arguments: Any,
) -> PreferenceTrainer:  # fmt: skip
    """Train a handle on preferences. Returns the Trainer.

    Args:
        stored: a file for the reference's log-probabilities of `pairs`. It is made first if it is not there, and tied
            to model and rows by digests. By default the reference runs in each step.
        handle: from `fastedit.patch(..., freeze=True)` on a causal language model.
        pairs: rows {"prompt", "chosen", "rejected"}; a prompt is a text or a list of messages.
        loss: "dpo" (arXiv 2305.18290), "bipo" (arXiv 2406.00045), "orpo" (arXiv 2403.07691) or "reps"
            (fastedit/training/losses.py). beta: of DPO and BiPO. orpo_weight: λ of ORPO.
        progress: called with (pairs done, of how many) while `stored` is made.
        tokenizer: of the handle's model.
        evaluate: held-out rows, for `Trainer.evaluate()`. lr: of AdamW. epochs, batch_size: of the training.
        prompt, response: the most tokens of each. A longer prompt loses its beginning, a longer response its end.
        seed: of the order of rows and of dropout. callbacks: for the Trainer.
        output_dir: folder of checkpoints, one per epoch. None for none. resume: a checkpoint to continue from, or True
            for the last.
        arguments: further TrainingArguments, such as gradient_accumulation_steps, gradient_checkpointing, bf16.

    Raises:
        ValueError: a row that cannot be learned, by number, before any training; a loss that there is not; a Control.
    """
    if loss in losses.WITH_REFERENCE and any(edit.stage is not None for edit in handle.edits):
        raise ValueError("a Control has no gradient: train a value net with fastedit.methods.recontrol")
    given = [encode_pairs(tokenizer, part, prompt, response) for part in (pairs, evaluate or [])]
    if stored is not None:
        given[0] = store_reference(
            handle, given[0], stored, pad_of(tokenizer), batch_size=batch_size, progress=progress
        )
    return _run(
        PreferenceTrainer, handle, tokenizer, *given, lr=lr, epochs=epochs, batch_size=batch_size, seed=seed,
        callbacks=callbacks, output_dir=output_dir, resume=resume,
        trainer={"loss": loss, "beta": beta, "orpo_weight": orpo_weight}, arguments=arguments,
    )  # fmt: skip


def encode(tokenizer, rows, columns=None, prompt=None, response=None):
    """Rows as features, numbered from 1 in errors."""
    return [as_features(encode_row(tokenizer, row, n, columns).cut(prompt, response)) for n, row in enumerate(rows, 1)]


def encode_pairs(tokenizer, pairs, prompt=None, response=None):
    """Preference rows as features."""
    found = []
    for number, row in enumerate(pairs, 1):
        chosen, rejected = (e.cut(prompt, response) for e in encode_preference(tokenizer, row, number))
        found.append({"chosen": as_features(chosen), "rejected": as_features(rejected)})
    return found


def pad_of(tokenizer):
    """The id to pad with. Its value does not matter: the mask hides it."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def _run(kind, handle, tokenizer, rows, evaluate, *, lr, epochs, batch_size, seed, callbacks, output_dir, resume, trainer,
         arguments):  # fmt: skip
    if not rows:
        raise ValueError("there are no rows to train on")
    if getattr(getattr(handle.model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"{type(handle.model).__name__} is an encoder-decoder, expected a causal language model")
    if resume and output_dir is None:
        raise ValueError("resume needs the output_dir that holds the checkpoints")
    with tempfile.TemporaryDirectory() as unused:
        kept = {} if output_dir is None else {"save_strategy": "epoch", "save_total_limit": 2}
        options = {
            "learning_rate": lr, "num_train_epochs": epochs, "per_device_train_batch_size": batch_size,
            "per_device_eval_batch_size": batch_size, "seed": seed, "output_dir": str(output_dir or unused),
            "dataloader_pin_memory": torch.cuda.is_available(),
        }  # fmt: skip
        made = kind(
            handle=handle, args=TrainingArguments(**(DEFAULTS | kept | options | arguments)), train_dataset=rows,
            eval_dataset=evaluate or None, data_collator=Padded(pad_of(tokenizer)), callbacks=list(callbacks), **trainer,
        )  # fmt: skip
        made.remove_callback(PrinterCallback)
        was = handle.model.training
        try:
            made.train(resume_from_checkpoint=resume)
        finally:
            handle.model.train(was)
    return made
