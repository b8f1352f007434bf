"""T5, both stacks. `attn` is the self-attention; cross-attention has no site."""

import torch

from .family import Family, Input, PreNormSublayer

APART = torch.float16  # T5Block clamps it behind each of its parts
WO = "layer.-1.DenseReluDense.wo"

FAMILY = Family(
    name="t5",
    sites={
        "mlp": WO, "ffn_in": Input(WO), "attn": "layer.0.SelfAttention.o", "block": "",
        **{site: f"layer.0.SelfAttention.{site}" for site in "qkv"},
    },
    final=("final_layer_norm",),
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
