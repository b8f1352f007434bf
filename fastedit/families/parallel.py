"""GPT-NeoX (Pythia) and Falcon: attention and FFN beside each other, or one after the other as the config says."""

from .family import Family, Input, fused_qkv
from .layouts import falcon, interleaved
from .steps import ParallelLayer, ResidualLayer, Step

_NORMS = ("input_layernorm", "post_attention_layernorm")
_FFN = {"mlp": "mlp.dense_4h_to_h", "ffn_in": Input("mlp.dense_4h_to_h"), "block": ""}

GPT_NEOX = Family(
    name="gpt_neox",
    sites={**_FFN, "attn": "attention.dense", **fused_qkv("attention.query_key_value", interleaved)},
    final=("final_layer_norm",),
    fused=(
        ParallelLayer(
            norms=_NORMS, inners=("attention", "mlp"), dropouts=("post_attention_dropout", "post_mlp_dropout")
        ),
        ResidualLayer(
            (
                Step("attention", "attn", before=_NORMS[0], dropout="post_attention_dropout", attention=True),
                Step("mlp", "mlp", before=_NORMS[1], dropout="post_mlp_dropout"),
            )
        ),
    ),
)

_GIVEN = (
    "layer_past", "attention_mask", "position_ids", "alibi", "use_cache", "output_attentions", "position_embeddings",
)  # fmt: skip


def _falcon_parallel(*norms):
    return ParallelLayer(
        norms=norms, inners=("self_attention", "mlp"), sum_dropout="hidden_dropout", only=_GIVEN, more=True
    )


FALCON = Family(
    name="falcon",
    sites={**_FFN, "attn": "self_attention.dense", **fused_qkv("self_attention.query_key_value", falcon)},
    final=("ln_f",),
    biases=dict.fromkeys(
        ("mlp", "ffn_in", "attn", "q", "k", "v"),
        ("bias", ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "self_attention.dense", "self_attention.query_key_value")),
    ),
    fused=(
        _falcon_parallel("input_layernorm"),
        _falcon_parallel("ln_attn", "ln_mlp"),
        ResidualLayer(
            (
                Step("self_attention", "attn", before=_NORMS[0], dropout="config.attention_dropout", attention=True,
                     only=_GIVEN),
                Step("mlp", "mlp", before=_NORMS[1], dropout="hidden_dropout"),
            ),
            more=True,
        ),
    ),
)  # fmt: skip
