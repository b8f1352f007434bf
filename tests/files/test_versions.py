"""Files of format version 1 load, with one warning each; of version 2 every byte is under a checksum.

FLIPS=1500 for 13,500 flips in all.
"""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from test_store import llama

import fastedit as fe
from fastedit.capturing.rows_on_disk import Rows
from fastedit.directions import sweep as sweeping
from fastedit.files import edit_file
from fastedit.methods import trajectories
from fastedit.methods.trajectories import Trajectories
from fastedit.patching import trained_beside

OLD = Path(__file__).parents[1] / "fixtures" / "version-1"
FLIPS = int(os.environ.get("FLIPS", 150))  # of each kind of file
DATA = [[3, 7, 11, 2], [5, 5, 1], [9, 8, 7, 6, 5], [4, 4]]


@pytest.mark.parametrize("name", ["red", "all-kinds", "gated"])
def test_old_edits_load_and_are_renewed(tmp_path, caplog, name):
    model = llama()
    with fe.load(model, OLD / name) as handle:
        assert sum("format version 1" in record.getMessage() for record in caplog.records) == 1
        config, tensors, strength = handle.config(), handle.named_tensors(), handle.strength
        handle.save(tmp_path / "new")
    assert strength == (0.75 if name == "all-kinds" else 1.0) and all(bool(t.any()) for t in tensors.values())
    caplog.clear()
    with fe.load(model, tmp_path / "new") as handle:
        assert not caplog.records and handle.config() == config and handle.strength == strength
        assert all(torch.equal(tensors[key], tensor) for key, tensor in handle.named_tensors().items())


def test_old_directions_load_and_are_renewed(tmp_path, caplog):
    shutil.copytree(OLD / "directions", tmp_path / "copy")
    old = fe.Directions.load(tmp_path / "copy")
    assert len(caplog.records) == 1 and "format version 1" in caplog.text
    assert old.layers == (1, 2) and old.width == 32 and old.about["method"] == "mean"
    assert old.statistics[1]["norm"] == pytest.approx(float(old[1].norm()))
    caplog.clear()
    old.save(tmp_path / "copy")
    assert [p.name for p in (tmp_path / "copy").iterdir()] == ["directions.safetensors"]
    new = fe.Directions.load(tmp_path / "copy")
    assert new == old and new.statistics == old.statistics and new.about == old.about and not caplog.records


def test_old_rows_and_sums_load(tmp_path, caplog):
    fe.capture(llama(), None, DATA, layers=[1], batch_size=2, rows=tmp_path / "rows")
    old, new = Rows(OLD / "rows"), Rows(tmp_path / "rows")
    assert [r.getMessage() for r in caplog.records if "version 1" in r.getMessage()] and "rows" in caplog.records[-1].getMessage()
    for one, other in zip(old.layer(1), new.layer(1), strict=True):
        torch.testing.assert_close(one, other)
    caplog.clear()
    shutil.copytree(OLD / "sums", tmp_path / "sums")
    how = {"layers": [1], "batch_size": 2}
    with pytest.raises(ValueError, match=r"of another pass .*sinks"):  # they do not say which tokens were left out
        fe.capture(llama(), None, DATA, **how, resume=tmp_path / "sums")
    assert "its next save has one" in caplog.text


def test_old_trajectories_load(caplog):
    old = Trajectories.load(OLD / "trajectories.safetensors")
    assert old.lengths.tolist() == [2, 3] and old.prompts == ["a", "b"] and "version 1" in caplog.text


KEY = {"directions": "0123", "unit": "strength"}
CELL = {"layers": [1], "dose": 2.0, "strength": 2.0, "mean": 0.5, "low": float("-inf"), "high": float("inf"), "count": 1}


def test_old_sweeps_load_and_are_renewed(tmp_path, caplog):
    (tmp_path / "sweep.json").write_text(json.dumps({"key": KEY, "cells": [CELL | {"control": None}]}))
    old = sweeping._Kept(tmp_path, KEY)
    assert len(caplog.records) == 1 and "format version 1" in caplog.text
    cell = old.add(old.get((1,), 2.0))
    assert cell.mean == 0.5 and cell.high == float("inf")
    caplog.clear()
    assert sweeping._Kept(tmp_path, KEY).cells == old.cells and not caplog.records


def test_old_plans_load(tmp_path, caplog):
    trajectories._begin(tmp_path, {"prompts": ["a"]}, 3)
    plan = json.loads((tmp_path / trajectories._PLAN).read_text())
    assert trajectories._plan(tmp_path)["shards"] == 3 and not caplog.records
    old = {key: plan[key] for key in ("format", "shards", "asked")}
    (tmp_path / trajectories._PLAN).write_text(json.dumps(old))
    trajectories._begin(tmp_path, {"prompts": ["a"]}, 3)  # goes on with it
    assert len(caplog.records) == 1 and "format version 1" in caplog.text


def made(folder):
    """{what: (file, a function that loads it)} of version 2, one of each kind."""
    model = llama()
    with fe.load(model, OLD / "all-kinds") as handle:
        handle.save(folder / "edit")
    fe.Directions.load(OLD / "directions").save(folder / "directions")
    head, digest = trained_beside.payload({"score": torch.ones(8)})
    edit_file.write(folder / "headed", {"edits": [], "training": {"head": digest}}, {}, head=head)
    fe.capture(model, None, DATA, layers=[1], batch_size=2, rows=folder / "rows", resume=folder / "sums")
    Trajectories.load(OLD / "trajectories.safetensors").save(folder / "trajectories.safetensors")
    (shard,) = (folder / "rows").iterdir()
    sweeping._Kept(folder / "sweep", KEY).add(sweeping.Cell(**CELL | {"layers": (1,)}))
    trajectories._begin(folder / "plan", {"prompts": ["a"]}, 3)

    def resume():
        fe.capture(model, None, DATA, layers=[1], batch_size=2, rows=folder / "again", resume=folder / "sums")

    return {
        "edit.json": (folder / "edit" / "edit.json", lambda: edit_file.read(folder / "edit"), fe.EditFileError),
        "edit.safetensors": (folder / "edit" / "edit.safetensors", lambda: edit_file.read(folder / "edit"), fe.EditFileError),
        "head": (
            folder / "headed" / "head.safetensors", lambda: trained_beside.read(folder / "headed", model), fe.EditFileError,
        ),
        "directions": (
            folder / "directions" / "directions.safetensors", lambda: fe.Directions.load(folder / "directions"),
            fe.DirectionsFileError,
        ),
        "rows": (shard, lambda: Rows(folder / "rows"), ValueError),
        "sums": (folder / "sums" / "capture.safetensors", resume, ValueError),
        "trajectories": (
            folder / "trajectories.safetensors", lambda: Trajectories.load(folder / "trajectories.safetensors"),
            fe.EditFileError,
        ),
        "sweep": (folder / "sweep" / "sweep.json", lambda: sweeping._Kept(folder / "sweep", KEY), ValueError),
        "plan": (folder / "plan" / trajectories._PLAN, lambda: trajectories._plan(folder / "plan"), fe.EditFileError),
    }  # fmt: skip


def flips(content, count, seed):
    """The same bytes with one bit flipped, `count` times: every bit of a small file's first kilobyte is likely among them."""
    draw = random.Random(seed)
    for _ in range(count):
        place = draw.randrange(min(len(content), draw.choice((700, len(content)))))
        flipped = bytearray(content)
        flipped[place] ^= 1 << draw.randrange(8)
        yield bytes(flipped)


def test_no_flipped_bit_loads(tmp_path):
    for kind, (path, load, error) in made(tmp_path).items():
        load()
        whole = path.read_bytes()
        for number, content in enumerate(flips(whole, FLIPS, kind)):
            path.write_bytes(content)
            with pytest.raises(error):
                load()
                raise AssertionError(f"flip {number} of {kind} was loaded")
        path.write_bytes(whole)
        load()


def test_a_missing_checksum_or_an_unknown_key_is_refused(tmp_path):
    folder = made(tmp_path)["edit.json"][0].parent
    document = json.loads((folder / "edit.json").read_text())
    for change, said in (
        (lambda d: d.pop("sha256"), "no checksum of its own"), (lambda d: d.update(comment=1), "not have the checksum"),
        (lambda d: d.update(strength=40.75), "not have the checksum"),
    ):
        changed = dict(document)
        change(changed)
        (folder / "edit.json").write_text(json.dumps(changed, indent=2))
        with pytest.raises(fe.EditFileError, match=said):
            edit_file.read(folder)
    (folder / "edit.json").write_bytes(edit_file.seal_json({k: v for k, v in document.items() if k != "sha256"} | {"comment": 1}))
    with pytest.raises(fe.EditFileError, match="the key 'comment', which no edit has"):
        edit_file.read(folder)
    with pytest.raises(ValueError, match="the key 'comment'"):
        edit_file.write(folder, {"edits": [], "comment": 1}, {})


def test_a_seal_is_of_what_is_there_in_its_turn(tmp_path, monkeypatch):
    """Another writer saves between the call and its turn: the seal is of the new edit, whose tensors are the ones there."""
    folder = made(tmp_path)["edit.json"][0].parent
    header, tensors = edit_file.read(folder)
    turn = edit_file.turn

    def later(folder):
        monkeypatch.setattr(edit_file, "turn", turn)
        edit_file.write(folder, header, {name: tensor + 1 for name, tensor in tensors.items()})
        return turn(folder)

    monkeypatch.setattr(edit_file, "turn", later)
    edit_file.reseal(folder)
    found = edit_file.read(folder)[1]
    assert all(torch.equal(found[name], tensor + 1) for name, tensor in tensors.items())


def test_resealed_by_hand(tmp_path):
    folder = made(tmp_path)["edit.json"][0].parent
    document = json.loads((folder / "edit.json").read_text())
    document["training"] = {"note": "checked by Ben"}
    (folder / "edit.json").write_text(json.dumps(document))
    with pytest.raises(fe.EditFileError, match=r"fastedit show --reseal"):
        fe.load(llama(), folder)
    edit_file.reseal(folder)
    header, _ = edit_file.read(folder)
    assert header["training"] == {"note": "checked by Ben"}
    payload = bytearray((folder / "edit.safetensors").read_bytes())
    payload[-1] ^= 1
    (folder / "edit.safetensors").write_bytes(payload)
    with pytest.raises(fe.EditFileError, match="checksum"):  # a hand may write words, but not numbers
        edit_file.reseal(folder)
