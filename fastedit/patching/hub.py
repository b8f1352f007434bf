"""Edits on the Hugging Face Hub, with a model card that is written from edit.json.

    handle.push_to_hub("anna/happy")
    handle = fastedit.load(model, "anna/happy")
"""

import json
import shutil
import tempfile
from pathlib import Path

from ..files.edit_file import JSON, read, turn

CARD = "README.md"
_KEPT = ("edit*.safetensors", "head*.safetensors", JSON, CARD)


def push(folder, repo, *, private=None, token=None, message="Upload an edit", revision=None):
    """Upload a saved edit. A README.md that is there is kept, else one is written. Returns the commit's address.

    Args:
        folder: what `handle.save` wrote. repo: "user/name"; it is made where it is not there.
        private, token, message, revision: as of huggingface_hub.

    Raises:
        EditFileError: the folder holds no sound edit. ValueError: repo is no "user/name".
        OSError: the hub refused or could not be reached; its message is the hub's.
    """
    from huggingface_hub import HfApi

    folder = Path(folder)
    check_repo(repo)
    read(folder)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as staged:
        with turn(folder):  # files of one save, and none of a save that is under way
            header, tensors = read(folder)
            for pattern in _KEPT:
                for file in folder.glob(pattern):
                    shutil.copy(file, staged)
        card_file = Path(staged, CARD)
        if not card_file.exists():
            card_file.write_text(card(header, tensors, repo), encoding="utf-8")
        try:
            api.create_repo(repo, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repo, folder_path=staged, commit_message=message, revision=revision))
        except (OSError, ValueError):
            raise
        except Exception as error:  # of its HTTP library, which differs between versions
            raise OSError(f"{repo} could not be pushed: {type(error).__name__}: {error}") from error


def check_repo(repo):
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise ValueError(f"repo is {repo!r}, expected user/name")


def card(header, tensors, repo):
    """The text of a model card, from edit.json's content: what the edit does, on what, how it was made, how to load it."""
    base, training = ({} if not isinstance(part, dict) else part for part in (header.get("base"), header.get("training")))
    kinds = list(dict.fromkeys(edit["kind"] for edit in header["edits"]))
    count = sum(tensor.numel() for tensor in tensors.values())
    name = base.get("model")
    meta = {"library_name": "fastedit", "tags": ["fastedit", "representation-editing", *(kind.lower() for kind in kinds)]}
    if isinstance(name, str) and "/" in name:  # what the hub takes for an id
        meta |= {"base_model": name, "base_model_relation": "adapter"}
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in meta.items()), "---", "", f"# {repo.partition('/')[2]}", ""]
    shape = f"{base.get('type')}, {base.get('depth')} layers, width {base.get('width')}"
    lines += [f"{count:,} numbers that edit the hidden states of {_code(name) if name else 'a model'} ({shape}).", ""]
    lines += ["| edit | site | layers | rank | strength |", "|---|---|---|---|---|"]
    for edit in header["edits"]:
        cells = edit["kind"], edit["site"], _ranges(edit["layers"]), edit.get("rank") or "", edit.get("strength", 1.0)
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    lines += ["", f"Strength of the whole: {header.get('strength', 1.0)}.", ""]
    if training:
        lines += ["## How it was made", "", "| | |", "|---|---|"]
        lines += [f"| {_cell(key)} | {_cell(value)} |" for key, value in training.items() if isinstance(value, (str, int, float))]
        lines.append("")
    auto, named = _auto(header), json.dumps(name or "the base model")
    lines += [
        "## Use", "", "```python", "import fastedit as fe", f"from transformers import {auto}", "",
        f"model = {auto}.from_pretrained({named})", f'handle = fe.load(model, "{repo}")',
        "handle.strength = 1.0   # a dial", "handle.merge()          # or into the weights, where the edit allows", "```", "",
        "With vLLM: `fastedit serve MODEL --edits FOLDER`, and a request with", '`"vllm_xargs": {"fastedit": "NAME"}`.', "",
    ]  # fmt: skip
    if all(edit["kind"] == "Steer" and edit["site"] == "block" for edit in header["edits"]):
        lines += [f"With llama.cpp: `fastedit convert {repo} vector.gguf`, then `--control-vector vector.gguf`.", ""]
    return "\n".join(lines)


def _auto(header):
    task = (header.get("training") or {}).get("task") if isinstance(header.get("training"), dict) else None
    return "AutoModel" if task in ("classification", "pairs", "regression") else "AutoModelForCausalLM"


def _ranges(layers):
    """"0–3, 7" of layer numbers."""
    runs = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)


def _cell(value):
    """A value of a file as text in a table: one line, no markup of its own."""
    text = " ".join(str(value).split())[:200]
    return "".join(f"\\{c}" if c in "|<>[]`*_\\" else c for c in text if c.isprintable())


def _code(text):
    return f"`{''.join(c for c in str(text) if c.isprintable() and c != '`')[:200]}`"


def push_handle(handle, repo, *, base_model=None, training=None, tenant=None, **options):
    """`handle.push_to_hub`."""
    from .saving import save

    with tempfile.TemporaryDirectory() as folder:
        save(handle, folder, base_model=base_model, training=training, tenant=tenant)
        return push(folder, repo, **options)


