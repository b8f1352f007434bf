"""`fastedit bench`: a model with an edit against itself without one, in turns."""

import copy
import statistics

import typer

from .loading import load_model

BLOCKS = 5


def run(model, edit, tokens, batch, rounds, **loading):
    """[{work, variant, ms, ratio, interval}] of a prompt's forward ("prefill") and of one token behind it ("decode").

    ratio: to the unedited model, with the half-width of its 95 % interval over BLOCKS blocks of rounds.
    """
    import torch

    import fastedit

    from ..verifying.timing import interleave, ratio

    base, _ = load_model(model, kind=None, **loading)
    twin = copy.deepcopy(base, {id(p): p for p in [*base.parameters(), *base.buffers()]})  # on the same weights
    if edit is None:
        fastedit.patch(twin, fastedit.RED())
    else:
        fastedit.load(twin, edit)
    models = {"unedited": base, "edited": twin, "unedited again": base}
    _check_reads(base, model, batch, tokens + 1)
    ids = torch.randint(base.config.get_text_config().vocab_size, (batch, tokens + 1), device=base.device)
    found = []
    with torch.no_grad():
        for work, prepared in (("prefill", _prefill), ("decode", _decode)):
            if work == "decode" and not base.can_generate():
                continue
            calls = {name: prepared(one, ids) for name, one in models.items()}
            medians = interleave(calls, blocks=BLOCKS, rounds=max(3, rounds // BLOCKS))
            for name, times in medians.items():
                middle, half = ratio(medians, name, "unedited")
                row = {"work": work, "variant": name, "ms": 1e3 * statistics.median(times)}
                found.append(row | ({} if name == "unedited" else {"ratio": middle, "interval": half}))
    return found


def _check_reads(model, name, batch, tokens):
    import torch

    try:
        with torch.no_grad():
            model(torch.zeros(batch, tokens, dtype=torch.long, device=model.device))
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        raise typer.BadParameter(f"{name} cannot read {tokens} tokens: {error}; --tokens says how many") from None


def _prefill(model, ids):
    more = {"use_cache": False} if model.can_generate() else {}
    return lambda: model(ids[:, :-1], **more)


def _decode(model, ids):
    """One token behind the prompt's cache, which is cut back after each call."""
    cache = model(ids[:, :-1], use_cache=True).past_key_values

    def step():
        model(ids[:, -1:], past_key_values=cache, use_cache=True)
        cache.crop(-1)  # how many to drop

    return step
