"""What editing costs a model: decode, prefill and a training step against the unedited model and its peers.

    python -m bench.models [--out bench/results] [--processes 5]

Every figure is a ratio to the unedited model (or, for training, to the floor: a step of the same frozen model that
trains only an input bias at layer 0, so that gradients must cross all layers), interleaved in one process; the
table takes the median over several processes, with the 95 % interval over them and one variant against itself.
"""

import argparse
import csv
import itertools
import json
import math
import pathlib
import statistics
import subprocess
import sys

import torch

from .micro import commit, machine
from .timing import T95, interleave, ratio

SIZES = {"64x5": (64, 5, 172, 8), "512x8": (512, 8, 1376, 8)}
FIELDS = ("size", "work", "variant", "ratio", "ratio_95", "ms_p50", "processes", "machine", "torch", "commit")


def llama(size):
    from transformers import LlamaConfig, LlamaForCausalLM

    width, layers, inner, heads = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=1000, max_position_embeddings=1024, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def red_values(model):
    """One realistic RED edit: (scale, bias) a layer, the same for every variant."""
    width = model.config.hidden_size
    generator = torch.Generator().manual_seed(1)
    return [
        (1 + 0.02 * torch.randn(width, generator=generator), 0.02 * torch.randn(width, generator=generator))
        for _ in range(model.config.num_hidden_layers)
    ]


def edited(model, fused=True):
    import fastedit as fe

    handle = fe.patch(model, fe.RED(), fused=fused)
    tensors = handle.named_tensors()
    with torch.no_grad():
        for layer, (scale, bias) in enumerate(red_values(model)):
            tensors[f"0.layers.{layer}.mlp.scale"] = scale
            tensors[f"0.layers.{layer}.mlp.bias"] = bias
    handle.load_tensors(tensors)
    return model


def hooked(model):
    """The strong baseline: a plain PyTorch hook a layer."""
    for layer, (scale, bias) in zip(model.model.layers, red_values(model), strict=True):
        layer.mlp.down_proj.register_forward_hook(lambda module, args, out, s=scale, b=bias: s * out + b)
    return model


def inference_variants(size):
    return {
        "unedited": llama(size),
        "unedited again": llama(size),
        "hook": hooked(llama(size)),
        "fastedit plain": edited(llama(size), fused=False),
        "fastedit": edited(llama(size)),
    }


def decode(model, length=64):
    """One token through the model behind a cache of `length`, the cache cropped back after each."""
    from transformers import DynamicCache

    ids = torch.arange(length)[None] % 1000
    with torch.no_grad():
        cache = model(ids, past_key_values=DynamicCache(config=model.config), use_cache=True).past_key_values
    token = torch.tensor([[7]])

    def step():
        with torch.no_grad():
            model(token, past_key_values=cache, use_cache=True)
        cache.crop(-1)  # negative: how many to drop

    return step


def prefill(model, length=256):
    ids = torch.arange(length)[None] % 1000

    def step():
        with torch.no_grad():
            model(ids, use_cache=False)

    return step


class InputBias(torch.nn.Module):
    """The training floor: a bias on layer 0's input is all that trains."""

    def __init__(self, model):
        super().__init__()
        self.model = model.requires_grad_(False)
        self.bias = torch.nn.Parameter(torch.zeros(model.config.hidden_size))

    def forward(self, input_ids, labels):
        return self.model(inputs_embeds=self.model.get_input_embeddings()(input_ids) + self.bias, labels=labels)


def training_variants(size):
    import fastedit as fe
    from peft import IA3Config, LoraConfig, get_peft_model

    red = llama(size)
    fe.patch(red, fe.RED(), freeze=True)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["down_proj"])
    ia3 = IA3Config(target_modules=["down_proj"], feedforward_modules=[])
    return {
        "floor": InputBias(llama(size)),
        "floor again": InputBias(llama(size)),
        "fastedit": red,
        "PEFT LoRA r=8": get_peft_model(llama(size), lora),
        "PEFT (IA)3": get_peft_model(llama(size), ia3),
    }


def training_step(model, batch=4, length=128):
    ids = torch.arange(batch * length).view(batch, length) % 1000
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    model.train()

    def step():
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    return step


WORK = {
    "decode": (decode, inference_variants, "unedited"),
    "prefill 256": (prefill, inference_variants, "unedited"),
    "training step": (training_step, training_variants, "floor"),
}


def measure(size, work, blocks, rounds):
    """{variant: (ratio to the base, median ms)} in this process."""
    make, variants, base = WORK[work]
    if work == "training step":  # a step of the larger model takes a second
        rounds = max(1, rounds // 3)
    medians = interleave({n: make(m) for n, m in variants(size).items()}, blocks=blocks, rounds=rounds)
    return {n: (ratio(medians, n, base)[0], statistics.median(t) * 1e3) for n, t in medians.items()}


def run(out, processes=5, blocks=5, rounds=9, sizes=tuple(SIZES), works=tuple(WORK)):
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "models-cpu.csv"
    rows = {}  # what this run does not measure again stays
    if path.exists():
        for row in csv.DictReader(path.open(newline="")):
            rows.setdefault((row["size"], row["work"]), []).append(row)
    about = {"machine": machine(), "torch": torch.__version__, "commit": commit(), "processes": processes}
    for size in sizes:
        for work in works:
            results = [_in_process(size, work, blocks, rounds) for _ in range(processes)]
            rows[size, work] = []
            for variant in results[0]:
                ratios = [r[variant][0] for r in results]
                half = T95[processes - 1] * statistics.stdev(ratios) / math.sqrt(processes) if processes > 1 else math.inf
                row = {
                    "size": size, "work": work, "variant": variant, "ratio": f"{statistics.median(ratios):.3f}",
                    "ratio_95": f"{half:.3f}", "ms_p50": f"{statistics.median(r[variant][1] for r in results):.3f}",
                }  # fmt: skip
                rows[size, work].append(row | about)
                print(f"{size:6} {work:14} {variant:16} ×{row['ratio']} ± {row['ratio_95']}", flush=True)
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, FIELDS)
                writer.writeheader()
                for key in itertools.product(SIZES, WORK):
                    writer.writerows(rows.get(key, ()))
    return path


def _in_process(size, work, blocks, rounds):
    code = f"import json; from bench import models; print(json.dumps(models.measure({size!r}, {work!r}, {blocks}, {rounds})))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=pathlib.Path(__file__).resolve().parent.parent,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="bench/results")
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--size", choices=SIZES, action="append")
    parser.add_argument("--work", choices=WORK, action="append")
    options = parser.parse_args()
    run(options.out, options.processes, sizes=options.size or tuple(SIZES), works=options.work or tuple(WORK))


if __name__ == "__main__":
    main()
