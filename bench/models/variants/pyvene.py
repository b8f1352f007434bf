"""pyvene (Wu et al. 2024): interventions on a wrapped model, at every position (`unit_locations=None`).

Its forward takes the model's inputs as one dict, registers its hooks for the call and removes them after it; `Driven`
passes the works' calls on. Steering is its own AdditionIntervention; the other kinds are interventions written as its
documentation shows: sourceless ones, trainable where they are trained.
"""

from torch import nn

from ..registry import KINDS, WORKS, variant
from ..sizes import site_path


class Driven(nn.Module):
    """An IntervenableModel under the calls of a plain one."""

    def __init__(self, intervenable):
        super().__init__()
        self.intervenable = intervenable

    def forward(self, input_ids, labels=None, **inputs):
        return self.intervenable(base={"input_ids": input_ids, **inputs}, labels=labels)[1]

    def generate(self, input_ids, attention_mask, **options):
        base = {"input_ids": input_ids, "attention_mask": attention_mask}
        return self.intervenable.generate(base=base, intervene_on_prompt=True, **options)[1]

    def train(self, mode=True):
        self.intervenable.train(mode)
        return self


def component(model, site, layer):
    """pyvene's name of a site: a path with its numbers in brackets, and `.output`."""
    return site_path(model, site).format(f"[{layer}]").replace(".[", "[") + ".output"


@variant("pyvene", kinds=KINDS, works=WORKS, needs=("pyvene",))
def pyvene(model, values):
    from pyvene import IntervenableModel

    cast = values.to(model.device, model.dtype)
    made = [_intervention(values.kind, form, values.trainable) for form in cast.forms]
    places = [
        {"component": component(model, values.site, layer), "intervention": intervention}
        for layer, intervention in enumerate(made)
    ]
    return Driven(IntervenableModel(places, model=model))


def _intervention(kind, form, trainable):
    import pyvene

    if kind == "steer":
        return pyvene.AdditionIntervention(source_representation=form.bias)

    bases = (pyvene.SourcelessIntervention, *((pyvene.TrainableIntervention,) if trainable else ()))

    class Written(*bases):
        def __init__(self, **tensors):
            super().__init__(keep_last_dim=True)
            for name, tensor in tensors.items():
                self.register_parameter(name, nn.Parameter(tensor.clone(), requires_grad=trainable))
            self.is_source_constant = True  # which TrainableIntervention unsets

    class ScaleBias(Written):
        def forward(self, base, source=None, subspaces=None):
            return self.scale * base + self.bias

    class Ablate(Written):
        def forward(self, base, source=None, subspaces=None):
            return base - (base @ self.direction).unsqueeze(-1) * self.direction

    class LowRank(Written):
        def forward(self, base, source=None, subspaces=None):
            return base + (base @ (self.source - self.write).T + self.offset) @ self.write

    if kind == "red":
        return ScaleBias(scale=form.scale, bias=form.bias)
    if kind == "ablate":
        return Ablate(direction=form.read[0])
    return LowRank(source=form.read + form.write, offset=form.offset, write=form.write)
