"""`fastedit show`: an edit's files, read and checked, without its model.

A file's contents are printed as text. Control characters, which a terminal would obey, are written out.
"""

import unicodedata
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..files import edit_file
from ..patching import edit_folder as store


def run(folder, reseal=False):
    console = Console()
    try:
        folder = store.fetch(folder)
        if reseal:
            edit_file.reseal(folder)
        header, tensors = store.read(folder)
        store.rebuild(folder, header["edits"])
    except (store.EditFileError, OSError) as error:
        Console(stderr=True).print(plain(error), style="red", highlight=False, markup=False)
        raise typer.Exit(1) from None
    size = sum(f.stat().st_size for f in Path(folder).iterdir() if f.name.startswith("edit."))
    base, training = (p if isinstance(p, dict) else {} for p in map(header.get, ("base", "training")))
    console.print(
        f"{plain(folder)}  {sum(t.numel() for t in tensors.values()):,} parameters, {size:,} bytes", style="bold", markup=False
    )
    where = f"{base.get('type')}, {base.get('depth')} layers, width {base.get('width')}"
    console.print(plain(f"base: {base.get('model') or 'unnamed'} ({where})"), markup=False)
    if header.get("strength", 1.0) != 1.0:
        console.print(plain(f"strength: {header['strength']}"), markup=False)
    for name, value in training.items():
        console.print(plain(f"training {name}: {value}"), highlight=False, markup=False)
    for number, edit in enumerate(header["edits"]):
        console.print(_table(number, edit, tensors))


def plain(text):
    """The text with characters that control a terminal, or the direction of reading, written out as \x1b is."""
    return "".join(c if unicodedata.category(c)[0] != "C" else c.encode("unicode_escape").decode() for c in str(text))


def _table(number, edit, tensors):
    what = [f"edit {number}: {edit.get('kind')} on {edit.get('site')}"]
    what += [f"rank {edit['rank']}"] if edit.get("rank") else []
    what += [f"strength {edit['strength']:g}"] if edit.get("strength", 1.0) != 1.0 else []
    table = Table(title=Text(plain(", ".join(what))), title_justify="left")
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
        table.add_row(Text(plain(layer)), *(rows[layer].get(name, "") for name in columns))
    return table


def _by_number(layer):
    stack, _, index = layer.rpartition(".")
    return stack != "encoder", stack, int(index) if index.isdigit() else 0
