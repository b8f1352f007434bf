"""Interventions of pyvene and pyreft (arXiv 2403.07809, 2404.03592) on an IntervenableModel or a ReftModel.

They have no place in the model: each call of the IntervenableModel registers its hooks and removes them (and all other
hooks on the model) when it is done. While adopted, such a call is a call of the model that it holds, on which the edits
are.

Where an intervention acts also comes with each call (`unit_locations`). positions="call" follows it: the edits have
positions="mask", and each call sets the mask. Otherwise every position is edited, and calls that ask for others raise.
"""

import contextlib
import sys

import torch

from ..edits.form import Form
from ..patching.model_edits import root_of
from .found import IN_LATE_HOOK, Found, Refusal, bare, classes, try_call, values
from .switches import ClassSwitch

CALL = "call"
FOLLOW = "fe.adopt(model, positions='call') follows each call's"
_SIDES = {"register_forward_hook": "output", "register_forward_pre_hook": "input"}


def find(model, positions=None):
    kinds = classes("pyvene.models.intervenable_base", "BaseModel")
    return [
        found
        for module in model.modules()
        if isinstance(module, kinds)
        for found in _interventions(module, positions)
    ]


def inner_model(model):
    """The model in the one IntervenableModel that is, or is inside, `model`. None if there is none."""
    kinds = classes("pyvene.models.intervenable_base", "BaseModel")
    held = [module for module in model.modules() if isinstance(module, kinds)]
    if len(held) > 1:
        raise ValueError(f"found {len(held)} IntervenableModels in each other, expected one; pass the one that you mean")
    return held[0].model if held else None


def _interventions(owner, positions):
    paths = {module: path for path, module in owner.model.named_modules()}
    switch = ClassSwitch(owner, adopted, positions)
    for key in owner.sorted_keys:
        intervention, hook = owner.interventions[key], owner.intervention_hooks[key]
        module = getattr(hook, "__self__", None)
        side = _SIDES.get(getattr(hook, "__name__", None), "output")
        name = f"{type(intervention).__name__} at {paths.get(module, key)}"
        acts = "mask" if positions == CALL else positions
        found = Found(name, module, IN_LATE_HOOK, switch, side, group=owner, positions=acts)
        yield found.read(lambda: _read(owner, key, intervention, switch, positions))


def _read(owner, key, intervention, switch, positions):
    _check_owner(owner)
    if positions not in (None, "all", CALL):
        raise Refusal(
            f"positions={positions!r} has no counterpart among pyvene's unit_locations; served are 'all' (or None) and "
            f"{CALL!r}, what each call says"
        )
    switch.check()
    if key in owner._intervention_reverse_link:
        raise Refusal("it is linked to another intervention, whose output it takes")
    forms = (_form(intervention),)
    act, dropout = (getattr(intervention, name, None) for name in ("act_fn", "dropout"))
    if dropout is not None and dropout.p and intervention.training:
        raise Refusal(f"its dropout of {dropout.p} is active; call eval() first")
    if act is not None and type(act).__name__ not in ("LinearActivation", "Identity"):
        raise Refusal(f"its act_fn is {type(act).__name__}: the edit is not linear")
    intervene, copied = sys.modules["pyvene.models.modeling_utils"].do_intervention, bare(intervention)
    try_call(lambda rows: intervene(rows, None, copied, None), forms)
    return forms


def _check_owner(owner):
    if not isinstance(owner, classes("pyvene.models.intervenable_base", "IntervenableModel")):
        raise Refusal("it runs on a backend of its own, not in this model")
    if owner.mode != "parallel":
        raise Refusal(f"its model intervenes in {owner.mode} mode, where one intervention's result feeds the next")
    if owner.as_adaptor:
        raise Refusal("as_adaptor=True hands it the module's input, too")


# --- what each kind computes ------------------------------------------------------------------------------------


def _rotation(intervention):
    return values(intervention.rotate_layer.weight).T.contiguous()


def _source(intervention):
    return values(intervention.learned_source.weight), values(intervention.learned_source.bias)


def _loreft(i):
    (source, offset), write = _source(i), _rotation(i)
    return Form(read=source - write, offset=offset, write=write)


def _noreft(i):
    (source, offset), write = _source(i), values(i.proj_layer.weight)
    bias = i.proj_layer.bias
    return Form(read=source - write, offset=offset if bias is None else offset - values(bias), write=write)


def _consreft(i):
    write = _rotation(i)
    return Form(read=-write, offset=values(i.learned_source), write=write)


def _lobireft(i):
    return Form(bias=values(i.learned_source) @ _rotation(i))


def _direft(i):
    (read, offset), write = _source(i), _rotation(i)
    return Form(read=read, offset=offset, write=write)


def _nodireft(i):
    (read, offset), write = _source(i), values(i.proj_layer.weight)
    return Form(read=read, offset=offset, write=write)


def _constant(i):
    constant = i.source_representation
    if constant is None:
        raise Refusal("its source comes with each call; only constant sources are adopted (source_representation)")
    if constant.numel() != constant.shape[-1]:
        raise Refusal(f"its source_representation has shape {tuple(constant.shape)}, expected (width,)")
    return values(constant, -1)


def _addition(i):
    return Form(bias=_constant(i))


def _subtraction(i):
    return Form(bias=-_constant(i))


KINDS = {
    "LoreftIntervention": _loreft, "NoreftIntervention": _noreft, "ConsreftIntervention": _consreft,
    "LobireftIntervention": _lobireft, "DireftIntervention": _direft, "NodireftIntervention": _nodireft,
    "AdditionIntervention": _addition, "SubtractionIntervention": _subtraction,
}  # fmt: skip
_HOMES = ("pyreft.interventions", "pyvene.models.interventions")


def _form(intervention):
    for kind in type(intervention).__mro__:
        if kind.__module__ in _HOMES and kind.__name__ in KINDS:
            return KINDS[kind.__name__](intervention)
    raise Refusal(
        f"its formula is not known; the known ones are {', '.join(n.removesuffix('Intervention') for n in KINDS)}"
    )


# --- the IntervenableModel's calls while it is adopted ------------------------------------------------------------


def adopted(own, positions):
    """Members of the IntervenableModel's class: calls of its edited model, in its own words."""

    def forward(
        self, base, sources=None, unit_locations=None, source_representations=None, subspaces=None, labels=None,
        output_original_output=False, return_dict=None, use_cache=None, intervention_additional_kwargs=None,
    ):  # fmt: skip
        _refuse_others(
            sources=sources, source_representations=source_representations, subspaces=subspaces,
            output_original_output=output_original_output,
            intervention_additional_kwargs=intervention_additional_kwargs,
        )  # fmt: skip
        more = {} if labels is None else {"labels": labels}
        if use_cache is not None and "use_cache" in self.model.config.to_dict():
            more["use_cache"] = use_cache
        with _acting(self.model, unit_locations, base, positions):
            said = self.model(**base, **more)
        if not return_dict:
            return None, said
        output = own.forward.__globals__["IntervenableModelOutput"]
        return output(original_outputs=None, intervened_outputs=said, collected_activations=None)

    def generate(
        self, base, sources=None, unit_locations=None, source_representations=None, intervene_on_prompt=False,
        subspaces=None, output_original_output=False, intervention_additional_kwargs=None, **kwargs,
    ):  # fmt: skip
        _refuse_others(
            sources=sources, source_representations=source_representations, subspaces=subspaces,
            output_original_output=output_original_output,
            intervention_additional_kwargs=intervention_additional_kwargs,
        )  # fmt: skip
        if not intervene_on_prompt:
            _refuse("intervene_on_prompt=False acts on what is generated alone; ask for intervene_on_prompt=True")
        if unit_locations is None and positions == CALL:
            _refuse("generate was given none; positions='all' acts on the prompt and on what is generated")
        if unit_locations is not None and positions != CALL:
            _refuse(f"unit_locations with intervene_on_prompt=True acts on the prompt alone; {FOLLOW}")
        with _acting(self.model, unit_locations, base, positions):
            return None, self.model.generate(**base, **kwargs)

    return {"forward": forward, "generate": generate}


def _refuse_others(**given):
    for name, value in given.items():
        if value is not None and value is not False:
            _refuse(f"{name} was given")


@contextlib.contextmanager
def _acting(model, given, base, positions):
    """Let the edits act where a call says, during that call. A call that cannot be followed raises."""
    rows, length = next(iter(base.values())).shape[:2]
    named = None if given is None else _rows(given, rows, length)
    if positions != CALL:
        if named is not None and not bool(named.all()):
            _refuse(f"unit_locations names some positions and not others; {FOLLOW}")
        yield
        return
    plan = root_of(model).rows
    before, plan.mask = plan.mask, torch.ones(rows, length, dtype=torch.bool) if named is None else named
    try:
        yield
    finally:
        plan.mask = before


def _rows(given, rows, length):
    """unit_locations as a bool (rows, columns), the same for all interventions: one list of positions per row."""
    found = given.get("base", given.get("sources->base"))
    found = found[1] if isinstance(found, tuple) else found
    if isinstance(found, int):
        found = [[[found]] * rows]
    if not (isinstance(found, list) and found and all(isinstance(one, list) and len(one) == rows for one in found)):
        _refuse("unit_locations is not a list of positions for each row and intervention")
    masks = []
    for one in found:
        mask = torch.zeros(rows, length, dtype=torch.bool)
        for row, columns in enumerate(one):
            if not (isinstance(columns, list) and all(isinstance(c, int) and 0 <= c < length for c in columns)):
                _refuse(f"unit_locations has {columns!r} for a row of {length} tokens")
            mask[row, columns] = True
        masks.append(mask)
    if any(not torch.equal(masks[0], other) for other in masks):
        _refuse("unit_locations differs from one intervention to the next")
    return masks[0]


def _refuse(what):
    raise ValueError(
        f"this model's interventions are adopted by fastedit, but {what}; "
        "handle.remove() gives pyvene's own calls back"
    )
