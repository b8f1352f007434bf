"""`fastedit show`: an edit's files, read and checked, without its model.

A file's contents are printed as text. Control characters, which a terminal would obey, are written out.
"""

import json
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..directions.directions import is_saved
from ..files import edit_file
from ..patching import edit_folder as store
from . import plain


def run(folder, reseal=False, as_json=False):
    console = Console()
    try:
        folder = store.fetch(folder)
        if is_saved(folder) and not as_json:
            console.print(_directions(folder))
            if not (folder / edit_file.JSON).exists():
                return
        if reseal:
            edit_file.reseal(folder)
        header, tensors = store.read(folder)
        store.rebuild(folder, header["edits"])
    except (ValueError, OSError) as error:
        raise typer.BadParameter(plain(" ".join(str(error).split()))) from None
    if as_json:
        print(json.dumps(header | {"shapes": {name: list(tensor.shape) for name, tensor in tensors.items()}}, indent=1))
        return
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
    table.add_column("")
    rows, means = {}, {}
    for key, tensor in tensors.items():
        prefix, _, name = key.rpartition(".")
        if prefix.split(".")[0] == str(number):
            away = (tensor - 1 if name == "scale" else tensor).abs()
            rows.setdefault(".".join(prefix.split(".")[1:-1]), {})[name] = (
                f"{away.mean():.4f} ({away.max():.4f})"
            )
            if name == columns[0]:
                means[".".join(prefix.split(".")[1:-1])] = float(away.mean())
    most = max(means.values(), default=0.0)
    for layer in sorted(rows, key=_by_number):
        table.add_row(Text(plain(layer)), *(rows[layer].get(name, "") for name in columns), bar(means.get(layer, 0.0), most))
    return table


def bar(value, most, width=12):
    """A bar of `width` characters for the largest value, in eighths of a character."""
    eighths = round(8 * width * value / most) if most > 0 and value > 0 else 0
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _directions(folder):
    """A table of what is known of saved directions per layer."""
    from ..directions.directions import Directions

    found = Directions.load(folder)
    norms = {layer: float(vector.norm()) for layer, vector in found.items()}
    noted = found.statistics.values()
    known = [name for name in ("accuracy", "separation") if any(one.get(name) is not None for one in noted)]
    table = Table(title=Text(plain(repr(found))), title_justify="left")
    for column in ("layer", "norm", *known, ""):
        table.add_column(column, justify="left" if column in ("", "layer") else "right")
    drawn = {layer: (found.statistics.get(layer, {}).get(known[-1]) or 0.0) for layer in found} if known else norms
    for layer in found:
        noted = found.statistics.get(layer, {})
        figures = ("" if noted.get(name) is None else f"{noted[name]:.3f}" for name in known)
        table.add_row(str(layer), f"{norms[layer]:.3f}", *figures, bar(drawn[layer], max(drawn.values())))
    return table


def _by_number(layer):
    stack, _, index = layer.rpartition(".")
    return stack != "encoder", stack, int(index) if index.isdigit() else 0
