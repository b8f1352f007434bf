"""`fastedit show`: an edit's files, read and checked, without its model."""

from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from .. import store


def run(folder):
    console = Console()
    try:
        folder = store.fetch(folder)
        header, tensors = store.read(folder)
        store.rebuild(folder, header["edits"])
    except store.EditFileError as error:
        Console(stderr=True).print(str(error), style="red", highlight=False, markup=False)
        raise typer.Exit(1) from None
    size = sum(f.stat().st_size for f in Path(folder).iterdir() if f.name.startswith("edit."))
    base, training = (p if isinstance(p, dict) else {} for p in map(header.get, ("base", "training")))
    console.print(
        f"[bold]{folder}[/]  {sum(t.numel() for t in tensors.values()):,} parameters, {size:,} bytes"
    )
    where = f"{base.get('type')}, {base.get('depth')} layers, width {base.get('width')}"
    console.print(f"base: {base.get('model') or 'unnamed'} ({where})", markup=False)
    if header.get("strength", 1.0) != 1.0:
        console.print(f"strength: {header['strength']}", markup=False)
    for name, value in training.items():
        console.print(f"training {name}: {value}", highlight=False, markup=False)
    for number, edit in enumerate(header["edits"]):
        console.print(_table(number, edit, tensors))


def _table(number, edit, tensors):
    what = [f"edit {number}: {edit.get('kind')} on {edit.get('site')}"]
    what += [f"rank {edit['rank']}"] if edit.get("rank") else []
    what += [f"strength {edit['strength']:g}"] if edit.get("strength", 1.0) != 1.0 else []
    table = Table(title=", ".join(what), title_justify="left")
    columns = list(dict.fromkeys(edit.get("tensors", ())))
    table.add_column("layer")
    for name in columns:
        table.add_column(
            "mean |scale − 1| (max)" if name == "scale" else f"mean |{name}| (max)", justify="right"
        )
    rows = {}
    for key, tensor in tensors.items():
        prefix, _, name = key.rpartition(".")
        if prefix.split(".")[0] == str(number):
            away = (tensor - 1 if name == "scale" else tensor).abs()
            rows.setdefault(".".join(prefix.split(".")[1:-1]), {})[name] = (
                f"{away.mean():.4f} ({away.max():.4f})"
            )
    for layer in sorted(rows, key=_by_number):
        table.add_row(layer, *(rows[layer].get(name, "") for name in columns))
    return table


def _by_number(layer):
    stack, _, index = layer.rpartition(".")
    return stack != "encoder", stack, int(index) if index.isdigit() else 0
