"""Capture beside a forward that ends at the same layer and captures nothing: time and peak memory.

    python -m bench.capture [--at "all tokens"]

The two take turns over the same batches, half of the model's layers; the ratio is the median over blocks with its 95 %
interval. Memory is the peak resident set of a process that does nothing else, model and libraries included.
"""

import argparse
import contextlib
import csv
import resource
import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastedit as fe
from bench.machine import about
from fastedit.capturing.capture import AT
from fastedit.texts.batches import Windows
from fastedit.verifying.timing import interleave, ratio

RESULTS = Path(__file__).resolve().parent / "results" / "capture.csv"


def setup(arguments):
    """(model, sequences) of one size: a Llama of random weights, and ids of lengths 16 to 64."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=arguments.width, intermediate_size=2 * arguments.width,
        num_hidden_layers=arguments.layers, num_attention_heads=8, max_position_embeddings=128,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(16, 65, (arguments.sequences,), generator=generator).tolist()
    return LlamaForCausalLM(config).eval(), [torch.randint(1000, (n,), generator=generator).tolist() for n in lengths]


class Deepest(Exception):
    pass


def stop(module, args, output):
    raise Deepest


def capture(model, data, at):
    fe.capture(model, None, data, at=at, layers=range(deepest(model) + 1), batch_size=16, progress=False)


def deepest(model):
    return len(model.model.layers) // 2 - 1


@torch.no_grad()
def forward(model, data, at):
    """The same batches as far as the same layer, with one hook, which ends them."""
    hook = model.model.layers[deepest(model)].register_forward_hook(stop)
    for window in Windows(None, data, batch_size=16):
        for batch in window:
            with contextlib.suppress(Deepest):
                model(**batch.inputs, use_cache=False)
    hook.remove()


VARIANTS = {"capture": capture, "forward": forward}


def peak(arguments, variant):
    """Bytes of the resident set at its largest, of a process of its own."""
    command = [sys.executable, "-m", "bench.capture", "--peak", variant, "--at", arguments.at]
    for name in ("width", "layers", "sequences"):
        command += [f"--{name}", str(getattr(arguments, name))]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--at", default="last token", choices=AT)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=2000)
    parser.add_argument("--timed", type=int, default=64, help="sequences of each timed run")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak", choices=["capture", "forward"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    model, data = setup(arguments)
    if arguments.peak:
        VARIANTS[arguments.peak](model, data, arguments.at)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
    calls = {
        name: lambda variant=variant: variant(model, data[: arguments.timed], arguments.at)
        for name, variant in VARIANTS.items()
    }
    medians = interleave(calls, blocks=arguments.blocks, rounds=arguments.rounds, warmup=1)
    share, half = ratio(medians, "capture", "forward")
    memory = {name: peak(arguments, name) for name in VARIANTS}
    print(f"time ratio {share:.4f} ± {half:.4f}; peak resident {memory['capture']:,} against {memory['forward']:,} bytes: "
          f"{memory['capture'] / memory['forward']:.4f}")  # fmt: skip
    row = {
        "at": arguments.at, "width": arguments.width, "layers": arguments.layers, "sequences": arguments.sequences,
        "time_ratio": share, "interval": half, "peak_bytes": memory["capture"], "plain_peak_bytes": memory["forward"],
        **about(),
    }  # fmt: skip
    new = not RESULTS.exists()
    with open(RESULTS, "a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
