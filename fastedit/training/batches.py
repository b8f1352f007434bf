"""Encoded rows (fastedit/texts/chat.py) as batches, and the log-probabilities of their responses.

Rows are padded on the left. So all responses end in the last column, and the LM head works on their columns alone.
"""

import inspect
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..families.own_class import base_of
from ..patching.model_edits import root_of


@dataclass
class Padded:
    """Collates rows {"ids", "prompt"} into input_ids, attention_mask, labels (rows, columns), −100 over prompt and
    padding.

    Pairs {"chosen", "rejected", optionally "reference": two numbers} become the chosen rows, then the rejected ones,
    and `reference` (2, pairs).
    """

    pad: int

    def __call__(self, rows):
        if "chosen" in rows[0]:
            batch = self([row["chosen"] for row in rows] + [row["rejected"] for row in rows])
            if "reference" in rows[0]:
                batch["reference"] = torch.tensor(
                    [row["reference"] for row in rows], dtype=torch.float32
                ).T.contiguous()
            return batch
        longest = max(len(row["ids"]) for row in rows)
        ids = torch.full((len(rows), longest), self.pad)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for number, row in enumerate(rows):
            first = longest - len(row["ids"])
            ids[number, first:] = torch.tensor(row["ids"])
            mask[number, first:] = 1
            labels[number, first + row["prompt"] :] = ids[number, first + row["prompt"] :]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def as_features(encoded):
    """An Encoded as a row of a dataset."""
    return {"ids": encoded.ids, "prompt": encoded.prompt}


def token_logps(model, patched, batch):
    """(log-probabilities (rows, columns) fp32, mask of the same shape) of the responses' tokens, in the last columns.

    Args:
        model: called with the batch: the patched model, or a wrapper of it such as DDP.
        patched: the model with the edits, which are told where the prompts end.
    """
    labels, given = batch["labels"], {name: batch[name] for name in ("input_ids", "attention_mask")}
    columns = labels.shape[1] - int((labels != -100).any(0).int().argmax())
    takes = _takes(patched)
    if "position_ids" in takes:
        given["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    if "logits_to_keep" in takes:
        given["logits_to_keep"] = columns + 1
    if "use_cache" in takes:
        given["use_cache"] = False
    root = root_of(patched)
    output = model(**given) if root is None else root.rows.labelled(labels, model, **given)
    logits = output.logits[:, -columns - 1 : -1]
    targets = labels[:, -columns:]
    said = -F.cross_entropy(logits.transpose(1, 2).float(), targets, ignore_index=-100, reduction="none")
    return said, targets != -100


def response_logps(model, patched, batch):
    """((chosen, rejected) summed log-probabilities (pairs,), (chosen, rejected) numbers of tokens) of a batch of pairs."""
    said, mask = token_logps(model, patched, batch)
    return said.sum(1).chunk(2), mask.sum(1).chunk(2)


def _takes(model):
    """The names of the arguments of a model's forward; for a PEFT model, its base model's."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inspect.signature(base_of(inner).forward).parameters
