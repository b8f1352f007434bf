"""T5, both stacks. `attn` is the self-attention; cross-attention has no site."""

import torch

from .family import Family, PreNormSublayer

APART = torch.float16  # T5Block clamps it behind each of its parts

FAMILY = Family(
    name="t5",
    sites={"mlp": "layer.-1.DenseReluDense.wo", "attn": "layer.0.SelfAttention.o", "block": ""},
    fused=(
        PreNormSublayer(
            owner="layer.0", site="attn", norm="layer_norm", inner="SelfAttention", dropout="dropout",
            renamed=(("attention_mask", "mask"),), outputs=3, apart=APART,
        ),
        PreNormSublayer(
            owner="layer.-1", site="mlp", norm="layer_norm", inner="DenseReluDense", dropout="dropout",
            after="layer.-2", block=True, apart=APART,
        ),
    ),
)  # fmt: skip
