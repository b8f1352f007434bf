"""A step of RAHF beside the straightforward loop: whole models, every hidden state, the LM head.

    python -m bench.rahf --out bench/results/rahf-cpu.csv

The straightforward loop holds a model for each role: for SCIT the hindsight model and the student's own copy, three
forwards and one with gradients; for DUAL base, chosen, rejected and student. Both fit the same LoRA on the same Llama,
from the same start, and must give the same loss. Interleaved, medians over blocks, 95 % interval.
"""

import argparse
import copy
import csv
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastedit.methods import rahf
from fastedit.verifying.timing import interleave, ratio

from .machine import about

FIELDS = ("variant", "width", "depth", "batch", "response", "ratio", "interval", "loss apart", "weights", "machine", "torch",
          "commit")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/rahf-cpu.csv"))
    parser.add_argument("--blocks", type=int, default=5)
    options = parser.parse_args()
    with open(options.out, "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for dual in (False, True):
            row = measure(dual, options.blocks)
            writer.writerow(row)
            print(row)


def llama(seed, width=256, depth=16):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=8000, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=depth,
        num_attention_heads=width // 32, num_key_value_heads=width // 32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )).eval()  # fmt: skip


def measure(dual, blocks, width=256, depth=16, batch=2, response=32):
    base, rejected = llama(0, width, depth), llama(1, width, depth)
    layers = rahf.default_layers(depth, dual)
    student = rahf.lora(copy.deepcopy(base), layers, dual=dual, dropout=0.0)
    twin = rahf.lora(copy.deepcopy(base), layers, dual=dual, dropout=0.0)
    twin.load_state_dict(student.state_dict())
    given = inputs(1 if dual else 3, batch, response)
    ours = rahf.Rahf(student, layers, rejected=rejected if dual else None).train()
    models = {"base": copy.deepcopy(base), "good": copy.deepcopy(base), "bad": rejected if dual else copy.deepcopy(base)}
    if not dual:
        models["base"] = models["bad"] = models["good"]

    def step(loss, model):
        for parameter in model.parameters():
            parameter.grad = None
        loss.backward()
        return loss.detach()

    fast = lambda: step(ours(**given)["loss"], student)  # noqa: E731
    slow = lambda: step(straightforward(twin, models, given, layers), twin)  # noqa: E731
    apart = float((fast() - slow()).abs() / slow())
    medians = interleave({"ours": fast, "straightforward": slow}, blocks=blocks, rounds=5, warmup=2)
    value, interval = ratio(medians, "ours", "straightforward")
    resident = (2 if dual else 1) / len({id(m) for m in (*models.values(), twin)})
    return {
        "variant": "DUAL" if dual else "SCIT", "width": width, "depth": depth, "batch": batch, "response": response,
        "ratio": round(value, 3), "interval": round(interval, 3), "loss apart": f"{apart:.1e}", "weights": resident, **about(),
    }  # fmt: skip


def inputs(stimuli, batch, response):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 8000, (stimuli, batch, 2 * response), generator=generator)
    ids[:, :, -response:] = ids[:1, :, -response:]
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "response_mask": torch.ones(batch, response),
    }  # fmt: skip


def straightforward(student, models, given, layers):
    columns = given["response_mask"].shape[1]

    def states(model, stimulus):
        out = model(input_ids=given["input_ids"][stimulus], attention_mask=given["attention_mask"][stimulus],
                    output_hidden_states=True)  # fmt: skip
        return torch.stack([out.hidden_states[layer][:, -columns:] for layer in layers])

    last = len(given["input_ids"]) - 1
    with torch.no_grad():
        base, good, bad = states(models["base"], 0), states(models["good"], min(1, last)), states(models["bad"], last)
        target = base + 5.0 * (good - bad)
    return torch.linalg.vector_norm(states(student, 0) - target, dim=-1).mean()


if __name__ == "__main__":
    main()
