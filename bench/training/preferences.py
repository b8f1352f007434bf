"""What a step of DPO with an edit costs: memory beside an SFT step of the same rows, time beside a second model as reference.

    python -m bench.training.preferences --out bench/results/dpo_steps.csv

A random Llama; fp32, CPU. Times: the ways take turns in one process after a warm-up, medians over the turns; `ms` is CPU time
of all threads, so that other work on the machine does not count, `wall_ms` the clock's, and `of_second` of CPU time. Memory:
a process for each way, its highest resident size (VmHWM) after two steps; `model` is what
it is with the model loaded and nothing run.
"""

import argparse
import csv
import statistics
import subprocess
import sys
import time
from pathlib import Path

WAYS = ("sft", "same", "second", "stored")
PAIRS, PROMPT, RESPONSE, TURNS = 4, 32, 64, 5


def build():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8, vocab_size=16384,
        max_position_embeddings=256,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def rows():
    import torch

    draw = torch.Generator().manual_seed(0)
    asked = torch.randint(5, 16384, (PAIRS, PROMPT), generator=draw).tolist()
    said = torch.randint(5, 16384, (2, PAIRS, RESPONSE), generator=draw).tolist()
    return [
        {name: {"ids": asked[n] + said[k][n], "prompt": PROMPT} for k, name in enumerate(("chosen", "rejected"))}
        for n in range(PAIRS)
    ]


class Steps:
    """One step of each way, on one model with one edit."""

    def __init__(self, second):
        import torch

        import fastedit as fe
        from fastedit.training.batches import Padded, response_logps

        self.model, self.other = build().train(), build().eval() if second else None
        self.handle = fe.patch(self.model, fe.RED(), freeze=True)
        self.optimizer = torch.optim.AdamW(list(self.handle.parameters()), lr=1e-3)
        self.batch = Padded(0)(rows())
        with torch.no_grad():
            self.kept = response_logps(self.model, self.model, self.batch)[0]

    def step(self, way):
        import torch

        from fastedit.training import at_zero
        from fastedit.training.batches import response_logps, token_logps
        from fastedit.training.losses import dpo

        if way == "sft":
            said, mask = token_logps(self.model, self.model, self.batch)
            loss = -said.sum() / mask.sum()
        else:
            if way == "same":
                with at_zero(self.model):
                    reference, _ = response_logps(self.model, self.model, self.batch)
            elif way == "second":
                with torch.no_grad():
                    reference, _ = response_logps(self.other, self.other, self.batch)
            else:
                reference = self.kept
            policy, _ = response_logps(self.model, self.model, self.batch)
            loss = dpo(policy, reference).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def clocks():
    """(CPU time of all threads, the clock), seconds"""
    return time.process_time(), time.perf_counter()


def peak():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024


def memory(way):
    made = Steps(way == "second") if way != "model" else build()
    if way != "model":
        for _ in range(2):
            made.step(way)
    print(peak())


def _memory_of(way):
    asked = [sys.executable, "-m", __spec__.name, "--memory", way]
    return float(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)


NAMES = {
    "sft": "SFT", "same": "DPO, the same model at strength 0", "second": "DPO, a second model in memory",
    "stored": "DPO, `--store`", "reference pass": "the pass beforehand", "model": "the model alone, nothing run",
}  # fmt: skip


def markdown(path):
    """A line for each way."""
    with open(path, encoding="utf-8", newline="") as file:
        found = {row["way"]: row for row in csv.DictReader(file)}
    lines = ["| | CPU time, ms | of a second model's | peak memory, MiB | of SFT's |", "|---" * 5 + "|"]
    for way, name in NAMES.items():
        row = found[way]
        times = (f"{float(row['ms']):,.0f}" if row["ms"] else "", f"{float(row['of_second']):.2f}" if row["of_second"] else "")
        peaks = (f"{float(row['peak_mib']):,.0f}", f"{float(row['of_sft']):.2f}") if row["peak_mib"] else ("", "")
        lines.append(f"| {name} | " + " | ".join((*times, *peaks)) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results/dpo_steps.csv"))
    parser.add_argument("--memory", choices=("model", *WAYS))
    args = parser.parse_args()
    if args.memory:
        return memory(args.memory)
    import torch

    steps, taken = Steps(True), {way: [] for way in WAYS}
    for turn in range(TURNS + 1):
        for way in WAYS:
            began = clocks()
            steps.step(way)
            if turn:
                taken[way].append([after - before for after, before in zip(clocks(), began, strict=True)])
    began = clocks()
    with torch.no_grad():
        from fastedit.training.batches import response_logps

        response_logps(steps.model, steps.model, steps.batch)
    stored = [after - before for after, before in zip(clocks(), began, strict=True)]
    del steps
    mib = {way: _memory_of(way) for way in ("model", *WAYS)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found = {way: [1000 * statistics.median(both) for both in zip(*some, strict=True)] for way, some in taken.items()}
    found["reference pass"] = [1000 * seconds for seconds in stored]
    told = (PAIRS, PROMPT + RESPONSE, torch.get_num_threads(), torch.__version__)
    with open(args.out, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("way", "ms", "wall_ms", "of_second", "peak_mib", "of_sft", "pairs", "tokens", "threads", "torch"))
        for way in ("model", *WAYS, "reference pass"):
            times = [None] * 3
            if way in found:
                times = [round(ms, 1) for ms in found[way]] + [round(found[way][0] / found["second"][0], 3)]
            peaks = [round(mib[way], 1), round(mib[way] / mib["sft"], 3)] if way in mib else [None] * 2
            writer.writerow((way, *times, *peaks, *told))
    print(args.out.read_text())


if __name__ == "__main__":
    main()
