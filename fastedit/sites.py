"""The places in a layer where an edit may act (DESIGN.md 1)."""

SITES = {
    "mlp": "the last FFN linear's output, before dropout, any post-norm and the residual add",
    "attn": "the (self-)attention output projection's output, before dropout and the residual add",
    "block": "the residual stream leaving the layer",
}


def check_site(site):
    if site not in SITES:
        known = "; ".join(f"{name!r}: {meaning}" for name, meaning in SITES.items())
        raise ValueError(f"there is no site {site!r}; the sites are {known}")
    return site
