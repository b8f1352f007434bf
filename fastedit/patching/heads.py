"""The modules of a model that are not its base. `freeze=True` leaves them trainable."""

from torch import nn

HEADS = ("classifier", "score", "qa_outputs", "classification_head")  # by name, on models of any class


def heads(model):
    """The task head and other newly initialized modules, to train beside the edits.

    In a transformers model: everything outside its base model that does not write tokens (projectors, pre-classifiers,
    classifiers), and a pooler whose biases are all zero, which no pretraining leaves. In any model: the HEADS by name.
    """
    found = [module for name in HEADS if isinstance(module := getattr(model, name, None), nn.Module)]
    base = getattr(model, "base_model", None)
    if not isinstance(base, nn.Module):
        return found
    pooler = getattr(base, "pooler", None)
    if isinstance(pooler, nn.Module) and _is_new(pooler):
        found.append(pooler)
    if base is model or _writes(model):
        return found
    inside = {id(module) for module in base.modules()}
    return found + [
        m for name, m in model.named_children() if name != "fastedit" and not inside & {id(x) for x in m.modules()}
    ]


def _writes(model):
    """Whether the model's head is over the vocabulary."""
    try:
        return hasattr(type(model), "generate") or model.get_output_embeddings() is not None
    except (AttributeError, NotImplementedError):
        return False


def _is_new(module):
    biases = [p for name, p in module.named_parameters() if name.endswith("bias")]
    return bool(biases) and not any(b.is_meta for b in biases) and not any(bool(b.any()) for b in biases)
