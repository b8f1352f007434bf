"""Llama and the many that share its layer: Mistral, Qwen2, Qwen3, SmolLM …"""

from .family import Family, PreNormLayer

LAYER = PreNormLayer(
    norms=("input_layernorm", "post_attention_layernorm"),
    inners=("self_attn", "mlp"),
    by_keyword=True,
)

FAMILY = Family(
    name="llama",
    sites={"mlp": "mlp.down_proj", "attn": "self_attn.o_proj", "block": ""},
    fused=(LAYER,),
    biases={
        "mlp": ("mlp_bias", ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")),
        "attn": ("attention_bias", tuple(f"self_attn.{p}_proj" for p in "qkvo")),
    },
)
