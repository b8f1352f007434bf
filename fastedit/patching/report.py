"""What is where: one line per edit, site and path. Neighboring layers share a line."""

from ..ops.dispatch import BackendError, select
from .rows.gate_sensors import kernel_gate

_HEAD = ("layers", "site", "edit", "path", "backend", "parameters", "bytes")


class Report:
    """`rows`: one dict per edit and layer. Printed, layers that differ in nothing else share a line."""

    def __init__(self, rows):
        self.rows = rows

    def lines(self):
        """[(layers, site, edit, path, backend, parameters, bytes)]"""
        groups = {}
        for row in self.rows:
            key = (row["number"], row["stack"], row["site"], row["edit"], row["path"], row["backend"])
            groups.setdefault(key, []).append(row)
        for (_, stack, site, edit, path, backend), members in groups.items():
            layers = f"{stack}.{_ranges([row['layer'] for row in members])}"
            numbers = sum(row["parameters"] for row in members), sum(row["bytes"] for row in members)
            yield layers, site, edit, path, backend, *(f"{n:,}" for n in numbers)

    def __str__(self):
        lines = [_HEAD, *self.lines()]
        widths = [max(len(line[column]) for line in lines) for column in range(len(_HEAD))]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines
        )

    __repr__ = __str__


def report(handle):
    if not (handle.removed or handle.merged):
        handle._root.look()
    rows = []
    for number, (edit, members) in enumerate(zip(handle.edits, handle._members, strict=True)):
        for layer, masters in members:
            stack, _, position = layer.name.rpartition(".")
            tensors = [*masters.masters().values(), *(t for child in masters.children() for t in child.buffers())]
            rows.append({
                "number": number, "stack": stack, "layer": int(position), "site": edit.site,
                "edit": type(edit).__name__ + ("" if edit.gate is None else f" when {edit.gate}"),
                "path": _path(handle, layer, edit.site, masters),
                "backend": _backend(layer, edit.site, masters),
                "parameters": sum(t.numel() for t in tensors), "bytes": sum(t.nbytes for t in tensors),
            })  # fmt: skip
    return Report(rows)


def _path(handle, layer, site, masters):
    if handle.removed:
        return "removed"
    if handle.merged:
        return "merged into the weights"
    reason = handle._root.installed[layer.name].paths[site]
    if reason is None and masters.keep_norm:
        reason = "keep_norm rescales each row after the edit"
    looks = masters.gating is not None and masters.gating.looks and kernel_gate(masters) is None
    if reason is None and site == "block" and looks:
        reason = "its gate looks at the sum before it is edited"
    if reason is None and masters.is_probe:
        return "reads only"
    return "fused" if reason is None else f"plain: {reason}"


def _backend(layer, site, masters):
    weights = [p for p in layer.at(site).parameters() if p.is_floating_point()]
    dtype = weights[0].dtype if weights else next(iter(masters.masters().values())).dtype
    try:
        return select(masters.dial.device.type, dtype).__name__.rpartition(".")[2]
    except BackendError as error:
        return f"none: {error}"


def _ranges(numbers):
    """0–3,7 for [0, 1, 2, 3, 7]"""
    runs = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(f"{a}" if a == b else f"{a}–{b}" for a, b in runs)
