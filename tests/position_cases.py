"""Which tokens are meant, by the words of fastedit/edits/positions.py, and the slow model that edits them, without a cache."""

import copy

import tiny_models as tiny
import torch
from patch_cases import random_form, scaled_then_low_rank

import fastedit as fe
from fastedit.edits.positions import positions

PAD = 0
SPECS = (
    "prompt", "generated", "first 2", "last 1", "last 3", "first 1 + last 2", "generated + first 1",
    {"tokens": [5, 9, 20]}, {"tokens": [7], "also": "last 2"}, "mask",
)  # fmt: skip
MASK = torch.tensor([[0, 0, 1, 0, 0.5, 1, 0, 1], [1, 1, 0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1, 1, -2]])
LAYERS = [0, 1]


def coefficients(spec, ids, mask, prompt_columns, repeats=1):
    """By the words of fastedit/edits/positions.py, a token at a time: (sequences, columns)."""
    where = positions(spec)
    found = torch.zeros(ids.shape)
    for b, row in enumerate(ids.tolist()):
        real = [t for t in range(len(row)) if mask[b, t]]
        prompt = [t for t in real if t < prompt_columns]
        chosen = set(prompt[: where.first]) | set(prompt[len(prompt) - where.last :] if where.last else [])
        chosen |= set(prompt) if where.prompt else set()
        chosen |= set(real) - set(prompt) if where.generated else set()
        chosen |= {t for t, token in enumerate(row) if token in where.tokens}
        for t in range(len(row)):
            given = MASK[b // repeats, t].item() if where.mask and t < MASK.shape[1] else 0.0
            found[b, t] = max(1.0 if t in chosen else 0.0, given)
    return found


class Slow:
    """A model edited by plain hooks where `rows` (sequences, columns) says, without a cache."""

    def __init__(self, model, family, form, sites):
        self.model, self.rows = copy.deepcopy(model), None
        for site in sites:
            for layer in LAYERS if family != "t5" else [2, 3]:
                tiny.site_module(self.model, family, site, layer).register_forward_hook(self.hook(form))

    def hook(self, form):
        def edit(module, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            cast = type(form)(*(t.to(hidden) for t in form.tensors()))
            edited = hidden + self.rows[..., None].to(hidden) * (cast(hidden) - hidden)
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return edit

    def logits(self, spec, ids, mask, prompt_columns, repeats=1):
        self.rows = coefficients(spec, ids, mask, prompt_columns, repeats)
        given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        if self.model.config.model_type == "gpt2":  # as generate does it: by the real tokens
            given["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            return self.model(**given).logits


def prompts(left=True):
    """Three prompts of 8, 5 and 3 tokens, padded."""
    ids = torch.randint(3, tiny.VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(2))
    ids[:, 3], ids[1, 6] = 5, 9
    mask = torch.ones_like(ids)
    for row, short in ((1, 3), (2, 5)):
        span = slice(0, short) if left else slice(8 - short, 8)
        ids[row, span], mask[row, span] = PAD, 0
    return ids, mask


def generated(model, ids, mask, **options):
    """(sequences, [logits of each step])"""
    torch.manual_seed(0)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False, output_logits=True,
        return_dict_in_generate=True, pad_token_id=PAD, **options,
    )  # fmt: skip
    return out.sequences, out.logits


def check_steps(slow, spec, sequences, logits, mask, prompt_columns, repeats=1):
    """Each step's logits are those of the slow model on what was there then."""
    mask = mask.repeat_interleave(repeats, 0)
    for step, said in enumerate(logits):
        width = prompt_columns + step
        full = torch.cat([mask, torch.ones(len(mask), step, dtype=mask.dtype)], 1)
        expected = slow.logits(spec, sequences[:, :width], full, prompt_columns, repeats)[:, -1]
        torch.testing.assert_close(said.double(), expected, rtol=1e-6, atol=1e-8)


def patched(family, spec, sites=("mlp", "block"), fused=True, **changes):
    """(patched model, handle, slow model), in float64: what differs is where, not how precisely."""
    model = tiny.exact(tiny.build(family, **changes))
    form = random_form(seed=3)
    slow = Slow(model, family, form, sites)
    layers = LAYERS if family != "t5" else [2, 3]
    edits = [e for site in sites for e in scaled_then_low_rank(form, site, layers)]
    for edit in edits:
        edit.positions = positions(spec)
    handle = fe.patch(model, edits, fused=fused)
    if spec == "mask":
        handle.mask(MASK)
    return model, handle, slow
