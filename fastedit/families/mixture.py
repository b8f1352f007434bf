"""Mixtures of experts in Llama's layer (Mixtral, Qwen-MoE …): `mlp` is the whole expert block's output."""

from .family import Family
from .llama import LAYER

FAMILY = Family(
    name="mixture",
    sites={"mlp": "mlp", "attn": "self_attn.o_proj", "block": ""},
    requires=("mlp.experts",),
    fused=(LAYER,),
)
