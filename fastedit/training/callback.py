"""EditCallback: keeps an edit, and what trains beside it, at each checkpoint of any Trainer.

handle = fastedit.patch(model, fastedit.RED(), freeze=True)
SFTTrainer(model=model, peft_config=LoraConfig(...), callbacks=[EditCallback(handle)], ...).train()
handle = fastedit.load(fresh_model, "out/checkpoint-500")
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from transformers import TrainerCallback

from ..files.edit_file import JSON, EditFileError
from ..hints import Folder
from ..patching import edit_folder as store
from ..patching import trained_beside as kept
from ..patching.handle import Handle

DECOUPLED = ("AdamW",)  # torch's optimizers whose weight decay is none of the gradient's


class EditCallback(TrainerCallback):
    """For the `callbacks` of a transformers Trainer or a TRL trainer, with PEFT or without.

    At each checkpoint it writes edit, head and adapter there (`fastedit.load` reads them). When training is resumed or
    the best checkpoint is loaded, it brings them back. If a trainer freezes what it is given, as TRL's do with a
    peft_config, the edit stays trainable.

    Args:
        handle: from `fastedit.patch`, on the model that is trained or on the one inside it.
        decay: where weight decay pulls the edit. None: nowhere, though other parameters decay. "identity": scales to 1
            and biases to 0. Never to 0 as a plain Trainer would.
        resume: the folder from which to restore the edit when training is resumed. By default the checkpoint of the
            step from which the Trainer continues, in its output_dir.

    Raises:
        ValueError: when training begins: base weights train that no checkpoint of an edit holds, or there is weight
            decay with an optimizer whose decay is not known. EditFileError: resumed, and there is no edit to restore, or one of
            other tensors, or with another head. The model is then as it was.
    """

    def __init__(
        self, handle: Handle, *, decay: Literal["identity"] | None = None, resume: Folder | None = None
    ) -> None:
        if decay not in (None, "identity"):
            raise ValueError(f"decay is {decay!r}, expected None or 'identity'")
        if decay and any(set(edit.names) - {"scale", "bias"} for edit in handle.edits if edit.trainable):
            raise ValueError(
                "decay='identity' is known for scales and biases; this handle trains other tensors: use decay=None"
            )
        self.handle, self.decay, self.resume = handle, decay, resume
        self.moved = {id(p) for p in kept.beside(handle)[0].values()}  # what freeze=True left trainable
        self.before = []

    # --- events ---------------------------------------------------------------------------------------------------------

    def on_init_end(self, args, state, control, **_):
        for parameter in self.handle.parameters():
            parameter.requires_grad_(True)
        for parameter in self.handle.model.parameters():
            if id(parameter) in self.moved:
                parameter.requires_grad_(True)

    def on_train_begin(self, args, state, control, optimizer=None, **_):
        edits = {id(p) for p in self.handle._root.parameters()}
        held = edits | {id(p) for p in kept.beside(self.handle)[0].values()}
        held |= {id(p) for p in kept.adapter_parameters(self.handle.model)} | {
            id(p) for module in kept.heads(self.handle.model) for p in module.parameters()
        }
        left = [n for n, p in self.handle.model.named_parameters() if p.requires_grad and id(p) not in held]
        if left:
            raise ValueError(
                f"{len(left)} base weights train along ({', '.join(left[:3])}, …), which a checkpoint of an edit does not hold: "
                "patch with freeze=True, or keep whole models without EditCallback"
            )
        self._check_decay(optimizer)
        if state.global_step:
            self._restore(self.resume or self._checkpoint(args, state.global_step))

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **_):
        self.before = []
        for group, parameter, neutral in self._decayed(optimizer):
            target = parameter.detach().clone() if neutral is None else neutral.to(parameter.device)
            if _is_decoupled(optimizer):
                self.before.append((parameter, target, group["lr"] * group["weight_decay"]))
            elif parameter.grad is not None:
                parameter.grad.sub_(target, alpha=group["weight_decay"])

    def on_optimizer_step(self, args, state, control, **_):
        with torch.no_grad():
            for parameter, target, share in self.before:
                parameter.add_(target, alpha=share)
        self.before = []

    def on_save(self, args, state, control, **_):
        folder = self._checkpoint(args, state.global_step)
        training = {"step": state.global_step, "epoch": state.epoch}
        if args.should_save or self._is_laid_out():
            store.save(self.handle, folder, training=training)

    def on_train_end(self, args, state, control, **_):
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._restore(state.best_model_checkpoint)

    # --- how ------------------------------------------------------------------------------------------------------------

    def _checkpoint(self, args, step):
        return Path(args.output_dir) / f"checkpoint-{step}"

    def _is_laid_out(self):
        return any(type(p) is not torch.nn.Parameter for p in self.handle.parameters())

    def _restore(self, folder):
        if not (Path(folder) / JSON).exists():
            raise EditFileError(
                f"{folder} holds no edit to go on from (no {JSON}): was it written with an EditCallback? Else say where it is, "
                "EditCallback(handle, resume=folder)"
            )
        _, tensors, head = kept.read(folder, self.handle.model)
        own = {name: p for name, p in self.handle.model.named_parameters() if name in head}
        kept.check_head(folder, head, own)  # an adapter that is not there would not be trained: none is put in
        try:
            self.handle.load_tensors(tensors)
        except (KeyError, ValueError, TypeError) as error:
            raise EditFileError(f"{folder}: {error}") from error
        kept.copy_head(head, own)

    def _decayed(self, optimizer):
        """(group, master, where decay pulls it or None) of the edit's masters that the optimizer decays."""
        neutral = {}
        for edit, _, masters in self.handle._each():
            for name, tensor in masters.masters().items():
                neutral[id(tensor)] = edit.neutral_tensor(name, tensor.shape[-1]) if self.decay else None
        for group in getattr(optimizer, "param_groups", ()):
            if group.get("weight_decay"):
                yield from ((group, p, neutral[id(p)]) for p in group["params"] if id(p) in neutral)

    def _check_decay(self, optimizer):
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper holds it
        known = optimizer is None or type(optimizer).__name__ in (*DECOUPLED, "Adam", "SGD")
        if not known and any(True for _ in self._decayed(optimizer)):
            raise ValueError(
                f"{type(optimizer).__name__} decays the edit by its own rule, which pulls scales to 0: use weight_decay=0, or "
                "AdamW, Adam or SGD"
            )


def _is_decoupled(optimizer):
    optimizer = getattr(optimizer, "optimizer", optimizer)
    return type(optimizer).__name__ in DECOUPLED or any(g.get("decoupled_weight_decay") for g in optimizer.param_groups)
