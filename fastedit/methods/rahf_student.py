"""RAHF's student in training, and its results: checkpoints of the student alone, and the margin of held-out pairs."""

from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import Trainer

from ..files.edit_file import EditFileError, replace
from ..files.sealed import Damaged, open_tensors, read_regular, seal_tensors
from ..patching.eval_mode import evaluating

STUDENT = "student.safetensors"


class StudentTrainer(Trainer):
    """A Trainer for a Rahf. Its checkpoints hold what trains, and neither base nor rejected model."""

    def _save(self, output_dir=None, state_dict=None):
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        replace(folder / STUDENT, seal_tensors({name: p.detach().cpu().clone() for name, p in self._student().items()}, {}))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        path, own = Path(resume_from_checkpoint) / STUDENT, self._student()
        try:
            found = open_tensors(read_regular(path, None), ())[1]
        except FileNotFoundError:
            raise EditFileError(f"{path} is not there: a checkpoint of a RAHF student has it") from None
        except (Damaged, OSError) as error:
            raise EditFileError(f"{path} {error}: go on from another checkpoint") from None
        if found.keys() != own.keys() or any(found[name].shape != own[name].shape for name in own):
            raise EditFileError(f"{path} is of another student: its tensors are not those that train here")
        with torch.no_grad():
            for name, tensor in found.items():
                own[name].copy_(tensor)

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _student(self):
        model = self.accelerator.unwrap_model(self.model)
        return {name: p for name, p in model.named_parameters() if p.requires_grad}


def margins(model, collator, pairs, batch_size=8):
    """[log P(chosen) − log P(rejected)] of pairs under the neutral prompt, with the present model.

    collator: a rahf.Collator. The first of its instructions is used.
    """
    device, found = next(model.parameters()).device, []
    with torch.no_grad(), evaluating(model):
        for start in range(0, len(pairs), batch_size):
            part = pairs[start : start + batch_size]
            both = [
                {"prompt": pair["prompt"], "response": pair[name]} for name in ("chosen", "rejected") for pair in part
            ]
            given = {name: tensor.to(device) for name, tensor in collator(both).items()}
            ids, mask = given["input_ids"][0], given["response_mask"]
            columns = mask.shape[1]
            options = {"use_cache": False, "logits_to_keep": columns + 1}
            logits = model(input_ids=ids, attention_mask=given["attention_mask"][0], **options).logits[:, :-1].float()
            said = -F.cross_entropy(logits.transpose(1, 2), ids[:, -columns:], reduction="none")
            chosen, rejected = (said * mask).sum(1).chunk(2)
            found += (chosen - rejected).tolist()
    return found
