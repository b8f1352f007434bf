"""`fastedit contrast`: directions from two files of texts, and the edit that steers along them."""

import typer
from rich.console import Console
from rich.table import Table

from .texts import layer_numbers, load_model, read_texts


def run(model, positive, negative, out, method, probe, layers, site, at, batch_size, max_length, gguf, resume, seed):
    console = Console()
    positive, negative, numbers = read_texts(positive), read_texts(negative), layer_numbers(layers)
    loaded, tokenizer = load_model(model)
    import fastedit

    try:
        directions = fastedit.contrast(
            loaded, tokenizer, positive, negative, method=method, probe=probe, layers=numbers, site=site, at=at,
            batch_size=batch_size, max_length=max_length, resume=resume, seed=seed,
        )  # fmt: skip
        directions.save(out)
        with fastedit.patch(loaded, fastedit.Steer(directions, site=site)) as handle:
            summary = {"method": directions.about["method"], "at": at, "seed": seed}
            summary |= {"positive": len(positive), "negative": len(negative)}
            fastedit.store.save(handle, out, base_model=model, training=summary)
        if gguf is not None:
            directions.at(*(layer for layer in directions if layer > 0)).save_gguf(gguf)
    except (ValueError, ImportError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    console.print(_table(directions, len(positive), len(negative)))
    _picture(console, directions, out)
    if gguf is not None:
        console.print(f"{gguf}: the control vector for llama.cpp, layers from 1", markup=False)
    console.print(
        f"saved {out}; try it with: fastedit generate {model} --edit {out} --strength 1 --prompt '…'", markup=False
    )


def _table(directions, positive, negative):
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
        table.add_row(str(layer), *(_shown(name, found[name]) for name in names))
    return table


def _shown(name, value):
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" if name in ("explained", "accuracy", "fitted_accuracy") else f"{value:.3f}"


def _picture(console, directions, out):
    try:
        from ..plots.directions import draw
    except ImportError:
        console.print("no picture: it needs matplotlib (pip install matplotlib)", markup=False)
        return
    draw(directions, out / "directions.png")
