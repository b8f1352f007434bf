"""Captured rows on disk: safetensors shards, written a window of the data at a time and read memory-mapped.

    folder/rows-<process>-<items>.safetensors   "<layer>" (rows, width) in the model's dtype; "<layer>.group",
                                                "<layer>.index" (rows,): of which group and which item of the data
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes

from .edit_file import replace


class RowWriter:
    """Rows of one window, then a shard of them."""

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
        """Write what is held as the shard that ends at an item of the data; again, after a resume, over the old one."""
        if self.held:
            tensors = {name: torch.cat(parts).contiguous() for name, parts in self.held.items()}
            path = self.folder / f"rows-{self.job['rank']}-{position:012d}.safetensors"
            replace(path, to_bytes(tensors, {"job": json.dumps(self.job)}))
        self.held = {}


class Rows:
    """The rows of a folder that `fastedit.capture(rows=)` wrote, a layer at a time, in the order of the data."""

    def __init__(self, folder):
        self.shards = sorted(Path(folder).glob("rows-*.safetensors"))
        if not self.shards:
            raise ValueError(f"{folder} holds no rows-*.safetensors; fastedit.capture(rows=folder) writes them")
        with safe_open(self.shards[0], "pt") as file:
            self.job = json.loads(file.metadata()["job"])

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
        found = {name: [] for name in ("", ".group", ".index")}
        for shard in self.shards:
            with safe_open(shard, "pt") as file:
                for name, parts in found.items():
                    parts.append(file.get_tensor(f"{number}{name}"))
        rows, group, index = (torch.cat(parts) for parts in found.values())
        order = index.argsort(stable=True)
        return rows[order], group[order], index[order]
