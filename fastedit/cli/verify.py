"""`fastedit verify`: a model with an edit, in every mode that it has, against plain hooks on whole sequences."""

import json

import typer
from rich.console import Console

from .loading import load_model


def run(model, edit, prompts, modes, new_tokens, backend, as_json, seed, **loading):
    """Prints the table, or JSON. Returns 0, or 1 if something is wrong."""
    import fastedit

    loaded, tokenizer = load_model(model, kind=None, **loading)
    if prompts and tokenizer is None:
        raise typer.BadParameter(f"{model} has no tokenizer: leave --prompt out")
    requests = [tokenizer(prompt)["input_ids"] for prompt in prompts] if prompts else None
    edits = [fastedit.ScaleBias(False, site="block")] if edit is None else edit
    if edit is not None:
        with fastedit.load(loaded, edit):  # one that cannot be loaded is the user's mistake, not the model's refusal
            pass
    try:
        outcome = fastedit.verify(
            loaded, edits, requests, modes=modes or None, new_tokens=new_tokens, backend=backend, seed=seed
        )
    except (ValueError, TypeError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    if as_json:
        print(json.dumps(outcome.json(), indent=1))
    else:
        Console().print(outcome.table())
    return 0 if outcome.ok else 1
