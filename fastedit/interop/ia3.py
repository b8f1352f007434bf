"""PEFT's (IA)³ (arXiv 2205.05638): a layer around a linear map that scales its outputs.

In the feed-forward it scales the inputs. The scale is the product of the active adapters' vectors.
"""

import functools

from ..edits.form import Form
from .found import IN_MODULE, Found, Refusal, classes, try_wrapper, values
from .switches import ClassSwitch, passing

INNER = "base_layer"


def find(model):
    kinds = classes("peft.tuners.ia3.layer", "IA3Layer")
    return [_found(name, m) for name, m in model.named_modules() if isinstance(m, kinds)]


def _found(path, module):
    switch = ClassSwitch(module, adopted)
    side = "input" if module.is_feedforward else "output"
    found = Found(f"PEFT (IA)3 at {path}", module, IN_MODULE, switch, side)

    def forms():
        switch.check()
        form = Form(scale=_scale(module))
        try_wrapper(module, INNER, (form,), side)
        yield form

    return found.read(forms)


def _scale(module):
    if module.merged:
        raise Refusal("it is merged into the weights: nothing is left to run; unmerge it to have it adopted")
    if module.disable_adapters:
        raise Refusal("it is switched off; enable the adapter to have it adopted")
    active = [name for name in module.active_adapters if name in module.ia3_l]
    if not active:
        raise Refusal(f"none of its adapters {list(module.ia3_l)} is active")
    return functools.reduce(lambda a, b: a * b, [values(module.ia3_l[name], -1) for name in active])


def adopted(own):
    """Members of the layer's class while it is adopted: its call is its base layer's, and what would change it
    raises."""

    def enable_adapters(self, enabled):
        if not enabled:
            _refuse("switched off")

    def refusing(what):
        return lambda self, *args, **kwargs: _refuse(what)

    changes = {"merge": "merged", "unmerge": "unmerged", "set_adapter": "changed", "update_layer": "changed"}
    changes |= {"delete_adapter": "deleted"}
    return {
        **passing(own, INNER), "enable_adapters": enable_adapters,
        **{name: refusing(what) for name, what in changes.items()},
    }  # fmt: skip


def _refuse(what):
    raise RuntimeError(
        f"this (IA)3 layer is adopted by fastedit and cannot be {what} now: handle.remove() first "
        "(handle.strength = 0 switches the adopted edits off)"
    )
