"""`fastedit generate`: text from a model with an edit on it, at one strength or several."""

import math

import typer
from rich.console import Console

from ..texts.chat import prompt_ids
from .loading import load_model
from .texts import as_chat, read_texts


def run(
    model, prompts, prompt_file, edit, strengths, count, max_new_tokens, temperature, top_p, seed, chat=False, system=None,
    lexicons=None, traits=None, **loading,
):  # fmt: skip
    console = Console()
    prompts = [*(prompts or ()), *(read_texts(prompt_file) if prompt_file else ())]
    if not prompts:
        raise typer.BadParameter("there is no prompt: give --prompt or --prompts")
    if any(isinstance(prompt, dict) for prompt in prompts):
        raise typer.BadParameter(f"{prompt_file} holds rows with responses, expected prompts alone")
    prompts = as_chat(prompts, system) if chat or system else prompts
    if strengths and edit is None:
        raise typer.BadParameter("--strength belongs to an edit: give --edit too")
    if not all(math.isfinite(strength) for strength in strengths or ()):
        raise typer.BadParameter("--strength is not a finite number")
    if (lexicons is None) != (not traits):
        raise typer.BadParameter("--lexicons and --trait go together: words, and how strongly")
    loaded, tokenizer = load_model(model, **loading)
    import fastedit

    try:
        nudge = None if lexicons is None else _nudge(tokenizer, lexicons, traits)
        handle = None if edit is None else fastedit.load(loaded, edit)
        ids = [prompt_ids(tokenizer, prompt, f"prompt {n}") for n, prompt in enumerate(prompts, 1)]
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    for strength in (strengths or [1.0]) if handle is not None else [None]:
        if handle is not None:
            handle.strength = strength
            console.rule(f"strength {strength:g}")
        for prompt, given in zip(prompts, ids, strict=True):
            for text in sample(loaded, tokenizer, prompt, given, count, max_new_tokens, temperature, top_p, seed, nudge):
                console.print(text, markup=False, highlight=False, soft_wrap=True)


def _nudge(tokenizer, lexicons, traits):
    from ..methods.ubpl import UBPL

    weights = {}
    for trait in traits:
        name, _, weight = trait.rpartition("=")
        try:
            weights[name] = float(weight)
        except ValueError:
            raise ValueError(f"--trait is {trait!r}, expected a trait and a weight, such as happy=2") from None
    return UBPL(tokenizer, lexicons, weights)


def sample(model, tokenizer, prompt, ids, count, max_new_tokens, temperature, top_p, seed, nudge=None):
    """`count` texts, with the prompt if that is a string. Every call and every strength starts from the same seed."""
    import torch

    given = torch.tensor([ids], device=model.device)
    options = {"do_sample": False}
    if temperature > 0:
        options = {"do_sample": True, "temperature": temperature, "top_p": top_p, "num_return_sequences": count}
    if nudge is not None:
        options["logits_processor"] = [nudge]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        found = model.generate(
            input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=max_new_tokens, pad_token_id=pad, **options
        )
    if isinstance(prompt, str):
        return tokenizer.batch_decode(found, skip_special_tokens=True)
    last = prompt[-1]["content"]
    return [f"> {last}\n{reply}" for reply in tokenizer.batch_decode(found[:, len(ids) :], skip_special_tokens=True)]
