"""Every reader of files, with sound files to start from: what tools/fuzz.py and tests/files/test_fuzzed.py feed.

A mutated file rarely has its checksum, and would test that alone: `Reader.repair` makes one as its writer would.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

import fastedit as fe
from fastedit import store
from fastedit.capturing import capture as capturing
from fastedit.capturing.rows_on_disk import Rows
from fastedit.files import sealed
from fastedit.interop import control_vectors, red
from fastedit.methods.trajectories import Trajectories
from fastedit.patching import trained_beside as kept
from fastedit.serving.contents import read_contents

WIDTH, DEPTH = 16, 2


@dataclass
class Reader:
    """path: the file that is mutated. load: reads it. errors: what it may raise, beside nothing. seeds: sound contents."""

    path: Path
    load: Callable
    errors: tuple
    repair: Callable = lambda content: content
    seeds: tuple = ()

    def feed(self, content):
        """Whether the content was loaded; an exception outside `errors` is a finding."""
        self.path.write_bytes(content)
        try:
            self.load()
        except self.errors:
            return False
        return True


def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=WIDTH, num_hidden_layers=DEPTH, intermediate_size=8, num_attention_heads=2, vocab_size=12)
    ).eval()


def readers(folder):
    """{name: Reader}, each over files of its own below `folder`."""
    folder, llama = Path(folder), model()
    vectors = torch.randn(DEPTH, WIDTH, generator=torch.Generator().manual_seed(0))
    gated = fe.Steer(vectors, site="block", positions="first 2 + last 1").when(fe.Gate(vectors[0], kind="cosine", threshold=0.1))
    with fe.patch(llama, [fe.RED(), gated, fe.LoReFT(2, layers=[1])]) as handle:
        store.save(handle, folder / "edit", training={"steps": 3})
        (folder / "edit" / kept.HEAD).write_bytes(kept.payload({"lm_head.weight": llama.lm_head.weight})[0])
        for name in ("tensors", "served"):
            handle.save(folder / name)
    with fe.patch(llama, gated) as handle:
        handle.save(folder / "served")
    directions = fe.Directions({1: vectors[0]}, {1: {"norm": 1.0}}, {"method": "mean"})
    directions.save(folder / "directions")
    _old_directions(folder / "old directions", vectors[0])
    data = [[3, 7, 11, 2], [5, 5, 1]]
    fe.capture(llama, None, data, layers=[1], batch_size=2, rows=folder / "rows", resume=folder / "sums")
    trajectories = folder / "trajectories.safetensors"
    Trajectories(vectors, torch.tensor([1, 1]), torch.ones(2), ["a", "b"], ["c", "d"]).save(trajectories)
    key = "model.layers.0.mlp.down_proj.delta_vector.activation_"
    torch.save({key + "scaling": torch.ones(1, WIDTH), key + "bias": vectors[:1].clone()}, folder / "delta_vector.pth")
    with fe.patch(llama, gated) as handle:
        state = {name: tensor for name, tensor in llama.state_dict().items() if name.startswith("fastedit.")}
        _note(folder / "state", bytes(state.pop("fastedit._extra_state").tolist()))
    net = torch.nn.ModuleDict({"fc1": torch.nn.Linear(WIDTH, 2), "fc2": torch.nn.Linear(2, 1)})
    torch.save(net.state_dict(), folder / "net.pth")
    with fe.patch(llama, fe.ScaleBias(1 + vectors, site="mlp")) as handle:
        fe.save_peft(handle, folder / "peft")
    _pyreft(folder / "pyreft", vectors)
    edit, own, refused = folder / "edit", folder / "tensors", (fe.EditFileError,)
    made = {
        "edit.json": Reader(edit / "edit.json", lambda: store.opened(llama, edit), refused, _json),
        "edit.safetensors": Reader(own / "edit.safetensors", lambda: _named(llama, own), refused),
        "served edit.json": Reader(
            folder / "served" / "edit.json", lambda: read_contents(folder / "served", WIDTH, DEPTH), refused, _json
        ),
        "head": Reader(edit / "head.safetensors", lambda: _head(edit), refused),
        "directions": Reader(
            folder / "directions" / "directions.safetensors", lambda: fe.Directions.load(folder / "directions"),
            (fe.DirectionsFileError,), _tensors,
        ),
        "directions, version 1": Reader(
            folder / "old directions" / "directions.json", lambda: fe.Directions.load(folder / "old directions"),
            (fe.DirectionsFileError,),
        ),
        "rows": Reader(next((folder / "rows").iterdir()), lambda: Rows(folder / "rows").layer(1), (ValueError,), _tensors),
        "sums": Reader(folder / "sums" / "capture.safetensors", lambda: _sums(folder / "sums"), (ValueError,), _tensors),
        "trajectories": Reader(trajectories, lambda: Trajectories.load(trajectories), refused, _tensors),
        "RED's .pth": Reader(
            folder / "delta_vector.pth", lambda: red._grouped("f", red.read_state(folder / "delta_vector.pth", "RED")), refused,
            _archive,
        ),
        "saved state": Reader(folder / "state" / "note", lambda: _state(llama, folder / "state", state), refused),
        "value net": Reader(folder / "net.pth", lambda: fe.ValueNet.from_released(folder / "net.pth"), (ValueError,), _archive),
        "PEFT's config": _adapter(llama, folder / "peft", "adapter_config.json"),
        "PEFT's tensors": _adapter(llama, folder / "peft", "adapter_model.safetensors"),
        "pyreft's config": _adapter(llama, folder / "pyreft", "config.json"),
    }  # fmt: skip
    try:
        control_vectors.save_gguf(directions, folder / "vector.gguf")
        made["gguf"] = Reader(
            folder / "vector.gguf", lambda: control_vectors.load_gguf(folder / "vector.gguf"), (fe.DirectionsFileError,)
        )
    except ImportError:
        pass
    for reader in made.values():
        reader.seeds = (reader.path.read_bytes(), *reader.seeds)
        assert reader.feed(reader.seeds[0])
    return made


def _named(llama, folder):
    """With the checksum in edit.json that these tensors need to be looked at."""
    payload = (folder / "edit.safetensors").read_bytes()
    document = json.loads((folder / "edit.json").read_text())
    document.pop("sha256")
    document["tensors"] |= {"sha256": hashlib.sha256(payload).hexdigest(), "bytes": len(payload)}
    (folder / "edit.json").write_bytes(sealed.seal_json(document))
    return store.opened(llama, folder)


def _note(folder, content):
    folder.mkdir()
    (folder / "note").write_bytes(content)


def _state(llama, folder, tensors):
    """With the note where a model's saved state has it."""
    note = torch.tensor(list((folder / "note").read_bytes()), dtype=torch.uint8)
    save_file(tensors | {"fastedit._extra_state": note}, folder / "model.safetensors")
    fe.load(llama, folder).remove()


def _pyreft(folder, vectors):
    folder.mkdir()
    config = {
        "sorted_keys": ["0"], "mode": "parallel", "representations": [[0, "block_output", "pos", 1, 3, *[None] * 9]],
        "intervention_types": ["<class 'pyreft.interventions.LoreftIntervention'>"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    rotation = torch.linalg.qr(vectors.T)[0]
    torch.save({"weight": vectors, "bias": torch.zeros(len(vectors)), "rotate_layer": rotation}, folder / "intkey_0.bin")


def _adapter(llama, folder, name):
    positions = None if "adapter" in name else "all"
    return Reader(folder / name, lambda: fe.load_adapter(llama, folder, positions=positions).remove(), (fe.EditFileError,))


def _head(folder):
    digest = hashlib.sha256((folder / "head.safetensors").read_bytes()).hexdigest()
    return kept.read_head(folder, {"tensors": {"sha256": ""}, "training": {"head": digest}}, 1 << 20)


def _sums(folder):
    job = {"rank": 0, "processes": 1}
    state = capturing._State(folder, job, 0)
    return state._read()


def _old_directions(folder, vector):
    from safetensors.torch import save

    folder.mkdir()
    payload = save({"layers.1": vector})
    digest = hashlib.sha256(payload).hexdigest()
    (folder / f"directions-{digest[:16]}.safetensors").write_bytes(payload)
    note = {"format": "fastedit directions", "version": 1, "about": {}, "statistics": {"1": {"norm": 1.0}}}
    note["tensors"] = {"file": f"directions-{digest[:16]}.safetensors", "sha256": digest}
    (folder / "directions.json").write_text(json.dumps(note))


# --- checksums made right again -----------------------------------------------------------------------------------


def _json(content):
    try:
        document = json.loads(content)
        document.pop("sha256", None)
        return sealed.seal_json(document)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return content


def _tensors(content):
    try:
        found = sealed._find(content)
    except (OverflowError, ValueError):
        return content
    return content if found is None else sealed._sealed(content, found)


def _archive(content):
    """The parts of a damaged archive, as far as they can be read, in a sound one."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            parts = {}
            for part in archive.infolist():
                file = archive.open(part)
                file._expected_crc = None
                parts[part.filename] = file.read(1 << 16)
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w") as archive:
            for name, part in parts.items():
                archive.writestr(name, part)
        return made.getvalue()
    except Exception:  # whatever zipfile makes of it
        return content


