"""The places in a model where an edit may act (docs/families.md). Widths differ: `layer_plan.width_at`."""

SITES = {
    "embed": "the hidden states entering the first layer of a stack: embeddings, their norm and dropout behind them",
    "q": "the (self-)attention's query projection's output, before any norm or rotary embedding",
    "k": "its key projection's output; narrower than q where heads share keys",
    "v": "its value projection's output; narrower than q where heads share values",
    "attn": "the (self-)attention output projection's output, before dropout, any post-norm and the residual add",
    "ffn_in": "the last FFN linear's input, as wide as the FFN's inside: (IA)³'s place",
    "mlp": "the last FFN linear's output, before dropout, any post-norm and the residual add; the whole block's "
    "output for a mixture of experts",
    "block": "the residual stream leaving the layer",
    "final": "what the LM head reads: the last stack's output, after its final norm",
}
"""In the order in which a forward pass comes to them; sites of one module are edited in this order."""

MODEL_SITES = ("embed", "final")
"""Of the model and not of a layer: `embed` once per stack, `final` once per model. They are kept with the first
layer and the last, under whose names their tensors are saved."""


def check_site(site):
    if not isinstance(site, str) or site not in SITES:
        known = "; ".join(f"{name!r}: {meaning}" for name, meaning in SITES.items())
        raise ValueError(f"there is no site {site!r:.60}; the sites are {known}")
    return site
