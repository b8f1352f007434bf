"""Training edits: what any Trainer needs to keep them, and tasks from rows of text to a saved edit.

callback.py     EditCallback: edit, head and adapter at each checkpoint of any Trainer, the best one included
reference.py    the same model at strength 0, as the reference of a preference loss; its log-probabilities, stored
losses.py       DPO, BiPO, RePS, ORPO on log-probabilities of responses
batches.py      rows as batches: left-padded, prompts masked
responses.py    SFT and preferences: the two Trainers, and functions from rows to a trained handle
sentences.py    classification, pairs and regression of sentences; the paper's head
rewards.py      a reward model: a scalar head and an edit; MetaRM's ascent step
"""

import importlib

_HOME = {
    "callback": ("EditCallback",),
    "reference": ("Reference", "at_zero", "store_reference"),
    "responses": ("PreferenceTrainer", "ResponseTrainer", "prefer", "sft"),
    "sentences": ("GLUE", "TokenHead", "classify", "pairs", "regress"),
    "rewards": ("RewardModel", "fit_reward"),
}
_WHERE = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_WHERE)


def __getattr__(name):
    if name not in _WHERE:
        raise AttributeError(f"module 'fastedit.training' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
