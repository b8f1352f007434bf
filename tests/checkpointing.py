"""Counts how often each attention runs in one training step of a patched model; also a program, for other
versions of transformers: `python checkpointing.py` prints JSON.
"""

import json

import tiny_models as tiny
import torch
import transformers

import fastedit as fe


def attention_of(family, layer):
    return {"llama": "self_attn", "gpt2": "attn", "bert": "attention", "roberta": "attention"}.get(
        family
    ) or "layer.0"


def layers_of(model, family):
    return [tiny.site_module(model, family, "block", n) for n in range(tiny.number_of_layers(family))]


def step(family, reentrant, fused=True):
    """(calls of each layer's attention, {name: gradient}, paths) of one step; reentrant None: no
    checkpointing.
    """
    model = tiny.build(family).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout_prob"):
            if hasattr(module, name):
                setattr(module, name, 0.0)
    handle = fe.patch(model, [fe.RED(), fe.ScaleBias(site="block")], fused=fused)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.1)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    calls = [0] * tiny.number_of_layers(family)
    for number, layer in enumerate(layers_of(model, family)):

        def count(module, args, number=number):
            calls[number] += 1

        layer.get_submodule(attention_of(family, layer)).register_forward_pre_hook(count)
    model(**tiny.inputs(family), use_cache=False).logits.square().sum().backward()
    paths = {row["site"]: row["path"] for row in handle.report().rows}
    return calls, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, paths


def survey():
    found = {"version": transformers.__version__}
    for family in tiny.FAMILIES:
        for fused in (True, False):
            _, plain, paths = step(family, None, fused)
            for reentrant in (True, False):
                calls, grads, _ = step(family, reentrant, fused)
                apart = max(
                    float((grads[n] - g).abs().max() / g.abs().max()) for n, g in plain.items() if g.any()
                )
                found[f"{family}, fused {fused}, reentrant {reentrant}"] = {
                    "calls": calls,
                    "apart": apart,
                    "paths": paths,
                }
    return found


if __name__ == "__main__":
    print(json.dumps(survey()))
