"""Families whose layers are a chain of residual steps (families/steps.py).

Phi-3, Granite, OLMo 2, Gemma 2 and 3, OPT, BART, Whisper, ViT, ModernBERT. Attributes tell them apart only as a guide:
the proof decides whether a recipe holds.
"""

import torch

from .family import Family, Input, fused_qkv
from .layouts import grouped_queries, thirds
from .llama import BIASES, PLACES, QKV
from .steps import ResidualLayer, Step


def _llama_steps(attn, mlp):
    """Llama's attention and FFN with norms, dropouts and multipliers of their own."""
    return ResidualLayer(
        (Step("self_attn", "attn", attention=True, keyword=True, **attn), Step("mlp", "mlp", **mlp))
    )


PHI3 = Family(
    name="phi3",
    sites=PLACES | fused_qkv("self_attn.qkv_proj", grouped_queries),
    requires=("self_attn.qkv_proj",),
    lacks=("post_feedforward_layernorm",),
    final=("norm",),
    fused=(
        _llama_steps(
            {"before": "input_layernorm", "dropout": "resid_attn_dropout"},
            {"before": "post_attention_layernorm", "dropout": "resid_mlp_dropout"},
        ),
    ),
)

GRANITE = Family(
    name="granite",
    sites=PLACES | QKV,
    requires=("residual_multiplier",),
    final=("norm",),
    biases=BIASES,
    fused=(
        _llama_steps(
            {"before": "input_layernorm", "multiplier": "residual_multiplier"},
            {"before": "post_attention_layernorm", "multiplier": "residual_multiplier"},
        ),
    ),
)

OLMO2 = Family(
    name="olmo2",
    sites=PLACES | QKV,
    requires=("post_feedforward_layernorm",),
    lacks=("pre_feedforward_layernorm",),
    final=("norm",),
    biases={site: BIASES[site] for site in ("q", "k", "v", "attn")},
    fused=(
        _llama_steps({"behind": "post_attention_layernorm"}, {"behind": "post_feedforward_layernorm"}),
    ),
)  # fmt: skip

GEMMA2 = Family(
    name="gemma2",
    sites=PLACES | QKV,
    requires=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    final=("norm",),
    biases={site: BIASES[site] for site in ("q", "k", "v", "attn")},
    fused=(
        _llama_steps(
            {"before": "input_layernorm", "behind": "post_attention_layernorm"},
            {"before": "pre_feedforward_layernorm", "behind": "post_feedforward_layernorm"},
        ),
    ),
)


def _cross_attending(position, **attention):
    """BART's steps, with the norms `before` or `after` them, and a cross-attention if the layer has one."""

    def at(norm):
        return {position: norm, "dropout": "dropout"}

    cross = Step(
        "encoder_attn", attention=True, drops=("attention_mask", "use_cache"), only_with="encoder_hidden_states",
        renamed=(("encoder_hidden_states", "key_value_states"), ("encoder_attention_mask", "attention_mask")),
        **at("encoder_attn_layer_norm"),
    )  # fmt: skip
    first = Step("self_attn", "attn", attention=True, **attention, **at("self_attn_layer_norm"))
    last = Step(("fc1", "activation_fn", "activation_dropout", "fc2"), "mlp", **at("final_layer_norm"))
    return first, cross, last


_OF_CROSS = ("encoder_hidden_states", "encoder_attention_mask", "use_cache")
BART_PLACES = {"mlp": "fc2", "ffn_in": Input("fc2"), "attn": "self_attn.out_proj", "block": "", **QKV}


def _bart_recipes(with_cross):
    """Post-norm (BART) and pre-norm (Whisper, mBART, Pegasus), whose layers hold the same modules."""
    for position in ("after", "before"):
        for keyword in (False, True):
            drops = {"drops": _OF_CROSS} if with_cross else {}
            first, cross, last = _cross_attending(position, keyword=keyword, **drops)
            if with_cross:
                yield ResidualLayer((first, cross, last))
            else:
                yield ResidualLayer((first, last), apart=torch.float16)  # which the encoders clamp


BART_ENCODER = Family(
    name="bart-encoder",
    sites=BART_PLACES,
    requires=("activation_dropout",),
    lacks=("encoder_attn",),
    final=("layer_norm",),
    fused=tuple(_bart_recipes(with_cross=False)),
)
BART_DECODER = Family(
    name="bart-decoder",
    sites=BART_PLACES,
    requires=("encoder_attn", "activation_dropout"),
    final=("layer_norm",),
    fused=tuple(_bart_recipes(with_cross=True)),
)


def _opt_layer(position):
    return ResidualLayer(
        (
            Step("self_attn", "attn", attention=True, keyword=True, drops=("use_cache",), dropout="dropout",
                 **{position: "self_attn_layer_norm"}),
            Step(("fc1", "activation_fn", "fc2"), "mlp", dropout="dropout", **{position: "final_layer_norm"}),
        ),
        flat=True,
    )  # fmt: skip


OPT = Family(
    name="opt",
    sites=BART_PLACES,
    requires=("do_layer_norm_before",),
    lacks=("encoder_attn", "activation_dropout"),
    final=("project_out", "final_layer_norm"),
    fused=(_opt_layer("before"), _opt_layer("after")),
)

VIT = Family(
    name="vit",
    sites={
        "mlp": "mlp.fc2", "ffn_in": Input("mlp.fc2"), "attn": "attention.o_proj", "block": "",
        **{site: f"attention.{site}_proj" for site in "qkv"},
    },
    requires=("layernorm_before", "layernorm_after"),
    final=("layernorm",),
    fused=(
        ResidualLayer(
            (
                Step("attention", "attn", before="layernorm_before", dropout="dropout", attention=True,
                     positional="attention_mask"),
                Step("mlp", "mlp", before="layernorm_after", dropout="dropout"),
            )
        ),
    ),
)  # fmt: skip

MODERNBERT = Family(
    name="modernbert",
    sites={
        "mlp": "mlp.Wo", "ffn_in": Input("mlp.Wo"), "attn": "attn.Wo", "block": "",
        **fused_qkv("attn.Wqkv", thirds),
    },
    requires=("attn_norm", "mlp_norm"),
    final=("final_norm",),
    biases={
        "mlp": ("mlp_bias", ("mlp.Wi", "mlp.Wo")), "ffn_in": ("mlp_bias", ("mlp.Wi", "mlp.Wo")),
        **dict.fromkeys(("q", "k", "v", "attn"), ("attention_bias", ("attn.Wqkv", "attn.Wo"))),
    },
    fused=(
        ResidualLayer(
            (
                Step("attn", "attn", before="attn_norm", dropout="attn.out_drop", attention=True),
                Step("mlp", "mlp", before="mlp_norm"),
            )
        ),
    ),
)  # fmt: skip

FAMILIES = (PHI3, GRANITE, OLMO2, GEMMA2, BART_ENCODER, BART_DECODER, OPT, VIT, MODERNBERT)
