"""RED+ (arXiv 2402.15179, section on where to edit): RED also at the attention's projections."""

from __future__ import annotations

from ..hints import Layers, Site, WhichTokens
from .kinds import RED

SITES: tuple[Site, ...] = ("q", "k", "v", "attn", "mlp")


def REDPlus(
    *, layers: Layers = None, positions: WhichTokens = None, strength: float = 1.0, keep_norm: bool = False,
    trainable: bool = True,
) -> list[RED]:  # fmt: skip
    """The edits of RED+, a list for `fastedit.patch`: trainable scale and bias on q, k, v, attn and mlp.

    10 · width parameters per layer if all sites are as wide as the model (RoBERTa-base 92,160, GPT-2 medium 245,760).
    Fewer if heads share keys and values.

    Args:
        layers, positions, strength, keep_norm, trainable: as of fastedit.RED, the same for each site. For one site use
            RED(site=…).

    Returns:
        One RED for each of the five sites.

    Raises:
        TypeError, ValueError: as RED.
    """
    return [
        RED(site=site, layers=layers, positions=positions, strength=strength, keep_norm=keep_norm, trainable=trainable)
        for site in SITES
    ]
