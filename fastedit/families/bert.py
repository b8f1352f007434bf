"""BERT, RoBERTa and the encoders that share their layer. Post-norm: a block edit has no add to ride on."""

from .family import Family, PostNorm

FAMILY = Family(
    name="bert",
    sites={"mlp": "output.dense", "attn": "attention.output.dense", "block": ""},
    fused=tuple(
        PostNorm(owner=owner, site=site, inner="dense", norm="LayerNorm", dropout="dropout")
        for owner, site in (("attention.output", "attn"), ("output", "mlp"))
    ),
)
