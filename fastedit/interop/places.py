"""Which site of which layer a module's output or input is."""

from ..arguments import MAX_RANK
from ..edits.form import Form
from ..families import Input, Part, PreNormLayer, PreNormSublayer, submodule
from ..patching.layer_plan import site_width, width_at
from .found import Refusal


class Places:
    """at: (side, module) → (layer, its sites there). A fused projection holds several sites: q, k and v."""

    def __init__(self, layers):
        self.at, self.known = {}, []
        for layer in layers:
            self._add_inners(layer)
            for site in layer.sites():
                side = "input" if isinstance(layer.place(site), Input) else "output"
                key = side, layer.at(site)
                here = self.at.get(key, (layer, []))[1] if isinstance(layer.place(site), Part) else []
                self.at[key] = layer, [*here, site]
                self.known += [] if site in self.known else [site]

    def _add_inners(self, layer):
        """The attention and FFN of a layer return what their last linear map does, except for a dropout."""
        for recipe in layer.family.fused:
            if not isinstance(recipe, (PreNormLayer, PreNormSublayer)):
                continue
            owner = submodule(layer.module, recipe.owner)
            for add in recipe.adds():
                inside = isinstance(recipe, PreNormLayer) and add.dropout is not None
                dropout = submodule(owner, add.dropout) if inside else None
                module = submodule(owner, add.inner)
                if module is not None and not (dropout is not None and dropout.p and dropout.training):
                    self.at["output", module] = layer, [add.site]

    def put(self, one):
        """Give `one` its places, if its forms fit.

        Raises:
            Refusal: they do not fit, or what it edits is not a site.
        """
        if (one.side, one.module) not in self.at:
            raise Refusal(f"its {one.side} is not a site of this model, which are {', '.join(map(repr, self.known))}")
        layer, sites = self.at[one.side, one.module]
        if isinstance(layer.place(sites[0]), Part):
            one.places = tuple((layer, site, _part(one, layer, site)) for site in sites)
        else:
            one.places = ((layer, sites[0], one.forms),)
        for layer, site, forms in one.places:
            _check_fit(layer, site, forms)


def _check_fit(layer, site, forms):
    try:
        width = width_at(layer, site)
    except ValueError as error:
        raise Refusal(str(error)) from None
    for form in forms:
        if form.width != width:
            raise Refusal(f"it is {form.width} wide, but site {site!r} of layer {layer.name} is {width} wide")
        if form.rank > MAX_RANK:
            raise Refusal(f"it has rank {form.rank}, but the kernels take up to {MAX_RANK}")


def _part(one, layer, site):
    """The columns of a fused projection's forms that belong to this site."""
    module = layer.at(site)
    total = site_width(module, layer)
    groups, start, stop = layer.place(site).columns(layer.module, total)
    for form in one.forms:
        if form.width != total:
            raise Refusal(f"it is {form.width} wide, but the fused projection of layer {layer.name} is {total} wide")
        if form.rank:
            raise Refusal("a low-rank edit of a whole fused projection mixes q, k and v, which are edited apart")

    def columns(tensor):
        return None if tensor is None else tensor.unflatten(0, (groups, -1))[:, start:stop].flatten()

    return tuple(Form(columns(form.scale), columns(form.bias)) for form in one.forms)
