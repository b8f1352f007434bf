"""The roofline, from the CSV alone."""

import pathlib

from .table import cases_of


def roofline(path):
    """GB/s over the bytes moved of every op under rank 0, ours and its peers, under the copy's; returns the PNG's path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = {k: v for k, v in cases_of(path).items() if (k[5] == 0 or k[0] == "project") and k[6] == 1}
    ops = [op for op in ("edit", "edit_add", "edit_add_norm", "project") if any(k[0] == op for k in cases)]
    figure, axes = plt.subplots(2, len(ops), figsize=(3.6 * len(ops), 6.4), squeeze=False, sharex=True, sharey=True)
    styles = {"copy": "k--", "clone": "k:", "fastedit": "C0o-", "eager": "C1s", "compile": "C2^"}
    for column, op in enumerate(ops):
        for row, mode in enumerate(("forward", "backward")):
            panel = axes[row][column]
            for name, style in styles.items():
                points = sorted(
                    (int(found[name]["bytes"]), float(found[name]["gb_s"]))
                    for key, found in cases.items()
                    if key[:2] == (op, mode) and key[2] in ("fp32", "bf16") and name in found
                )
                if points:
                    panel.plot(*zip(*points, strict=True), style, markersize=4, linewidth=0.9, label=name)
            panel.set_title(f"{op}, {mode}", fontsize=9)
            panel.set_xscale("log")
            panel.set_yscale("log")
            panel.grid(alpha=0.3)
    for panel in axes[-1]:
        panel.set_xlabel("bytes that must move")
    for line in axes:
        line[0].set_ylabel("GB/s")
    axes[0][0].legend(fontsize=7)
    figure.suptitle("every op between the cost of a call and the copy's bandwidth (rank 0)", fontsize=10)
    figure.tight_layout()
    target = pathlib.Path(path).with_suffix(".png")
    figure.savefig(target, dpi=130)
    plt.close(figure)
    return target
