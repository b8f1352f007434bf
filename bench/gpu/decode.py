"""What a decode step and a call cost: edited and not, eager and in a CUDA graph.

    python -m bench.gpu.decode --out bench/results

Writes gpu-decode.csv: µs of one token's step through a Llama of random weights, RED on every layer against none, taking
turns; and the host's µs for a call whose kernel is nothing, without waiting for the GPU.
"""

import argparse
import inspect
import pathlib
import statistics
import time

import torch

from .device import NAME, REHEARSAL, Table, captured, microseconds, require, synchronize

FIELDS = ("what", "how", "us_p50", "of_unedited")
SIZES = {  # of the Llama
    "hidden_size": (2048, 64), "intermediate_size": (5632, 128), "num_hidden_layers": (16, 2), "num_attention_heads": (16, 4),
    "vocab_size": (32000, 100),
}  # fmt: skip
SIZE = {name: sizes[REHEARSAL] for name, sizes in SIZES.items()}


def step(edited):
    """One token's forward on a static cache."""
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    import fastedit

    torch.manual_seed(0)
    config = LlamaConfig(**SIZE, attn_implementation="sdpa")
    model = LlamaForCausalLM(config).eval().to(NAME, torch.bfloat16)
    if edited:
        fastedit.patch(model, fastedit.RED())
    cache = StaticCache(config=config, max_cache_len=128)
    token, position = torch.tensor([[7]], device=NAME), torch.tensor([64], device=NAME)

    kept = (
        "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    )  # before transformers 5.24

    def run():
        with torch.no_grad():
            return model(token, **{kept: cache}, cache_position=position, position_ids=position[None]).logits

    for _ in range(3):
        run()
    return run


def in_turns(functions, calls, turns):
    times = {name: [] for name in functions}
    for _ in range(turns):
        for name, function in functions.items():
            times[name].append(microseconds(function, calls))
    return {name: statistics.median(found) for name, found in times.items()}


def write_steps(table, steps, how, calls, turns):
    medians = in_turns(steps, calls, turns)
    for name, us in medians.items():
        ratio = us / medians["unedited"]
        table.write(what=name, how=how, us_p50=f"{us:.1f}", of_unedited=f"{ratio:.3f}")
        print(f"decode step, {how}, {name}: {us:.1f} us, {ratio:.3f} of the unedited", flush=True)


def host_costs(table):
    """Of calls on one row, back to back, the queue never full: what the host does."""
    from fastedit import ops

    h, residual = (torch.randn(1, 64, device=NAME) for _ in range(2))
    scale, bias = torch.ones(64, device=NAME), torch.zeros(64, device=NAME)
    calls = {
        "residual + h": lambda: residual + h,
        "residual + scale * h + bias": lambda: residual + scale * h + bias,
        "ops.edit_add": lambda: ops.edit_add(h, residual, scale, bias),
        "ops.edit": lambda: ops.edit(h, scale, bias),
    }
    for name, call in calls.items():
        times = []
        for _ in range(5 if REHEARSAL else 50):
            synchronize()
            begin = time.perf_counter()
            for _ in range(100):
                call()
            times.append((time.perf_counter() - begin) * 1e4)
        us = statistics.median(times)
        table.write(what=name, how="host", us_p50=f"{us:.2f}")
        print(f"host, {name}: {us:.2f} us", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="bench/results")
    options = parser.parse_args()
    require()
    table = Table(pathlib.Path(options.out) / "gpu-decode.csv", FIELDS)
    host_costs(table)
    steps = {name: step(name == "edited") for name in ("unedited", "unedited again", "edited")}
    write_steps(table, steps, "eager", 2 if REHEARSAL else 10, 3 if REHEARSAL else 15)
    write_steps(
        table,
        {name: captured(run) for name, run in steps.items()},
        "CUDA graph",
        2 if REHEARSAL else 10,
        3 if REHEARSAL else 15,
    )


if __name__ == "__main__":
    main()
