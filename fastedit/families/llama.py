"""Llama and the many that share its layer: Mistral, Qwen2, Qwen3, Gemma, SmolLM …; Phi-3, whose projections are
fused; Granite, which scales what it adds.
"""

from .family import Family, Input, PreNormLayer, fused_qkv
from .layouts import grouped_queries

LAYER = PreNormLayer(
    norms=("input_layernorm", "post_attention_layernorm"),
    inners=("self_attn", "mlp"),
    by_keyword=True,
)
QKV = {site: f"self_attn.{site}_proj" for site in "qkv"}
PLACES = {"mlp": "mlp.down_proj", "ffn_in": Input("mlp.down_proj"), "attn": "self_attn.o_proj", "block": ""}
OTHERS = ("post_feedforward_layernorm", "residual_multiplier", "self_attn.qkv_proj")  # mark the entries below

_MLP = ("mlp_bias", ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"))
_ATTENTION = ("attention_bias", tuple(f"self_attn.{p}_proj" for p in "qkvo"))
BIASES = {"mlp": _MLP, "ffn_in": _MLP} | dict.fromkeys(("q", "k", "v", "attn"), _ATTENTION)

FAMILY = Family(
    name="llama", sites=PLACES | QKV, fused=(LAYER,), final=("norm",), biases=BIASES, lacks=OTHERS,
)  # fmt: skip
