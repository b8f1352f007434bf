"""`fastedit convert`: one library's edits into another's words."""

from pathlib import Path

import typer

from .loading import load_model, need

TARGETS = ("edit", "gguf", "peft", "pyreft", "directions")


def run(source, out, to, model, positions):
    """Convert, and say what was made, JSON-able."""
    out = Path(out)
    to = to or ("gguf" if out.suffix == ".gguf" else "edit")
    if to not in TARGETS:
        raise typer.BadParameter(f"--to is {to!r}, expected one of {', '.join(TARGETS)}")
    kind, folder = _kind(source)
    if "gguf" in (kind, to):
        need("a control vector", "gguf")
    if positions is not None and kind != "pyreft":
        raise typer.BadParameter("--positions is of pyreft's folders, which do not say where they acted")
    if to == kind:
        raise typer.BadParameter(f"{source} is of that kind already: {kind}")
    made = {"converted": str(source), "from": kind, "to": to, "saved": str(out)}
    if to in ("gguf", "directions"):
        directions = _directions(kind, folder, to)
        if to == "gguf":
            directions.save_gguf(out)
        else:
            directions.save(out)
        return made | {"layers": len(directions)}
    import fastedit

    handle = _handle(kind, folder, model, positions)
    if to == "peft":
        fastedit.save_peft(handle, out)
    elif to == "pyreft":
        fastedit.save_pyreft(handle, out)
    else:
        handle.save(out)
    return made | {"numbers": handle.num_parameters()}


def _kind(source):
    """(kind, the local path) of what a path or a Hub repo holds."""
    from ..directions.directions import is_saved
    from ..files.edit_file import JSON
    from ..interop.folders import FILES, PEFT_CONFIG
    from ..patching import edit_folder

    if str(source).endswith(".gguf"):
        return "gguf", Path(source)
    folder = edit_folder.fetch(source, patterns=("edit*.safetensors", "head*.safetensors", JSON, *FILES))
    for name, kind in ((JSON, "edit"), (PEFT_CONFIG, "peft"), ("config.json", "pyreft")):
        if (folder / name).exists():
            return kind, folder
    if is_saved(folder):
        return "directions", folder
    raise typer.BadParameter(f"{source} is no saved edit, directions, .gguf, or folder of PEFT or pyreft")


def _directions(kind, folder, to):
    """Directions of a control vector, of saved directions, or of an edit that only steers the residual stream."""
    from ..directions.directions import Directions
    from ..patching import edit_folder

    if kind == "gguf":
        return Directions.load_gguf(folder)
    if kind == "directions":
        return Directions.load(folder)
    if kind != "edit":
        raise typer.BadParameter(f"{to} holds a vector per layer, and {kind} is none: convert it to an edit")
    header, tensors = edit_folder.read(folder)
    edit_folder.rebuild(folder, header["edits"])
    vectors = {}
    for number, edit in enumerate(header["edits"]):
        if edit["kind"] != "Steer" or edit["site"] != "block" or edit.get("positions", "all") != "all" or edit.get("gate"):
            raise typer.BadParameter(
                f"{folder}: edit {number} is {edit['kind']} at {edit['site']!r}, and {to} holds vectors added to every token "
                "of the residual stream: a Steer at 'block', without positions and gates"
            )
        factor = edit.get("strength", 1.0) * edit_folder.strength_of(folder, header)
        for layer in edit["layers"]:
            name = next(key for key in tensors if key.startswith(f"{number}.") and key.endswith(f"layers.{layer}.block.bias"))
            vectors[layer] = vectors.get(layer, 0) + factor * tensors[name]
    base = header["base"] if isinstance(header.get("base"), dict) else {}
    return Directions(vectors, about={"site": "block", "type": base.get("type")})


def _handle(kind, folder, model, positions):
    import fastedit

    name = model or _base(kind, folder)
    if name is None:
        raise typer.BadParameter(f"{folder} does not name its base model: give --model")
    base, _ = load_model(name, kind=None, device="cpu")
    if kind == "edit":
        return fastedit.load(base, folder, head=False)
    if kind in ("peft", "pyreft"):
        return fastedit.load_adapter(base, folder, positions=positions)
    return fastedit.patch(base, fastedit.Steer(_directions(kind, folder, "edit")))


def _base(kind, folder):
    from ..files.sealed import parse_json, read_regular
    from ..interop.folders import PEFT_CONFIG
    from ..patching import edit_folder

    if kind == "edit":
        base = edit_folder.read(folder)[0].get("base")
        return base.get("model") if isinstance(base, dict) else None
    if kind == "peft":
        return parse_json(read_regular(folder / PEFT_CONFIG, 1 << 20)).get("base_model_name_or_path")
    return None
