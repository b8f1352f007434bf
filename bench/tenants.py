"""A training step of many tenants in one batch beside a step of one tenant at the same batch size.

    python -m bench.tenants                       # width 512, 8 layers, batch 8 × 64, 8 tenants

Interleaved in one process; the ratio's interval is over blocks.
"""

import argparse

import torch

import fastedit as fe
from fastedit.verifying.timing import interleave, ratio

from .models.sizes import SIZES, VOCABULARY, build, sharing

EDITS = {"RED": fe.RED, "LoReFT": lambda: fe.LoReFT(4)}


def step_of(model, handle, tokens, who=None):
    optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-4)

    def forward():
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        return each.mean(1).sum()

    def step():
        if who is None:
            forward().backward()
        else:
            with handle.assign(who):
                forward().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.tenants", description="Many tenants in one step.")
    parser.add_argument("--edit", choices=EDITS, action="append")
    parser.add_argument("--size", choices=SIZES, default="512x8")
    parser.add_argument("--tenants", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    chosen = parser.parse_args()
    base = build(SIZES[chosen.size])
    tokens = torch.randint(0, VOCABULARY, (chosen.tenants, chosen.length), device=base.device)
    for name in chosen.edit or EDITS:
        steps = {}
        for kind, tenants in (("one", None), ("tenants", chosen.tenants), ("one again", None)):
            model = sharing(base)
            handle = fe.patch(model, EDITS[name](), freeze=True, tenants=tenants)
            steps[kind] = step_of(model.train(), handle, tokens, None if tenants is None else list(range(tenants)))
        medians = interleave(steps, blocks=5, rounds=chosen.rounds)
        found, noise = (ratio(medians, kind, "one") for kind in ("tenants", "one again"))
        print(
            f"{name}: {chosen.tenants} tenants {found[0]:.3f} ± {found[1]:.3f} of one tenant's step "
            f"(one tenant again {noise[0]:.3f} ± {noise[1]:.3f})"
        )


if __name__ == "__main__":
    main()
