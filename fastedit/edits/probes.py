"""Probes: read-outs z = h @ vectorsᵀ + offset that come with the forward. No hidden states are kept.

    handle = fastedit.patch(model, fastedit.Probe(vectors))
    model(ids)
    handle.readings[0]        (layers, batch, tokens, probes)
"""

from __future__ import annotations

from typing import Self

from ..hints import Layers, Site, Values
from .gates import Rule
from .kinds import Edit
from .per_layer import PerLayer


class Probe(Edit):
    """z = h @ vectorsᵀ + offset, fp32. h is read at the probe's place in the stack of edits and stays unchanged.

    The layers of one Probe belong to one stack (an encoder's or a decoder's). Without gates, strength and positions.

    Args:
        vectors: values (width,) or (probes, width), up to 64. offset: values (probes,), or None for 0.
    """

    is_probe = True
    allowed_names = ("read", "offset")

    def __init__(
        self, vectors: Values, offset: Values | None = None, *, site: Site | None = None, layers: Layers = None
    ) -> None:
        vectors = PerLayer("vectors", vectors, (1, 2)).map(lambda t: t.reshape(-1, t.shape[-1]))
        self.given, ranks = {"read": vectors}, {len(t) for t in vectors.all()}
        if offset is not None:
            self.given["offset"] = PerLayer("offset", offset, (1,))
            ranks |= {t.shape[-1] for t in self.given["offset"].all()}
        if len(ranks) != 1:
            raise ValueError(f"vectors and offset are of {sorted(ranks)} probes, expected one number throughout")
        layers = vectors.layers if layers is None else layers
        super().__init__(self.given, rank=ranks.pop(), site=site, layers=layers)

    def values(self, spot, width):
        return {name: value.at(spot) for name, value in self.given.items()}

    def when(self, gate: Rule) -> Self:
        """No gate goes with a Probe: raises TypeError."""
        raise TypeError("a Probe changes nothing, so there is nothing for a gate to decide; gate the edits")
