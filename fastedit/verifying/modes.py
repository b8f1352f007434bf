"""The ways in which a model is run. Each takes (model, requests, settings) and returns its results as [Said]."""

import threading
import traceback
from dataclasses import dataclass

import torch

from ..arguments import as_list
from .inputs import takes
from .reference import output_of, tensor_of


@dataclass
class Settings:
    """handle: of the edits, None of the model without them."""

    new_tokens: int
    backend: str
    seed: int
    handle: object = None


@dataclass
class Said:
    """A mode's result for a request: `logits`, to compare with a whole forward of `given` at its tokens `where`.

    prompt: how many of them (of the decoder's, behind an encoder) are the prompt. gradient: instead of logits, that of
    the embeddings.
    """

    given: dict
    prompt: int | None
    where: slice
    logits: torch.Tensor
    gradient: int | None = None

    def difference(self, slow, model, bare=None):
        """(largest difference from the reference, what the edits do there, largest number)"""
        expected = self._by(slow, model)
        effect = 0.0 if bare is None else float((expected - self._by(bare, model)).abs().max())
        got = self.logits.float()
        if got.shape != expected.shape:
            raise ValueError(f"said {tuple(got.shape)}, the reference {tuple(expected.shape)}")
        if not expected.isfinite().all():
            raise ValueError("the reference is not finite")
        difference = (got - expected).abs().max()
        return float(difference.nan_to_num(nan=float("inf"))), effect, float(expected.abs().max())

    def _by(self, slow, model):
        if self.gradient is not None:
            with slow.hooked(self.given, self.prompt):
                return _gradient(model, self.given, self.gradient).float()
        return slow.logits(model, self.given, self.prompt)[self.where].float()


def _prompt(given):
    ids = given.get("decoder_input_ids", given.get("input_ids"))
    return None if ids is None else ids.shape[1]


def _whole(given, logits, where=slice(None)):
    return Said(given, _prompt(given), where, logits)


def forward(model, requests, settings):
    """One whole forward per request, with the model's own settings of the cache."""
    with torch.no_grad():
        return [_whole(given, _of(model, given)[0]) for given in requests]


def batch(model, requests, settings):
    """All requests in one batch, padded on the right under a mask; of a model that takes none, as long as the shortest."""
    if not takes(model, "attention_mask") and "input_ids" in requests[0]:
        shortest = min(_prompt(given) for given in requests)
        requests = [{k: v[:, :shortest] if k.endswith("input_ids") else v for k, v in given.items()} for given in requests]
    names = [name for name in requests[0] if isinstance(requests[0][name], torch.Tensor)]
    together, masks = {}, {}
    for name in names:
        rows = [given[name][0] for given in requests]
        longest = max(len(row) for row in rows)
        if name.endswith("input_ids") and any(len(row) < longest for row in rows):
            mask = torch.stack([torch.arange(longest) < len(row) for row in rows]).long().to(rows[0].device)
            masks["decoder_attention_mask" if name.startswith("decoder") else "attention_mask"] = mask
            rows = [torch.nn.functional.pad(row, (0, longest - len(row))) for row in rows]
        together[name] = torch.stack(rows)
    with torch.no_grad():
        logits = _of(model, together | {name: mask for name, mask in masks.items() if takes(model, name)})
    found = []
    for given, row in zip(requests, logits, strict=True):
        tokens = slice(None) if _prompt(given) is None or row.dim() < 2 else slice(0, _prompt(given))
        found.append(_whole(given, row[tokens]))
    return found


def _of(model, given):
    return tensor_of(model(**given), model)


def _generation(**options):
    def mode(model, requests, settings):
        return [said for given in requests for said in _generate(model, [given], settings, **options)]

    return mode


def padding(model, requests, settings):
    """`generate` for all requests in one batch, padded on the left."""
    return _generate(model, requests, settings)


def _generate(model, requests, settings, **options):
    rows = [given["input_ids"][0] for given in requests]
    longest = max(len(row) for row in rows)
    pad = [longest - len(row) for row in rows]
    ids = torch.stack([torch.nn.functional.pad(row, (n, 0)) for row, n in zip(rows, pad, strict=True)])
    mask = torch.stack([torch.arange(longest) >= n for n in pad]).long().to(ids.device)
    behind = {k: torch.cat([given[k] for given in requests]) for k in requests[0] if k not in ("input_ids", "decoder_input_ids")}
    said = model.generate(
        input_ids=ids, attention_mask=mask, **behind, max_new_tokens=settings.new_tokens, min_new_tokens=settings.new_tokens,
        do_sample=False, output_logits=True, return_dict_in_generate=True, **options,
    )  # fmt: skip
    logits, encodes = torch.stack(said.logits, 1), getattr(model.config, "is_encoder_decoder", False)
    found = []
    for number, given in enumerate(requests):
        sequence = said.sequences[number]
        if getattr(said, "beam_indices", None) is not None:
            path = said.beam_indices[number]
            own = torch.stack([logits[row, step] for step, row in enumerate(path.tolist()) if row >= 0])
        else:
            own = logits[number]
        rest = {k: v for k, v in given.items() if k not in ("input_ids", "decoder_input_ids")}
        if encodes:
            start = len(sequence) - len(own)
            whole = rest | {"input_ids": given["input_ids"], "decoder_input_ids": sequence[None, :-1]}
        else:
            start = len(sequence) - len(own) - pad[number]
            whole = rest | {"input_ids": sequence[None, pad[number] : -1]}
        found.append(Said(whole, start, slice(start - 1, None), own))
    return found


def compiled(model, requests, settings):
    """`torch.compile` of the whole model, for the first request. Another length would be compiled again."""
    torch.compiler.reset()
    quick = torch.compile(model, backend=settings.backend)
    with torch.no_grad():
        return [_whole(given, _of(quick, given)[0]) for given in requests[:1]]


def checkpointing(model, requests, settings):
    """The gradient that reaches the embeddings, with the layers computed again in the backward. A model that answers prompts is
    told where they end: before each request's last two tokens."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    if not trained:
        raise ValueError("no layer of it can be checkpointed")
    dropouts = [(m, k, v) for m in trained for k, v in vars(m).items() if "drop" in k and isinstance(v, float)]
    try:
        for module in trained:
            object.__setattr__(module, "training", True)
        for module, name, _ in dropouts:
            setattr(module, name, 0.0)
        lengths = [_trained_prompt(model, given) for given in requests]
        found = []
        for given, length in zip(requests, lengths, strict=True):
            if settings.handle is not None and length != _prompt(given):
                settings.handle.prompt(length)
            found.append(_gradient(model, given, settings.seed))
    finally:
        if settings.handle is not None:
            settings.handle.prompt(None)
        for module in trained:
            object.__setattr__(module, "training", False)
        for module, name, value in dropouts:
            setattr(module, name, value)
        model.gradient_checkpointing_disable()
    return [Said(*each, None, g, settings.seed) for *each, g in zip(requests, lengths, found, strict=True)]


def _trained_prompt(model, given):
    answers = hasattr(model, "prepare_inputs_for_generation") and not getattr(model.config, "is_encoder_decoder", False)
    return max(_prompt(given) - 2, 1) if answers else _prompt(given)


def _gradient(model, given, seed):
    """Of a random sum of the logits, at the embeddings' output."""
    kept = []

    def keep(module, args, output):
        kept.append(output.detach().requires_grad_())
        return kept[-1]

    frozen = [p for p in model.parameters() if p.requires_grad]
    head = model.get_output_embeddings()  # which may have the same weight
    table = model.get_input_embeddings().weight
    hooks = [m.register_forward_hook(keep) for m in model.modules() if getattr(m, "weight", None) is table and m is not head]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            logits = output_of(model, given)
            weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed)).to(logits)
            (logits * weights).sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in frozen:
            parameter.requires_grad_(True)
    if kept[0].grad is None:
        raise ValueError("no gradient reaches the embeddings")
    return kept[0].grad


def packing(model, requests, settings):
    """Two requests in one row, told apart by position ids that begin again."""
    ids = torch.cat([given["input_ids"] for given in requests], 1)
    places = torch.cat([torch.arange(given["input_ids"].shape[1]) for given in requests])[None].to(ids.device)
    with torch.no_grad():
        logits = output_of(model, {"input_ids": ids, "position_ids": places})[0]
    found, at = [], 0
    for given in requests:
        found.append(_whole({"input_ids": given["input_ids"]}, logits[at : at + given["input_ids"].shape[1]]))
        at += given["input_ids"].shape[1]
    return found


def threads(model, requests, settings):
    """One thread per request, all generating at once."""
    found, errors, barrier = [None] * len(requests), [], threading.Barrier(len(requests))

    def work(number):
        try:
            barrier.wait(60)
            found[number] = _generate(model, [requests[number]], settings)
        except Exception as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(len(requests))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    return [said for each in found for said in each]


MODES = {
    "forward": forward, "batch": batch, "cache": _generation(), "no cache": _generation(use_cache=False),
    "static cache": _generation(cache_implementation="static", disable_compile=True), "padding": padding,
    "beams": _generation(num_beams=2), "threads": threads, "packing": packing, "checkpointing": checkpointing,
    "compile": compiled,
}  # fmt: skip
GENERATING = ("cache", "no cache", "static cache", "padding", "beams", "threads")


def named(modes, model):
    """The names of modes to run: those given, or all that make sense for the model.

    Raises:
        ValueError: no such mode.
    """
    if modes is not None:
        modes = [modes] if isinstance(modes, str) else as_list("modes", modes, "names of modes")
        unknown = [mode for mode in modes if mode not in MODES]
        if unknown or not modes:
            known = ", ".join(MODES)
            wrong = f"there is no mode {unknown[0]!r}; the modes are" if unknown else "modes is empty, expected some of"
            raise ValueError(f"{wrong} {known}")
        return modes
    text = takes(model, "input_ids")
    generates = text and hasattr(model, "generate") and getattr(model, "can_generate", lambda: True)()
    left = set() if generates else set(GENERATING)
    left |= set() if takes(model, "position_ids") and text and not takes(model, "decoder_input_ids") else {"packing"}
    left |= set() if text and hasattr(model, "gradient_checkpointing_enable") else {"checkpointing"}
    return [mode for mode in MODES if mode not in left]


def attempt(name, model, requests, settings):
    """A mode's result, or the exception that it raised."""
    try:
        return MODES[name](model, requests, settings)
    except Exception as error:  # whatever a model's own code may raise
        return error


def raised_by_us(error):
    """Whether an exception is a refusal of this library, by the place that raised it."""
    frames, package = traceback.extract_tb(error.__traceback__), __name__.rpartition(".")[0].partition(".")[0]
    last = frames[-1].filename.replace("\\", "/") if frames else ""
    return f"/{package}/" in last and "/verifying/" not in last and isinstance(error, (ValueError, RuntimeError, TypeError))
