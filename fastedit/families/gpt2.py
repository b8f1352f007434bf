"""GPT-2."""

from .family import Family, Input, PreNormLayer, fused_qkv
from .layouts import thirds

FAMILY = Family(
    name="gpt2",
    sites={
        "mlp": "mlp.c_proj", "ffn_in": Input("mlp.c_proj"), "attn": "attn.c_proj", "block": "",
        **fused_qkv("attn.c_attn", thirds),
    },
    final=("ln_f",),
    fused=(
        PreNormLayer(
            norms=("ln_1", "ln_2"),
            inners=("attn", "mlp"),
            by_keyword=False,
            dropouts=("attn.resid_dropout", "mlp.dropout"),
            cross=("encoder_hidden_states", "encoder_attention_mask"),
            without="crossattention",
        ),
    ),
)  # fmt: skip
