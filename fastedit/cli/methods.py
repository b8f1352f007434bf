"""`fastedit roleref | inferaligner | cast | ubpl`: published steering methods, from files of prompts to a saved edit."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .loading import Device, DeviceMap, Dtype, Out, Quantize

app = typer.Typer(rich_markup_mode="markdown")

Model = Annotated[str, typer.Argument(help="Folder or Hub id of a causal language model, or smollm2.")]
Layers = Annotated[str | None, typer.Option(help="Such as 3, 8-15 or 0,4,-1.")]
Batch = Annotated[int, typer.Option(min=1)]


@app.command("roleref")
def roleref(
    model: Model,
    answerable: Annotated[Path, typer.Option(help="Queries that the role can answer, line k with line k.")],
    conflicting: Annotated[Path, typer.Option(help="Queries that conflict with what the role knows.")],
    out: Out = Path("my-role"),
    role: Annotated[str | None, typer.Option(help="The role, as the system turn before each query.")] = None,
    keep: Annotated[float, typer.Option(help="Share of the features that vary least over the pairs.")] = 0.5,
    strength: Annotated[float, typer.Option(help="Of the edit; the paper tries -0.3 to 0.3.")] = -0.1,
    layers: Layers = None,
    refusals: Annotated[
        Path | None, typer.Option(help="Phrases, one per line, that mark a refusal: rates on a held-out quarter.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 48,
    batch_size: Batch = 8,
    device: Device = "auto",
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    quantize: Quantize = None,
):
    r"""Refuse what conflicts with a role (RoleRef, arXiv 2409.16913): pairs of queries into a saved edit.

    **Example:**

    ```
    fastedit roleref smollm2 --role "You are a farmer of 1750." \
        --answerable fastedit/examples/can.txt \
        --conflicting fastedit/examples/cannot.txt --out role
    ```
    """
    from ..methods import roleref as method
    from .texts import as_chat, layer_numbers, read_texts

    sets = [read_texts(path) for path in (answerable, conflicting)]
    sets = [as_chat(queries, role) for queries in sets] if role else sets
    held = len(sets[0]) // 4 if refusals else 0
    phrases = [phrase.lower() for phrase in read_texts(refusals)] if refusals else []
    loaded, tokenizer = _load(model, device, dtype, device_map, quantize)

    def made():
        found = method.vectors(loaded, tokenizer, *(queries[held:] for queries in sets), keep=keep, batch_size=batch_size)
        edit = method.edit(found, strength, layers=layer_numbers(layers))
        summary = {"method": "roleref", "pairs": len(sets[0]) - held, "keep": keep}
        return found, edit, summary

    def report(handle):
        if held:
            said = method.report(
                loaded, tokenizer, handle, sets[1][:held], sets[0][:held],
                lambda prompt, reply: any(phrase in reply.lower() for phrase in phrases),
                max_new_tokens=max_new_tokens, batch_size=batch_size,
            )  # fmt: skip
            typer.echo(f"{said}\nstrength 1 is {strength:g} v; {held} held-out pairs")

    _save(loaded, model, out, made, report)


@app.command("inferaligner")
def inferaligner(
    target: Annotated[str, typer.Argument(help="The model to be guided.")],
    aligned: Annotated[str, typer.Argument(help="One that guides, of the same width and depth; or saved directions of it.")],
    harmful: Annotated[Path, typer.Option(help="Prompts to guide on.")],
    harmless: Annotated[Path, typer.Option(help="Prompts to leave alone.")],
    out: Out = Path("my-guidance"),
    at_least: Annotated[float, typer.Option(help="Layers whose gate is right on this share of the held-out prompts.")] = 0.9,
    layers: Layers = None,
    strength: float = 1.0,
    chat: Annotated[bool, typer.Option("--chat", help="Prompts are user turns of the tokenizer's template.")] = False,
    batch_size: Batch = 16,
    device: Device = "auto",
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    quantize: Quantize = None,
):
    r"""Guide a model by an aligned one (InferAligner, arXiv 2401.11206), where its own states say that a prompt is harmful.

    **Example,** with sad sentences in place of harmful prompts, and one model for both:

    ```
    fastedit inferaligner smollm2 smollm2 --harmful fastedit/examples/sad.txt \
        --harmless fastedit/examples/happy.txt --at-least 0.7 --out guided
    ```
    """
    from ..directions.directions import Directions, is_saved
    from ..methods import inferaligner as method
    from .texts import as_chat, layer_numbers, read_texts

    sets = [read_texts(path) for path in (harmful, harmless)]
    sets = [as_chat(prompts) for prompts in sets] if chat else sets
    loaded, tokenizer = _load(target, device, dtype, device_map, quantize)

    def made():
        if is_saved(aligned):
            guide, words = Directions.load(aligned), None
        else:
            guide, words = _load(aligned, device, dtype, device_map, quantize)
        found = method.fit(loaded, guide, tokenizer, *sets, aligned_tokenizer=words, batch_size=batch_size)
        chosen = layer_numbers(layers) or found.decisive(at_least)
        right = [found.own.statistics[layer]["accuracy"] for layer in chosen if layer in found.own.statistics]
        if right:
            typer.echo(f"layers {chosen}: right on {min(right):.3g} to {max(right):.3g} of the held-out prompts")
        summary = {"method": "inferaligner", "harmful": len(sets[0]), "harmless": len(sets[1])}
        return found.theta, found.edit(layers=chosen, strength=strength), summary

    _save(loaded, target, out, made)


@app.command("cast")
def cast(
    model: Model,
    opens: Annotated[Path, typer.Option(help="Prompts on which to steer.")],
    closed: Annotated[Path, typer.Option(help="Prompts on which not to, line k with line k.")],
    behaviour: Annotated[str, typer.Option(help="What to steer by: saved directions, as of `fastedit contrast`.")],
    out: Out = Path("my-condition"),
    layers: Annotated[str | None, typer.Option(help="To steer at; by default the directions' behind the condition.")] = None,
    strength: float = 1.0,
    over: Annotated[str, typer.Option(help="mean of the prompt's tokens, or last.")] = "mean",
    vector: Annotated[str, typer.Option(help="pca of the pairs' differences, or mean.")] = "pca",
    chat: Annotated[bool, typer.Option("--chat", help="Prompts are user turns of the tokenizer's template.")] = False,
    batch_size: Batch = 16,
    seed: int = 0,
    device: Device = "auto",
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    quantize: Quantize = None,
):
    r"""Steer under a condition (CAST, arXiv 2409.05907): the condition is found by F1, the behavior is given.

    **Example,** with the directions that `fastedit contrast --help` makes:

    ```
    fastedit cast smollm2 --opens fastedit/examples/can.txt \
        --closed fastedit/examples/cannot.txt --behaviour happy --chat \
        --out happy-farmer
    ```
    """
    from ..directions.directions import Directions
    from ..methods import cast as method
    from .texts import as_chat, layer_numbers, read_texts

    sets = [read_texts(path) for path in (opens, closed)]
    sets = [as_chat(prompts) for prompts in sets] if chat else sets
    try:
        along = Directions.load(behaviour)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    loaded, tokenizer = _load(model, device, dtype, device_map, quantize)

    def made():
        chosen = layer_numbers(layers) or list(along.layers)
        found = method.fit(
            loaded, tokenizer, *sets, layers=range(max(chosen) + 1), over=over, vector=vector, seed=seed, batch_size=batch_size
        )
        chosen = [layer for layer in chosen if layer >= found.layer]
        typer.echo(
            f"condition: layer {found.layer}, similarity {found.when} {found.threshold:.4g}; F1 {found.f1:.3g} on "
            f"{found.held_out} held-out prompts, {found.fitted_f1:.3g} on the others; steering at layers {chosen}"
        )
        if not chosen:
            raise ValueError(f"the condition is best at layer {found.layer}, behind every layer that is steered; give others")
        summary = {"method": "cast", "condition": found.layer, "f1": found.f1}
        return along.at(*chosen), method.cast(along.at(*chosen), found.gate(), layers=chosen, strength=strength), summary

    _save(loaded, model, out, made)


@app.command("ubpl")
def ubpl(
    texts: Annotated[Path, typer.Option(help="Texts with the trait: .txt, .json or .jsonl.")],
    background: Annotated[Path, typer.Option(help="Texts without it.")],
    trait: Annotated[str, typer.Option(help="Its name.")],
    out: Annotated[Path, typer.Option(help="The .json of lexicons; a trait is added to those that are there.")] = Path(
        "lexicons.json"
    ),
    count: Annotated[int, typer.Option(min=1, help="Words at most.")] = 100,
    least: Annotated[int, typer.Option(min=1, help="A word must occur so often.")] = 2,
    z: Annotated[float, typer.Option(help="How far a word must stand out; less for a few dozen texts.")] = 1.96,
):
    r"""Build a lexicon for UBPL (arXiv 2310.16582) from texts alone; `fastedit generate --lexicons` uses it.

    **Example:**

    ```
    fastedit ubpl --texts fastedit/examples/happy.txt \
        --background fastedit/examples/sad.txt --trait happy --z 0.7
    ```
    """
    from ..files.edit_file import replace
    from ..methods.ubpl import build, read_lexicons
    from .texts import read_texts

    sets = [read_texts(path) for path in (texts, background)]
    if not all(isinstance(text, str) for some in sets for text in some):
        raise typer.BadParameter("a lexicon is built of texts, one per line; found chat messages")
    try:
        words = build(*sets, count=count, least=least, z=z)
        lexicons = read_lexicons(out) if out.exists() else {}
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    replace(out, json.dumps(lexicons | {trait: words}, indent=1).encode() + b"\n")
    typer.echo(f"{out}: {len(words)} words of {trait!r}, first {', '.join(list(words)[:8])}")


def _load(name, device, dtype, device_map, quantize):
    from .loading import load_model

    return load_model(name, device=device, dtype=dtype, device_map=device_map, quantize=quantize)


def _save(loaded, name, out, made, report=None):
    """Patch what made() gives, report on it, and save directions and edit."""
    import fastedit

    try:
        directions, edit, summary = made()
        with fastedit.patch(loaded, edit) as handle:
            directions.save(out)
            fastedit.store.save(handle, out, base_model=str(name), training=summary)
            if report is not None:
                report(handle)
    except (ValueError, ImportError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    typer.echo(f"saved {out}; try it with: fastedit generate {name} --edit {out} --prompt '…'")
