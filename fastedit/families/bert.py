"""BERT, RoBERTa, DeBERTa and the encoders that share their layer. Post-norm: a block edit has no add to ride on."""

from .family import Family, Input, PostNorm, fused_qkv
from .layouts import interleaved

PLACES = {
    "mlp": "output.dense", "ffn_in": Input("output.dense"), "attn": "attention.output.dense", "block": "",
}  # fmt: skip
POST_NORM = {"block": "the layer ends in a norm: there is no add for the edit to ride on"}
RECIPES = tuple(
    PostNorm(owner=owner, site=site, inner="dense", norm="LayerNorm", dropout="dropout")
    for owner, site in (("attention.output", "attn"), ("output", "mlp"))
)


def _entry(name, projections, **rules):
    return Family(name=name, sites={**PLACES, **projections}, fused=RECIPES, plain=POST_NORM, **rules)


FAMILY = _entry(
    "bert",
    {"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value"},
    requires=("attention.self.query",),
)
DEBERTA = _entry(  # q and v before the biases that DeBERTa keeps apart from its fused projection
    "deberta", fused_qkv("attention.self.in_proj", interleaved), requires=("attention.self.in_proj",)
)
DEBERTA_V2 = _entry(
    "deberta-v2",
    {site: f"attention.self.{name}_proj" for site, name in (("q", "query"), ("k", "key"), ("v", "value"))},
    requires=("attention.self.query_proj",),
)
