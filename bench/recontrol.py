"""A whole decode step under RE-Control beside the same step without, and beside the loop by autograd in a plain hook.

    python -m bench.recontrol [--rows 1 8] [--width 512] [--units 4096] [--steps 30]

Llamas of random weights with a filled cache; the variants take turns on copies of one model, and the tokens of control
and of the loop must agree. Writes recontrol-<device>.csv; `ratio` is of the uncontrolled step, the bar is 1.5.
"""

import copy

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import fastedit as fe
from fastedit.methods import recontrol
from fastedit.verifying.timing import interleave, ratio

from . import by_rows
from .value_ascent import autograd_loop

FIELDS = (
    "op", "variant", "rows", "width", "depth", "vocabulary", "units", "steps", "step_size", "context", "us_p20", "us_p50",
    "us_p80", "ratio", "interval", "machine", "torch", "commit",
)  # fmt: skip


def llama(options, device):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocabulary, hidden_size=options.width, intermediate_size=options.width * 11 // 4,
        num_hidden_layers=options.depth, num_attention_heads=options.width // 64, num_key_value_heads=options.width // 64,
        max_position_embeddings=options.context + 8,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(device)


def looped(model, net, steps, step_size):
    """The model with the ascent by autograd, in a forward hook on the last norm."""

    def hook(module, args, hidden):
        with torch.enable_grad():
            moved = autograd_loop(hidden[:, -1:].detach(), net, steps, step_size)
        return torch.cat([hidden[:, :-1], moved], 1)

    model.model.norm.register_forward_hook(hook)
    return model


def decoding(model, context):
    """A function that runs one step on a cache of `context` tokens, which it leaves as it was; returns the logits."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(context, past_key_values=cache)
    token = context[:, -1:]

    @torch.no_grad()
    def step():
        logits = model(token, past_key_values=cache).logits
        cache.crop(-1)
        return logits

    return step


def measure(rows, options, device):
    base = llama(options, device)
    net = fe.ValueNet(options.width, options.units, device=device).requires_grad_(False)
    context = torch.randint(options.vocabulary, (rows, options.context), generator=torch.Generator().manual_seed(1))
    models = {"without": base, "control": copy.deepcopy(base), "autograd loop": copy.deepcopy(base)}
    fe.patch(models["control"], recontrol.Control(net, options.step_size, options.steps))
    looped(models["autograd loop"], net, options.steps, options.step_size)
    variants = {name: decoding(model, context.to(device)) for name, model in models.items()}
    chosen = {name: step()[:, -1].argmax(-1) for name, step in variants.items()}
    assert torch.equal(chosen["control"], chosen["autograd loop"]), "control and the loop chose other tokens"
    medians = interleave(variants, blocks=options.blocks, rounds=options.rounds, warmup=2)
    for name, times in medians.items():
        share, half = ratio(medians, name, "without")
        yield {
            "op": "recontrol step", "variant": name, "rows": rows, "width": options.width, "depth": options.depth,
            "vocabulary": options.vocabulary, "units": options.units, "steps": options.steps,
            "step_size": options.step_size, "context": options.context, **by_rows.microseconds(times),
            "ratio": f"{share:.3f}", "interval": f"{half:.3f}",
        }  # fmt: skip


def main():
    parser = by_rows.parser(__doc__, rounds=7)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--context", type=int, default=128, help="tokens in the cache")
    parser.add_argument("--units", type=int, default=4096)
    line = lambda row: f"{row['ratio']:>7} ± {row['interval']}"  # noqa: E731
    by_rows.write("recontrol", FIELDS, parser.parse_args(), measure, line)


if __name__ == "__main__":
    main()
