"""Mixtures of experts in Llama's layer (Mixtral, Qwen-MoE …). `mlp` is the output of the whole expert block; `ffn_in`
does not exist."""

from .family import Family
from .llama import BIASES, LAYER, OTHERS, QKV

FAMILY = Family(
    name="mixture",
    sites={"mlp": "mlp", "attn": "self_attn.o_proj", "block": "", **QKV},
    requires=("mlp.experts",),
    lacks=OTHERS,
    fused=(LAYER,),
    final=("norm",),
    biases={site: BIASES[site] for site in ("q", "k", "v", "attn")},
)
