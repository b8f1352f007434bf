"""`fastedit generate`: text from a model with an edit on it, at one strength or several."""

import html
import json
import math

import typer
from rich.console import Console

from ..texts.chat import prompt_ids
from .loading import load_model, need
from .texts import as_chat, read_texts


def run(
    model, prompts, prompt_file, edit, strengths, count, max_new_tokens, temperature, top_p, seed, chat=False, system=None,
    lexicons=None, traits=None, as_json=False, page=None, **loading,
):  # fmt: skip
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
    if str(edit).endswith(".gguf"):
        need("a control vector", "gguf")
    loaded, tokenizer = load_model(model, **loading)
    try:
        nudge = None if lexicons is None else _nudge(tokenizer, lexicons, traits)
        handle = None if edit is None else _edited(loaded, edit)
        ids = [prompt_ids(tokenizer, prompt, f"prompt {n}") for n, prompt in enumerate(prompts, 1)]
    except (ValueError, OSError, ImportError) as error:
        raise typer.BadParameter(str(error)) from None
    rows, console = [], Console()
    for strength in (strengths or [1.0]) if handle is not None else [None]:
        if handle is not None:
            handle.strength = strength
        if handle is not None and not as_json:
            console.rule(f"strength {strength:g}")
        first = len(rows)
        for prompt, given in zip(prompts, ids, strict=True):
            for text in sample(loaded, tokenizer, given, count, max_new_tokens, temperature, top_p, seed, nudge):
                rows.append({"number": len(rows) - first + 1, "strength": strength, "prompt": _shown(prompt), "reply": text})
                if not as_json:
                    console.print(_line(rows[-1], prompt), markup=False, highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
    if page is not None:
        page.write_text(side_by_side(str(model), None if edit is None else str(edit), rows), encoding="utf-8")
        if not as_json:
            console.print(f"{page}: the replies side by side", markup=False)


def _edited(model, edit):
    """The handle of a saved edit, or of a control vector (.gguf)."""
    import fastedit

    if str(edit).endswith(".gguf"):
        return fastedit.patch(model, fastedit.Steer(fastedit.Directions.load_gguf(edit)))
    return fastedit.load(model, edit)


def _shown(prompt):
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _line(row, prompt):
    """A numbered reply: behind its prompt where that is text to go on with, below it where it is a turn of a chat."""
    start = f"{row['prompt']}" if isinstance(prompt, str) else f"> {row['prompt']}\n"
    return f"{row['number']}. {start}{row['reply']}"


def side_by_side(model, edit, rows):
    """One HTML page, without anything from elsewhere: a row per prompt and sample, a column per strength."""
    columns = list(dict.fromkeys(row["strength"] for row in rows))
    lines = {}
    for column in columns:
        for at, row in enumerate(row for row in rows if row["strength"] == column):
            lines.setdefault((at, row["prompt"]), []).append(row["reply"])
    head = "".join(f"<th>{'no edit' if c is None else f'strength {c:g}'}</th>" for c in columns)
    body = "".join(
        f"<tr><th>{html.escape(prompt)}</th>{''.join(f'<td>{html.escape(reply)}</td>' for reply in replies)}</tr>"
        for (_, prompt), replies in lines.items()
    )
    title = html.escape(model if edit is None else f"{model} with {edit}")
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;margin:2rem;color:#222}table{border-collapse:collapse}"
        "th,td{border-top:1px solid #d5dade;padding:.6rem .8rem;vertical-align:top;text-align:left;white-space:pre-wrap}"
        "thead th{border:0;color:#1f7a8c}tbody th{font-weight:600;max-width:16rem}td{max-width:28rem}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{style}</style>'
        f"<h1>{title}</h1><table><thead><tr><th>prompt</th>{head}</tr></thead><tbody>{body}</tbody></table></html>\n"
    )


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


def sample(model, tokenizer, ids, count, max_new_tokens, temperature, top_p, seed, nudge=None):
    """`count` continuations without the prompt. Every call and every strength starts from the same seed."""
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
    start = tokenizer.decode(ids, skip_special_tokens=True)
    whole = tokenizer.batch_decode(found, skip_special_tokens=True)
    alone = tokenizer.batch_decode(found[:, len(ids) :], skip_special_tokens=True)  # some drop the space in front
    return [text.removeprefix(start) if text.startswith(start) else reply for text, reply in zip(whole, alone, strict=True)]
