"""What the studies of the chat model share: chats, the dose of any edit, intervals as texts."""

import json
import math

import torch

import fastedit as fe
from fastedit.directions.dose import _batches, _Continued
from fastedit.methods.replies import wilson
from fastedit.training.batches import Padded, response_logps
from fastedit.training.responses import encode_pairs

TOKENS, CONTINUED = 16, 8  # tokens of a reply; prompts on which a dose is measured


class Loaded:
    """The chat model and its tokenizer, loaded when first asked for. given: another pair, for the tests."""

    def __init__(self, given=None):
        self.pair = given

    def __call__(self):
        if self.pair is None:
            self.pair = fe.chat_model()
        return self.pair


def as_chats(prompts, system=None):
    first = [{"role": "system", "content": system}] if system else []
    return [[*first, {"role": "user", "content": prompt}] for prompt in prompts]


def kl_of(model, tokenizer, handle, chats):
    """The dose of a handle as it is: nats a token over the first TOKENS tokens of continuations of CONTINUED chats."""
    with torch.no_grad():
        meter = _Continued(handle, _batches(model, chats[:CONTINUED], tokenizer, 16, None), new_tokens=TOKENS, seed=0)
        return meter(handle.strength)


def calibrated(model, tokenizer, handle, chats, nats):
    """The handle at the strength of that dose, on the same continuations; returns the strength."""
    given = {"tokenizer": tokenizer, "tolerance": 0.1, "new_tokens": TOKENS, "largest": 2.0**20}
    return fe.calibrate(model, handle, chats[:CONTINUED], target_kl=nats, **given).strength


@torch.no_grad()
def margins(model, tokenizer, pairs, batch_size=8):
    """[log p(chosen) − log p(rejected)], nats, of rows {"prompt", "chosen", "rejected"}."""
    features, found = encode_pairs(tokenizer, pairs), []
    was = model.training
    model.eval()
    for start in range(0, len(features), batch_size):
        (chosen, rejected), _ = response_logps(model, model, Padded(0)(features[start : start + batch_size]))
        found += (chosen - rejected).tolist()
    model.train(was)
    return found


# --- texts for the tables ---------------------------------------------------------------------------------------------


def share(hits, of):
    """"72 % (57–84; 32)", Wilson's interval."""
    low, high = wilson(hits, of)
    return f"{100 * hits / of:.0f} % ({100 * low:.0f}–{100 * high:.0f}; {of})"


def mean(values, sign=False, digits=2):
    """"0.31 (0.25 to 0.37)": the normal 95 % interval over the values."""
    count, middle = len(values), sum(values) / len(values)
    half = 1.96 * math.sqrt(sum((v - middle) ** 2 for v in values) / max(1, count - 1) / count)
    plus = "+" if sign else ""
    return f"{middle:{plus}.{digits}f} ({middle - half:{plus}.{digits}f} to {middle + half:{plus}.{digits}f})"


def table(heads, lines):
    """A Markdown table of lines of cells. "not run" stands in a line that has fewer cells than the head."""
    lines = [[*cells, "not run", *[""] * len(heads)][: len(heads)] if len(cells) < len(heads) else cells for cells in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *lines))


def listed(rows, field):
    """The numbers of all rows' lists, in one list."""
    return [value for row in rows for value in json.loads(row[field])]


def share_of(rows, hits, of):
    """`share` of the sums of two fields."""
    return share(*(sum(int(row[field]) for row in rows) for field in (hits, of)))


def average(rows, field, digits):
    return f"{sum(float(row[field]) for row in rows) / len(rows):.{digits}f}"


def gained(rows, base, field, digits=2):
    """`mean` of how far each number of the rows' lists lies above its partner's in the base rows."""
    return mean([a - b for a, b in zip(listed(rows, field), listed(base, field), strict=True)], sign=True, digits=digits)


def rounded(values, digits=3):
    return [round(value, digits) for value in values]
