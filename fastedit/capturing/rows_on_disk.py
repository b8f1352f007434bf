"""Captured rows on disk: safetensors shards, one per window of the data, read memory-mapped.

    folder/rows-<process>-<items>.safetensors   "<layer>" (rows, width) in the model's dtype; "<layer>.group",
                                                "<layer>.index" (rows,): the row's group, and its item of the data
"""

import json
import logging
from pathlib import Path

import torch
from safetensors import safe_open

from ..files.edit_file import replace
from ..files.sealed import Damaged, check_mapped, parse_json, seal_tensors

logger = logging.getLogger("fastedit")


class RowWriter:
    """Collects the rows of one window and writes a shard of them."""

    def __init__(self, folder, job, *, fresh):
        self.folder, self.job, self.held = Path(folder), job, {}
        self.folder.mkdir(parents=True, exist_ok=True)
        there = next(self.folder.glob(f"rows-{job['rank']}-*.safetensors"), None)
        if fresh and there is not None:
            raise ValueError(f"{self.folder} holds the rows of another pass ({there.name}): give an empty folder")

    def add(self, layer, rows, group, index):
        if rows.dim() == 3:
            index = index[:, None].expand(rows.shape[:2]).to(group.device)
            real = group >= 0
            rows, group, index = rows[real], group[real], index[real]
        for name, tensor in ((f"{layer}", rows), (f"{layer}.group", group), (f"{layer}.index", index)):
            self.held.setdefault(name, []).append(tensor.detach().cpu().clone())

    def flush(self, position):
        """Write what is held as the shard that ends at an item of the data. After a resume it replaces the old one."""
        if self.held:
            tensors = {name: torch.cat(parts).contiguous() for name, parts in self.held.items()}
            path = self.folder / f"rows-{self.job['rank']}-{position:012d}.safetensors"
            replace(path, seal_tensors(tensors, {"job": json.dumps(self.job)}))
        self.held = {}


class RowsFileError(ValueError):
    """Rows on disk are not what they should be. The message says what was expected, what was found and what to do."""


class Rows:
    """The rows of a folder that `fastedit.capture(rows=)` wrote, one layer at a time, in the order of the data.

    Every shard is checked once, as a whole: its checksum, and that it belongs to the same pass as the others.

    Raises:
        RowsFileError: there are none, or one is damaged or of another pass.
    """

    def __init__(self, folder):
        self.shards = sorted(Path(folder).glob("rows-*.safetensors"))
        if not self.shards:
            raise RowsFileError(f"{folder} holds no rows-*.safetensors; fastedit.capture(rows=folder) writes them")
        jobs, versions = zip(*map(_job, self.shards), strict=True)
        self.job = jobs[0]
        for shard, job in zip(self.shards, jobs, strict=True):
            if {**job, "rank": 0} != {**self.job, "rank": 0}:
                raise RowsFileError(f"{shard} is of another pass than {self.shards[0].name}: give each its own folder")
        if 1 in versions:
            logger.warning("fastedit: rows in %s are of format version 1, without checksum; capture them again for one", folder)

    @property
    def layers(self):
        return self.job["layers"]

    @property
    def names(self):
        """The groups' labels, as strings."""
        return self.job["names"]

    def layer(self, number):
        """(rows (n, width), group (n,), index (n,)) of a layer, from all shards and processes."""
        if number not in self.layers:
            raise ValueError(f"there are no rows of layer {number}; captured were {self.layers}")
        parts = [self._of(shard, number) for shard in self.shards]
        rows, group, index = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        order = index.argsort(stable=True)
        return rows[order], group[order], index[order]

    def _of(self, shard, number):
        try:
            with safe_open(shard, "pt") as file:
                return [file.get_tensor(f"{number}{name}") for name in ("", ".group", ".index")]
        except Exception as error:  # safetensors' own errors have no common base besides this
            raise RowsFileError(f"{shard} lacks rows of layer {number}: {error}") from None


def _job(shard):
    """(the note of a shard, its format version), after a check of the whole shard."""
    try:
        note, version = check_mapped(shard, ("job",))
        job = parse_json(note["job"])
        if not (isinstance(job, dict) and isinstance(job.get("layers"), list) and isinstance(job.get("names"), list)):
            raise Damaged(f"is of a pass described by {job!r:.80}, expected its layers and names")
        return job, version
    except Damaged as error:
        raise RowsFileError(f"{shard} {error}; capture the rows again") from None
    except OSError as error:
        raise RowsFileError(f"{shard} cannot be read: {error.strerror or error}") from None
