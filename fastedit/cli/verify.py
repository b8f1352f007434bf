"""`fastedit verify`: a model with an edit, in every mode that it has, against plain hooks on whole sequences."""

import json

import typer
from rich.console import Console


def run(model, edit, prompts, modes, new_tokens, backend, as_json, seed):
    """Prints the table, or JSON. Returns 0, or 1 if something is wrong."""
    import fastedit

    loaded = _load(model)
    requests = _requests(model, prompts) if prompts else None
    edits = [fastedit.ScaleBias(False, site="block")] if edit is None else edit
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


def _load(name):
    """The model of the class that its config names."""
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        architecture = (config.architectures or ["AutoModel"])[0]
        return getattr(transformers, architecture, transformers.AutoModel).from_pretrained(name).eval()
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{name} could not be loaded: {error}") from None


def _requests(name, prompts):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    return [tokenizer(prompt)["input_ids"] for prompt in prompts]
