"""What a call costs the host: every path to the same edit of one row of 64 columns, where the arithmetic is nothing.

    python -m bench.host --out bench/results

Writes host-<device>.csv: the call, µs p20/p50/p80 and the ratio to the eager expression it stands for, interleaved.
On a GPU also a decode step captured in a CUDA graph, edited against unedited.
"""

import argparse
import csv
import pathlib
import sys

import torch

from fastedit import arrays, ops
from fastedit.dispatch import load, select
from fastedit.patching import residual_add as adds
from fastedit.verifying.timing import interleave, quantiles, ratio

from .machine import about

FIELDS = ("call", "stands_for", "us_p20", "us_p50", "us_p80", "ratio", "ratio_95", "machine", "torch", "commit")
WIDTH = 64


def calls(device):
    """{name of the eager expression: {name of a call: function}}; the expression itself is the first of each."""
    h, residual = (torch.randn(1, WIDTH, device=device) for _ in range(2))
    scale, bias, weight = (torch.ones(WIDTH, device=device) for _ in range(3))
    tensors = (scale, bias, None, None, None)
    backend = load(select(torch.device(device).type, h.dtype, h.dtype).__name__)
    read, seed = torch.randn(4, WIDTH, device=device), torch.ones_like(h)
    trained = scale.clone().requires_grad_()

    def stepped(out):
        return torch.autograd.grad(out, trained, seed)

    module, hooked = torch.nn.Identity(), torch.nn.Identity()
    hooked.register_forward_hook(lambda module, args, out: scale * out + bias)
    compiled = torch.compile(lambda h: scale * h + bias)

    def no_grad(function):
        def call():
            with torch.no_grad():
                return function()

        return call

    groups = {
        "scale * h + bias": {
            "a module's call": lambda: module(h),
            "a hook on a module": lambda: hooked(h),
            "torch.compile of it": lambda: compiled(h),
            "fastedit.ops.edit": lambda: ops.edit(h, scale, bias),
            "the patched module's way in": no_grad(lambda: adds.edit(h, tensors, None)),
            "torch.ops.fastedit.edit": lambda: torch.ops.fastedit.edit(h, scale, bias, *[None] * 5),
        },
        "residual + scale * h + bias": {"fastedit.ops.edit_add": lambda: ops.edit_add(h, residual, scale, bias)},
        "rms_norm(residual + scale * h + bias)": {
            "fastedit.ops.edit_add_norm": lambda: ops.edit_add_norm(h, residual, weight, scale, bias)
        },
        "residual + h": {"fastedit.ops.edit_add, beside the plain add": lambda: ops.edit_add(h, residual, scale, bias)},
        "h @ read.T": {"fastedit.ops.project": lambda: ops.project(h, read)},
        "scale * h + bias, to be trained": {"fastedit.ops.edit, trained": lambda: ops.edit(h, trained, bias)},
        "scale * h + bias, forward and backward": {
            "fastedit.ops.edit, forward and backward": lambda: stepped(ops.edit(h, trained, bias))
        },
    }
    if backend.any_shape:
        groups["scale * h + bias"]["the native call"] = lambda: backend.edit(h, scale, bias, *[None] * 5)
    eager = {
        "scale * h + bias": lambda: scale * h + bias,
        "residual + scale * h + bias": lambda: residual + (scale * h + bias),
        "rms_norm(residual + scale * h + bias)": lambda: torch.nn.functional.rms_norm(
            residual + (scale * h + bias), (WIDTH,), weight, 1e-6
        ),
        "residual + h": lambda: residual + h,
        "h @ read.T": lambda: h @ read.T,
        "scale * h + bias, to be trained": lambda: trained * h + bias,
        "scale * h + bias, forward and backward": lambda: stepped(trained * h + bias),
    }
    if device == "cpu":
        eager["scale * h + bias in NumPy"], groups["scale * h + bias in NumPy"] = in_numpy(h, scale, bias)
    return {name: {name: eager[name]} | group for name, group in groups.items()}


def in_numpy(h, scale, bias):
    """(the expression, {name of a call: function}) on NumPy arrays."""
    h, scale, bias = (t.numpy() for t in (h, scale, bias))
    return lambda: scale * h + bias, {"fastedit.arrays.edit": lambda: arrays.edit(h, scale, bias)}


def decode_in_a_graph():
    """{variant: replay of one decode step of a Llama captured in a CUDA graph}."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
    except ImportError as error:
        print(f"no decode step in a CUDA graph: {error}")
        return {"kept": []}
    import fastedit

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=8, num_attention_heads=16, vocab_size=32000,
        attn_implementation="sdpa",
    )  # fmt: skip
    replays, kept = {}, []
    for name in ("unedited", "unedited again", "edited"):
        model = LlamaForCausalLM(config).eval().to("cuda", torch.bfloat16)
        if name == "edited":
            fastedit.patch(model, fastedit.RED())
        cache = StaticCache(config=config, max_cache_len=128)
        token, position = torch.tensor([[7]], device="cuda"), torch.tensor([64], device="cuda")

        def step(model=model, cache=cache, token=token, position=position):
            with torch.no_grad():
                return model(token, past_key_values=cache, cache_position=position, position_ids=position[None]).logits

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step()
        kept.append((model, cache, token, position, logits))
        replays[f"decode step in a CUDA graph, {name}"] = graph.replay
    replays["kept"] = kept
    return replays


def rows(device, blocks=7, rounds=15):
    for name, group in calls(device).items():
        yield from _measured(group, name, blocks, rounds)
    if device == "cuda":
        replays = decode_in_a_graph()
        kept = replays.pop("kept")  # alive while the graphs replay
        if replays:
            yield from _measured(replays, next(iter(replays)), blocks, rounds)
        del kept


def _measured(group, base, blocks, rounds):
    medians = interleave(group, blocks=blocks, rounds=rounds)
    for call, times in medians.items():
        p20, p50, p80 = (f"{t * 1e6:.2f}" for t in quantiles(times))
        against, half = ratio(medians, call, base)
        yield {
            "call": call, "stands_for": base, "us_p20": p20, "us_p50": p50, "us_p80": p80,
            "ratio": f"{against:.3f}", "ratio_95": f"{half:.3f}",
        }  # fmt: skip


def run(out, device=None):
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    path = pathlib.Path(out) / f"host-{device}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    where = about()
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(row | where for row in rows(device))
    return path


def table(path):
    """The CSV as Markdown."""
    with pathlib.Path(path).open(newline="") as file:
        found = list(csv.DictReader(file))
    lines = ["| call | µs | of the eager expression's time |", "|---|---|---|"]
    for row in found:
        name = f"*{row['call']}*" if row["call"] == row["stands_for"] else row["call"]
        lines.append(f"| {name} | {float(row['us_p50']):.1f} | {float(row['ratio']):.2f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="bench/results")
    path = run(parser.parse_args().out)
    print(table(path), path, sep="\n", file=sys.stdout)


if __name__ == "__main__":
    main()
