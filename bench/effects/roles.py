"""RoleRef on the chat model: does it refuse what its role cannot know, and still answer what it can?

Fixed before the first run:
    role       a farmer of the year 1750, in the system turn
    questions  24 that he can answer and 24 that he cannot (texts/), line k with line k; two folds: 12 pairs give the vectors,
               the other 12 are judged, then the reverse
    edit       roleref.vectors (half of the features kept), added at blocks 8 to 19, away from answerable, 0.2 and 0.4 nats a
               token over continuations of 8 questions of the fitted half that he cannot answer; and the paper's −0.1 at
               every block
    controls   a random direction as long in each layer, at the same KL (seed: the fold); the role with an order to refuse; no
               edit
    judged     by log-probabilities: the mean over four refusals (texts/) of log p a token of the refusal, after each question.
               `apart`: AUROC of questions that he cannot answer against those that he can; `shift`: how far the refusals'
               log p moved on each kind, nats a token
    replies    greedy, 16 tokens; a refusal has one of PHRASES
"""

import json

import torch

import fastedit as fe
from fastedit import examples
from fastedit.directions.sweep import random_like
from fastedit.methods import roleref
from fastedit.methods.replies import replies
from fastedit.patching.eval_mode import evaluating
from fastedit.texts.chat import encode
from fastedit.training.batches import Padded, as_features, token_logps

from . import chat
from .onchat import TOKENS, Loaded, average, calibrated, gained, kl_of, rounded, share_of, table
from .rows import Rows
from .statistics import auroc

ROLE = "You are a farmer in England in the year 1750. You know only what such a farmer can know."
ORDER = " If you are asked about anything that did not exist in 1750, say that you do not know what that is."
PHRASES = ("do not know", "don't know", "never heard", "do not understand", "don't understand", "sorry", "not sure")
FOLDS, LAYERS = (0, 1), (8, 20)
KEYS, FIELDS = ("edit", "fold"), ("strength", "kl", "cannot", "can", "questions", "refused", "over_refused", "example")
NAMES = {
    "none": "no edit", "0.2": "RoleRef, 0.2 nats", "random 0.2": "random, 0.2 nats", "0.4": "RoleRef, 0.4 nats",
    "random 0.4": "random, 0.4 nats", "paper": "RoleRef, −0.1 at every block", "ordered": "ordered in the system turn",
}  # fmt: skip


def run(out, given=None, first=False):
    rows, loaded = Rows(out / "effects-roles.csv", KEYS, FIELDS), Loaded(given)
    for fold in FOLDS[: 1 if first else None]:
        vectors = None
        for edit in NAMES:
            if rows.has(edit=edit, fold=fold):
                continue
            if vectors is None:
                vectors = roleref.vectors(*loaded(), *(roleref.in_role(ROLE, some) for some in dealt(fold)[0]))
            rows.add({"edit": edit, "fold": fold} | measured(*loaded(), vectors, edit, fold))


def dealt(fold):
    """((can, cannot) fitted, (can, cannot) judged)"""
    sets = [examples.lines(chat.TEXTS / f"role_{name}.txt") for name in ("can", "cannot")]
    return [some[1 - fold :: 2] for some in sets], [some[fold::2] for some in sets]


def measured(model, tokenizer, vectors, edit, fold):
    fitted, judged = dealt(fold)
    chats = roleref.in_role(ROLE, fitted[1])
    if edit in ("none", "ordered"):
        return {"strength": 0.0, "kl": 0.0} | told(model, tokenizer, judged, ROLE + ORDER * (edit == "ordered"))
    own = random_like(vectors, fold) if edit.startswith("random") else vectors
    within = [layer for layer in own if LAYERS[0] <= layer < LAYERS[1]] or list(own)
    given = roleref.edit(own) if edit == "paper" else roleref.edit(own, -1.0, layers=within)
    with fe.patch(model, given) as handle:
        if edit != "paper":
            calibrated(model, tokenizer, handle, chats, float(edit.split()[-1]))
        kl = kl_of(model, tokenizer, handle, chats)
        return {"strength": float(handle.strength), "kl": kl} | told(model, tokenizer, judged, ROLE)


def told(model, tokenizer, judged, role):
    can, cannot = (roleref.in_role(role, some) for some in judged)
    said = {name: refusal_logs(model, tokenizer, some) for name, some in (("cannot", cannot), ("can", can))}
    texts = [replies(model, tokenizer, some, max_new_tokens=TOKENS, batch_size=12) for some in (cannot, can)]
    hits = [sum(any(phrase in text.lower() for phrase in PHRASES) for text in some) for some in texts]
    return {
        **{name: json.dumps(rounded(some)) for name, some in said.items()}, "questions": len(can), "refused": hits[0],
        "over_refused": hits[1], "example": " ".join(texts[0][0].split()),
    }  # fmt: skip


@torch.no_grad()
def refusal_logs(model, tokenizer, chats):
    """[mean over the refusals of log p a token of it] of each chat."""
    found = []
    refusals = examples.lines(chat.TEXTS / "role_refusals.txt")
    with evaluating(model):
        for messages in chats:
            rows = [as_features(encode(tokenizer, messages, text)) for text in refusals]
            said, mask = token_logps(model, model, Padded(0)(rows))
            found.append((said.sum(1) / mask.sum(1)).mean().item())
    return found


# --- the page ---------------------------------------------------------------------------------------------------------


def markdown(path):
    rows, lines = Rows(path, KEYS, FIELDS).read(), []
    for edit, name in NAMES.items():
        own = [row for row in rows if row["edit"] == edit]
        line = [name]
        if own:
            base = [one for row in own for one in rows if (one["edit"], one["fold"]) == ("none", row["fold"])]
            apart = [auroc(*(torch.tensor(json.loads(row[kind])) for kind in ("cannot", "can"))) for row in own]
            line.append("" if edit in ("none", "ordered") else average(own, "kl", 2))
            line.append(f"{sum(apart) / len(apart):.2f}")
            line += ["" if edit == "none" else gained(own, base, kind) for kind in ("cannot", "can")]
            line += [share_of(own, field, "questions") for field in ("refused", "over_refused")]
        lines.append(line)
    return table(["", "nats a token", "apart", "shift, cannot", "shift, can", "refused", "over-refused"], lines)
