"""`fastedit contrast`: directions from two files of texts, and the edit that steers along them."""

import typer
from rich.console import Console
from rich.table import Table

from .loading import load_model, need
from .progress import pictures
from .texts import layer_numbers, read_texts


def run(
    model, positive, negative, out, method, probe, layers, site, at, batch_size, max_length, gguf, resume, seed, suffix=None,
    relative=None, kl=None, prompts=None, **loading,
):  # fmt: skip
    if method == "probe" and probe == "logistic":
        need("--method probe", "scikit-learn")
    if gguf is not None:
        need("--gguf", "gguf")
    console = Console()
    files, numbers = (positive, negative), layer_numbers(layers)
    positive, negative = read_texts(positive), read_texts(negative)
    if relative is not None and kl is not None:
        raise typer.BadParameter("--relative and --kl both say how strongly: give one of them")
    asked = None if prompts is None else read_texts(prompts)
    at = at or where_to_measure(positive + negative, suffix)
    loaded, tokenizer = load_model(model, **loading)
    import fastedit

    try:
        directions = fastedit.contrast(
            loaded, tokenizer, positive, negative, method=method, probe=probe, layers=numbers, site=site, at=at,
            batch_size=batch_size, max_length=max_length, resume=resume, seed=seed, suffix=suffix,
        )  # fmt: skip
        best = directions if numbers is not None else directions.at(*directions.window(max(1, round(len(directions) / 3))))
        if relative is not None:
            best = _with_statistics(best, best.relative(relative))
        with fastedit.patch(loaded, fastedit.Steer(best, site=site)) as handle:
            dose = _calibrated(loaded, tokenizer, handle, kl, asked, positive + negative, seed)
        best = _with_statistics(best, best * dose.strength) if dose else best
        best.save(out)
        with fastedit.patch(loaded, fastedit.Steer(best, site=site)) as handle:
            summary = {"method": directions.about["method"], "at": at, "seed": seed}
            summary |= {"positive": len(positive), "negative": len(negative)}
            fastedit.store.save(handle, out, base_model=str(model), training=summary)
        if gguf is not None:
            best.at(*(layer for layer in best if layer > 0)).save_gguf(gguf)
    except (ValueError, ImportError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    console.print(_table(directions, len(positive), len(negative), best.layers))
    _say(console, directions, best, at, files, numbers, dose, relative)
    _picture(console, directions, out)
    if gguf is not None:
        console.print(f"{gguf}: the control vector for llama.cpp, layers from 1", markup=False)
    chat = " --chat" if getattr(tokenizer, "chat_template", None) else ""
    console.print(
        f"saved {out}; try it with: fastedit generate {model}{chat} --edit {out} --strength 1 --prompt '…'",
        markup=False, soft_wrap=True,
    )  # fmt: skip


def where_to_measure(texts, suffix):
    """The default of `--at`: prose at the mean of its tokens, a chat at its response, a question where its answer
    begins."""
    if suffix is not None:
        return "suffix"
    if any(isinstance(item, dict) for item in texts):
        return "response"
    ends = {item[-1]["role"] for item in texts if not isinstance(item, str)}
    return "mean" if not ends else "response" if ends == {"assistant"} else "last token"


def _with_statistics(old, new):
    new.statistics, new.about = old.statistics, old.about
    return new


def _calibrated(model, tokenizer, handle, kl, asked, texts, seed):
    """A Dose at `kl`, over continuations of the prompts, or else of the first tokens of the texts. None without
    `kl`."""
    import fastedit

    if kl is None:
        return None
    if asked is None:
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("--kl needs --prompts: the strength is found on continuations of them")
        asked = [" ".join(text.split()[:4]) for text in texts[:16]]
    return fastedit.calibrate(
        model, handle, asked, target_kl=kl, tokenizer=tokenizer, tolerance=0.05, new_tokens=24, seed=seed
    )  # fmt: skip


def _say(console, directions, best, at, files, numbers, dose, relative):
    """Say what was measured where, which layers were taken and why, and how strong strength 1 is."""
    tokens = [found for found in directions.statistics.values() if "tokens" in found]
    if tokens:
        most = max(tokens, key=lambda found: found["sinks"])
        console.print(f"measured at {at!r}: up to {most['sinks']:,} of {most['tokens']:,} tokens left out as attention sinks")
    else:
        console.print(f"measured at {at!r} of {files[0]} and {files[1]}", markup=False)
    if numbers is None:
        why = "held-out accuracy" if "accuracy" in directions.statistics[best.layers[0]] else "distance ÷ spread within"
        span = f"{best.layers[0]} to {best.layers[-1]}"
        console.print(f"saved are layers {span}, the earliest third with the best {why}; --layers names others")
    if dose is not None:
        console.print(f"strength 1 is a mean KL of {dose.kl:.3g} nats a token, over {dose.tokens:,} tokens of continuations")
    elif relative is not None:
        console.print(f"strength 1 adds {relative:g} × the residual's norm in each layer")
    else:
        console.print("strength 1 is the plain difference; --kl 0.5 finds the strength by its effect")


def _table(directions, positive, negative, taken):
    title = f"{directions.about['method']}: {positive:,} positive and {negative:,} negative texts"
    table = Table(title=title, title_justify="left")
    names = {"norm": "distance of the means", "separation": "÷ spread within"}
    some = next(iter(directions.statistics.values()))
    names |= {"explained": "explained"} if "explained" in some else {}
    names |= {"accuracy": "held-out accuracy", "fitted_accuracy": "fitted"} if "accuracy" in some else {}
    table.add_column("layer")
    for name in names.values():
        table.add_column(name, justify="right")
    for layer, found in directions.statistics.items():
        mark = "*" if layer in taken and len(taken) < len(directions) else ""
        table.add_row(f"{layer}{mark}", *(_shown(name, found[name]) for name in names))
    return table


def _shown(name, value):
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" if name in ("explained", "accuracy", "fitted_accuracy") else f"{value:.3f}"


def _picture(console, directions, out):
    with pictures(console):
        from ..plots.directions import write

        write(directions, out / "directions.png")
