"""What a bank costs: many edits in one batch beside one edit in the same batch, beside a call for each, and adding one.

    python -m bench.bank                          # width 512, 8 layers, 64 sequences, 4,096 resident edits
    python -m bench.bank --size 64x5 --batch 8 --resident 64 --blocks 3 --rounds 3

A step decodes one token of every sequence behind a cache, and makes its assignment anew each time. All steps are
interleaved in one process; an interval is over blocks. Adding is timed on a live bank of a model with as many layers as
a 7B one and as wide, 262,144 numbers an edit, its other weights made small. Rows go to bench/results/bank.csv.
"""

import argparse
import csv
import pathlib
import tempfile

import torch

import fastedit as fe
from fastedit.verifying.timing import interleave, quantiles, ratio, time_once

from .machine import about
from .models.sizes import SIZES, build, device, sharing
from .models.works import PROMPT, ids

FIELDS = ("what", "beside", "size", "batch", "resident", "ratio", "interval", "ms_p20", "ms_p50", "ms_p80")
SOME = 4  # the bank that the large one is compared with


def red(layers, width, seed):
    generator = torch.Generator().manual_seed(seed)
    scale, bias = torch.randn(2, layers, width, generator=generator) * 0.02
    return fe.RED(1 + scale, bias)


def decoding(model, batch):
    """A step of `batch` sequences: one token behind a cache of PROMPT, the cache cropped back."""
    from transformers import DynamicCache

    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(input_ids=ids(model, batch, PROMPT), past_key_values=cache, use_cache=True)
    token = torch.full((batch, 1), 7, device=model.device)

    def step():
        with torch.no_grad():
            model(input_ids=token, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


def banked(base, capacity, edits):
    model = sharing(base)
    bank = fe.Bank(model, capacity)
    for name, edit in edits.items():
        bank.add(name, edit)
    return model, bank


def assigned(bank, names, step):
    def run():
        with bank.assign(names):
            step()

    return run


def steps(base, size, batch, resident):
    """{what: step}"""
    edits = {f"e{n}": red(size.layers, size.width, n) for n in range(resident)}
    names = list(edits)[:batch]
    model, bank = banked(base, resident, edits)
    few_model, few = banked(base, SOME, {name: edits[name] for name in names[:SOME]})
    four = [names[n % SOME] for n in range(batch)]
    alone = decoding(model, 1)
    each = [assigned(bank, [name], alone) for name in names]
    patched = sharing(base)
    fe.patch(patched, edits[names[0]])
    together, among_few = decoding(model, batch), decoding(few_model, batch)
    found = {
        "one edit": assigned(bank, names[:1] * batch, together),
        "one edit again": assigned(bank, names[:1] * batch, together),
        "one edit, patched": decoding(patched, batch),
        "unedited": decoding(sharing(base), batch),
        "a different edit each": assigned(bank, names, together),
        "four edits of few": assigned(few, four, among_few),
        "four edits of many": assigned(bank, four, together),
        "a call each": lambda: [call() for call in each],
    }
    return found


BESIDE = (
    ("a different edit each", "one edit"), ("a different edit each", "one edit, patched"), ("one edit again", "one edit"),
    ("one edit", "one edit, patched"), ("a different edit each", "unedited"), ("four edits of many", "four edits of few"),
    ("a call each", "a different edit each"),
)  # fmt: skip


def adding(times):
    """{how: [seconds]} of adding RED to a live bank of a model with 32 layers of width 4,096."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, width = 32, 4096
    config = LlamaConfig(
        hidden_size=width, intermediate_size=8, num_hidden_layers=layers, num_attention_heads=1, num_key_value_heads=1,
        head_dim=8, vocab_size=16,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().to(device())
    bank = fe.Bank(model, 8)
    edits = [red(layers, width, seed) for seed in range(4)]
    for name in "abcdefgh":
        bank.add(name, edits[0])  # full from here on: adding evicts
    found = {"add an edit": [], "add a handle": [], "add a folder": [], "replace": []}

    def timed(how, source, round_):
        name = f"{how} {round_}"
        found[how].append(time_once(lambda: bank.add(name, source)))
        bank.remove(name)

    with tempfile.TemporaryDirectory() as folder, fe.patch(model, edits[1]) as handle:
        handle.save(folder)
        for round_ in range(times):
            timed("add an edit", edits[round_ % 4], round_)
            timed("add a handle", handle, round_)
            timed("add a folder", folder, round_)
            found["replace"].append(time_once(lambda n=round_: bank.replace("h", edits[n % 4])))
    return {how: seconds[2:] for how, seconds in found.items()}


def rows(chosen):
    size = SIZES[chosen.size]
    where = {"size": chosen.size, "batch": chosen.batch, "resident": chosen.resident}
    found = steps(build(size), size, chosen.batch, chosen.resident)
    slow = {name: found[name] for name in ("a call each", "a different edit each")}  # which is as long as all others
    del found["a call each"]
    medians = interleave(found, blocks=chosen.blocks, rounds=chosen.rounds)
    slow = interleave(slow, blocks=3, rounds=1, warmup=1)
    for what, beside in BESIDE:
        medians = slow if what == "a call each" else medians
        found, interval = ratio(medians, what, beside)
        yield {"what": what, "beside": beside, **where, "ratio": f"{found:.4f}", "interval": f"{interval:.4f}",
               **_milliseconds(medians[what])}  # fmt: skip
    for how, seconds in adding(chosen.adds).items():
        yield {"what": how, "size": "4096x32", "batch": "", "resident": 8, **_milliseconds(seconds)}


def _milliseconds(seconds):
    return {f"ms_p{p}": f"{1e3 * s:.4f}" for p, s in zip((20, 50, 80), quantiles(seconds), strict=True)}


def table(path):
    """bank.csv as docs/bank.md has it: what takes how much of what, and what adding takes."""
    with open(path, newline="") as file:
        found = list(csv.DictReader(file))
    lines = ["| | beside | ratio | ms |", "|---|---|---|---|"]
    for row in found:
        ratio_ = f"{float(row['ratio']):.3f} ± {float(row['interval']):.3f}" if row["ratio"] else ""
        lines.append(f"| {row['what']} | {row['beside']} | {ratio_} | {float(row['ms_p50']):.1f} |")
    step = next(row for row in found if row["beside"])
    where = f"{step['machine']}, torch {step['torch']}, commit {step['commit']}"
    return f"{step['batch']} sequences, model {step['size']}, {step['resident']} edits resident; {where}\n\n" + "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.bank", description="What a bank of edits costs.")
    parser.add_argument("--size", choices=[name for name in SIZES if SIZES[name].family == "llama"], default="512x8")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--resident", type=int, default=4096)
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--adds", type=int, default=40)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    chosen = parser.parse_args()
    if not SOME <= chosen.batch <= chosen.resident:
        parser.error(f"--batch is {chosen.batch}, expected from {SOME} to --resident, which is {chosen.resident}")
    where = about()
    chosen.out.mkdir(parents=True, exist_ok=True)
    with open(chosen.out / "bank.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, (*FIELDS, *where))
        writer.writeheader()
        for row in rows(chosen):
            writer.writerow(row | where)
            beside = f" {row['ratio']} ± {row['interval']} of {row['beside']}," if "ratio" in row else ""
            print(f"{row['what']}:{beside} {row['ms_p50']} ms")


if __name__ == "__main__":
    main()
