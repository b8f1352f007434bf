"""GPT-2."""

from .family import Family, PreNormLayer

FAMILY = Family(
    name="gpt2",
    sites={"mlp": "mlp.c_proj", "attn": "attn.c_proj", "block": ""},
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
)
