"""pyreft (Wu et al. 2024): LoReFT and NoReFT at every block's output and every position (`unit_locations=None`).

Both are h + (W h + c − R h) R; LoReFT keeps R's rows orthonormal, by a parametrization that it computes anew whenever
the weight is read. The study's R is orthonormal, so that one set of values serves both.
"""

import torch

from ..registry import WORKS, variant
from .pyvene import Driven, component

OPTIONS = {"kinds": ("lowrank4",), "works": WORKS, "needs": ("pyreft", "pyvene")}


@variant("pyreft LoReFT", **OPTIONS)
def loreft(model, values):
    def read_with(intervention, write):
        intervention.rotate_layer.weight = write.T

    return _reft(model, values, "LoreftIntervention", read_with)


@variant("pyreft NoReFT", **OPTIONS)
def noreft(model, values):
    def read_with(intervention, write):
        intervention.proj_layer.weight.copy_(write)

    return _reft(model, values, "NoreftIntervention", read_with, add_bias=False)


def _reft(model, values, kind, read_with, **options):
    import pyreft

    kind = getattr(pyreft, kind)
    rank, width = values.forms[0].write.shape
    options |= {"embed_dim": width, "low_rank_dimension": rank, "dtype": model.dtype}
    made = [kind(**options) for _ in values.forms]
    places = [
        {"component": component(model, values.site, layer), "low_rank_dimension": rank, "intervention": one}
        for layer, one in enumerate(made)
    ]
    reft = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=places))
    with torch.no_grad():
        for one, form, source in zip(made, values.forms, values.sources(), strict=True):
            read_with(one, form.write)
            one.learned_source.weight.copy_(source)
            one.learned_source.bias.copy_(form.offset)
    return Driven(reft)
