"""Gates and the slow model that decides by the words of fastedit/edits/gates.py, a sequence at a time, without a cache."""

import copy

import tiny_models as tiny
import torch
from patch_cases import random_form, scaled_then_low_rank

import fastedit as fe

PAD = 0
LAYERS = [1, 2]  # that are edited
ATOL = 1e-6  # the masters, unit conditions among them, are fp32: 6e-8 of them, in sums of some tens


def vector(seed, width=tiny.WIDTH):
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


LEAVES = {  # of each rule: what its gates are given
    "dot": [{"condition": vector(1), "threshold": 0.2}],
    "soft dot": [{"condition": vector(1), "threshold": 0.2, "sharpness": 3.0}],
    "cosine": [{"condition": vector(2), "threshold": 0.05, "kind": "cosine"}],
    "soft cosine, prompt": [
        {"condition": vector(2), "threshold": 0.05, "kind": "cosine", "sharpness": 9.0, "decide": "prompt"}
    ],
    "dot, prompt": [{"condition": vector(3), "threshold": -0.1, "decide": "prompt"}],
    "dot, prompt mean": [{"condition": vector(4), "threshold": 0.1, "decide": "prompt mean"}],
    "cosine, prompt mean": [
        {"condition": vector(4), "threshold": 0.02, "kind": "cosine", "decide": "prompt mean", "sharpness": 5.0}
    ],
    "cast, prompt mean": [{"condition": vector(5), "threshold": 0.1, "kind": "cast", "decide": "prompt mean"}],
    "cast": [{"condition": vector(5), "threshold": 0.3, "kind": "cast", "sharpness": 4.0}],
    "elsewhere": [{"condition": vector(1), "threshold": 0.1, "layer": 0}],
    "elsewhere, prompt": [{"condition": vector(1), "threshold": 0.1, "layer": 0, "decide": "prompt", "sharpness": 40.0}],
    "elsewhere, other site": [{"condition": vector(3), "threshold": 0.1, "layer": 1, "site": "attn", "decide": "prompt"}],
    "prompt and token": [
        {"condition": vector(1), "threshold": -0.5, "decide": "prompt", "sharpness": 2.0}, {"condition": vector(2)},
    ],
    "elsewhere or not here": [
        {"condition": vector(1), "layer": 0, "decide": "prompt", "sharpness": 4.0},
        {"condition": vector(2), "threshold": -0.1, "kind": "cosine"},
    ],
    "two elsewhere": [{"condition": vector(1), "layer": 0, "decide": "prompt"}, {"condition": vector(2), "layer": 1}],
}  # fmt: skip
RULES = {
    "prompt and token": (lambda a, b: a & b, lambda a, b: a * b),
    "elsewhere or not here": (lambda a, b: a | ~b, lambda a, b: a + (1 - b) - a * (1 - b)),
    "two elsewhere": (lambda a, b: ~(a & b), lambda a, b: 1 - a * b),
}
SAME = (lambda a: a, lambda a: a)


def gate(name):
    return RULES.get(name, SAME)[0](*(fe.Gate(**given) for given in LEAVES[name]))


def score(rows, given):
    """s of rows (…, width), by the written formulas."""
    c = given["condition"].to(rows)
    kind = given.get("kind", "dot")
    if kind == "dot":
        return (rows * c).sum(-1)
    compared = torch.tanh(rows @ (torch.outer(c, c) / (c @ c))) if kind == "cast" else c.expand_as(rows)
    return torch.cosine_similarity(rows, compared, dim=-1, eps=1e-30)


def said(hidden, given, mask, prompt_columns):
    """g (sequences, columns) of hidden states (sequences, columns, width)."""
    decide, found = given.get("decide", "token"), []
    for rows, real in zip(hidden, mask, strict=True):
        prompt = rows[[t for t in range(prompt_columns) if real[t]]]
        if decide == "prompt":
            s = score(prompt[-1], given).expand(len(rows))
        elif decide == "prompt mean":
            s = score(prompt.mean(0), given).expand(len(rows))
        else:
            s = score(rows, given)
        found.append(s)
    s = torch.stack(found) - given.get("threshold", 0.0)
    sharpness = given.get("sharpness")
    return (s > 0).to(s) if sharpness is None else torch.sigmoid(sharpness * s)


class Slow:
    """A model with edits [(site, layer, Form)] behind one rule, by plain hooks; sequences whole, no cache."""

    def __init__(self, model, family, name, edits, keep_norm=False):
        self.model, self.name, self.keep_norm = copy.deepcopy(model), name, keep_norm
        self.elsewhere, self.coefficients = {}, []
        sites = {(site, layer) for site, layer, _ in edits}
        for number, given in enumerate(LEAVES[name]):
            if "layer" in given:
                site = given.get("site", edits[0][0])
                module = tiny.site_module(self.model, family, site, given["layer"])
                module.register_forward_hook(self.measure(number, given))
        for site, layer in sorted(sites):
            forms = [form for s, at, form in edits if (s, at) == (site, layer)]
            tiny.site_module(self.model, family, site, layer).register_forward_hook(self.edit(forms))

    def measure(self, number, given):
        def hook(module, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            self.elsewhere[number] = said(hidden, given, self.mask, self.prompt_columns)

        return hook

    def edit(self, forms):
        def hook(module, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            for form in forms:
                values = [
                    self.elsewhere[n] if "layer" in given else said(hidden, given, self.mask, self.prompt_columns)
                    for n, given in enumerate(LEAVES[self.name])
                ]
                k = RULES.get(self.name, SAME)[1](*values) * self.rows
                self.coefficients.append(k.detach())
                cast = type(form)(*(None if t is None else t.to(hidden) for t in form.tensors()))
                edited = hidden + k[..., None] * (cast(hidden) - hidden)
                if self.keep_norm:
                    length = edited.norm(dim=-1, keepdim=True)  # 0 for padding that no edit reaches
                    edited = edited * hidden.norm(dim=-1, keepdim=True) / torch.where(length > 0, length, 1.0)
                hidden = edited
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    def logits(self, ids, mask, prompt_columns, rows=1.0, **more):
        """rows: a further coefficient, (sequences, columns)."""
        self.mask, self.prompt_columns, self.rows, self.coefficients = mask, prompt_columns, rows, []
        given = {"input_ids": ids, "attention_mask": mask} | more
        if self.model.config.model_type == "gpt2":  # as generate does it: by the real tokens
            given["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
        if self.model.config.model_type not in ("bert", "roberta"):
            given["use_cache"] = False
        return self.model(**given).logits


def prompts(left=True):
    """Four prompts of 8, 5, 3 and 7 tokens, padded."""
    ids = torch.randint(3, tiny.VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(6))
    mask = torch.ones_like(ids)
    for row, short in ((1, 3), (2, 5), (3, 1)):
        span = slice(0, short) if left else slice(8 - short, 8)
        ids[row, span], mask[row, span] = PAD, 0
    return ids, mask


def generated(model, ids, mask, **options):
    """(sequences, [logits of each step])"""
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False, output_logits=True,
        return_dict_in_generate=True, pad_token_id=PAD, **options,
    )  # fmt: skip
    return out.sequences, out.logits


def check_steps(slow, sequences, logits, mask, prompt_columns, repeats=1, rows=None):
    """Each step's logits are those of the slow model on what was there then."""
    mask = mask.repeat_interleave(repeats, 0)
    for step, got in enumerate(logits):
        width = prompt_columns + step
        full = torch.cat([mask, torch.ones(len(mask), step, dtype=mask.dtype)], 1)
        k = 1.0 if rows is None else rows(full)
        with torch.no_grad():
            expected = slow.logits(sequences[:, :width], full, prompt_columns, k)[:, -1]
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=ATOL)


def patched(family, name, sites=("block",), fused=True, keep_norm=False, where=None, **changes):
    """(patched model, handle, slow model), in float64: what differs is where, not how precisely.

    The gate of each of the site's two edits looks at what the edit is given.
    """
    model = tiny.exact(tiny.build(family, **changes))
    form, layers = random_form(seed=3), LAYERS if family != "t5" else [2, 3]
    edits = [e for site in sites for e in scaled_then_low_rank(form, site, layers)]
    read = form.read / form.scale
    parts = [
        fe.Form(scale=form.scale, bias=form.bias),
        fe.Form(read=read, offset=form.offset - read @ form.bias, write=form.write),
    ]
    slow = Slow(
        model, family, name, [(s, at, part) for s in sites for part in parts for at in layers], keep_norm
    )
    gated = [e.when(gate(name)) for e in edits]
    for edit in gated:
        edit.keep_norm = keep_norm
        edit.positions = where
    return model, fe.patch(model, gated, fused=fused), slow


def mixed(slow):
    """Whether the gates told rows apart: else a test of them would show nothing."""
    k = torch.cat([c.flatten() for c in slow.coefficients])
    return bool((k > 0.6).any() and (k < 0.4).any())
