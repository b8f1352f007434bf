"""The arguments that all edits take, described once: each kind's docstring is completed with them."""

import inspect

ARGUMENTS = {
    "seed": "of the private generator that draws the start; layers differ.",
    "trainable": "whether the tensors train. Frozen ones stay out of parameters().",
    "site": """"mlp", "attn", "block", "q", "k", "v", "ffn_in", "embed" or "final" (fastedit/edits/sites.py).
        None is "{site}".""",
    "layers": """None for every layer, or layer numbers: an int, a range, a slice, a list. Negative numbers count from the
        end. A model with two stacks is numbered through, encoder first; "decoder" or "decoder.3" also work. "embed"
        and "final" belong to the model: leave layers out, or name a stack. Values in a mapping name their layers.""",
    "positions": """which tokens: None or "all", "prompt", "generated", "first 4", "last 4", "mask", some of them joined by
        " + ", or {"tokens": [ids]} (fastedit/edits/positions.py).""",
    "strength": "c, a finite number. `handle.strength` multiplies it at run time.",
    "keep_norm": "scale each edited row back to its former length: h'·‖h‖/‖h'‖. Such an edit rides on no add.",
}
_VALUES = """
Values are one tensor for all layers, one with a leading layer dimension (as many as the model has layers, or as the edit
names), a mapping from layer number to tensor, or an object with such a mapping as `directions` or `vectors`: floating,
finite, kept as fp32."""
_RAISES = """
Raises:
    TypeError, ValueError: a value of another shape or dtype, or not finite; a site, layer or position that there is not."""


def completed(doc, init, site):
    """A docstring that ends with its own `Args:`, with what `init` takes of the arguments above behind them.

    Another docstring, or None, is returned as it is. site: the kind's default.
    """
    if "Args:" not in (doc or "") or "Raises:" in doc:
        return doc
    taken = inspect.signature(init).parameters
    said = [f"    {name}: {text}" for name, text in ARGUMENTS.items() if name in taken]
    said += [_VALUES] if "values (" in doc else []
    return "\n".join([inspect.cleandoc(doc), *said, _RAISES]).replace("{site}", site)
