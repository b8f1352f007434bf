"""RED+ (arXiv 2402.15179, section on where to edit): RED also at the attention's projections."""

from .kinds import RED

SITES = ("q", "k", "v", "attn", "mlp")


def REDPlus(**where):
    """The edits of RED+, a list for `fastedit.patch`: trainable scale and bias on q, k, v, attn and mlp.

    10 · width parameters per layer if all sites are as wide as the model (RoBERTa-base 92,160, GPT-2 medium 245,760).
    Fewer if heads share keys and values.

    Args:
        where: layers=, positions= and strength=, as every edit takes them.
    """
    if "site" in where:
        raise TypeError(f"REDPlus acts on {', '.join(SITES)}; for one site use RED(site={where['site']!r})")
    return [RED(site=site, **where) for site in SITES]
