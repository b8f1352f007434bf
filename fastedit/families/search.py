"""Which of a model's lists of modules are its stacks of layers, and how wide their residual stream is."""

from torch import nn

_WIDTHS = ("hidden_size", "d_model", "n_embd", "embed_dim", "dim")  # a config's names for the stream's width
_SIDES = ("encoder", "decoder")
_SHARE = 3  # without other signs, a list that holds a third of the largest one's parameters might be meant as well


def stacks_of(model, family_of):
    """[(stack name, path of the list)]: "layers" alone, or "encoder" and "decoder".

    A list inside another list's members is no stack (experts, the blocks of a stage). Members may be of several
    classes, as in hybrids: it is enough that one is known to be a layer.

    Args:
        family_of: a layer's entry in the families' table, or None.

    Raises:
        ValueError: no list of layers was found, or several could be meant.
    """
    lists = _outermost(model)
    marked = _marks(model)
    known = {p: m for p, m in lists.items() if any(family_of(x) is not None or marked(x) for x in m)}
    found = list(known or _largest(lists))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no layers to patch: looked for a ModuleList whose members hold the modules of a "
            "family in fastedit/families, or that checkpointing or sharding takes for layers, then for any ModuleList of "
            f"modules with parameters; found {_described(model)}"
        )
    return _named(model, found)


def stream_width(model, path):
    """Width of the residual stream of the stack at `path` by the config nearest around it; None if none says."""
    for config in _configs_around(model, path):
        for part in _parts(config, path):
            for name in _WIDTHS:
                width = _read(part, name)
                if isinstance(width, int) and not isinstance(width, bool):
                    return width
    return None


def _configs_around(model, path):
    """The configs of the modules that hold what is at `path`, the nearest first."""
    found = (getattr(module, "config", None) for module in _around(model, path))
    return [config for config in found if config is not None]


def embedding_width(model, path):
    """How wide the nearest module around the stack at `path` that says so embeds its tokens; None if none says."""
    for module in _around(model, path):
        try:
            table = module.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            continue
        width = getattr(table, "embedding_dim", None)
        if isinstance(width, int):
            return width
    return None


def _around(model, path):
    """The modules that hold what is at `path`, the nearest first."""
    around, module = [model], model
    for part in path.split(".")[:-1] if path else ():
        module = module._modules[part]
        around.append(module)
    return around[::-1]


def _parts(config, path):
    """The config. If there are two sides, the part of the config that describes the side at `path` comes first."""
    side = next((p for p in reversed(path.split(".")) if p in _SIDES), None)
    if side:
        part = _read(config, side)
        return [config] if part is None or isinstance(part, (int, str)) else [part, config]
    text = getattr(config, "get_text_config", None)
    return [config] if text is None else [config, text()]


def _read(config, name):
    try:
        return getattr(config, name, None)
    except Exception:  # a config whose layers differ refuses to name one number for all of them
        return None


def _outermost(model):
    """{path: list} of the ModuleLists of composed modules with parameters, without those inside another's members."""
    found, seen = {}, set()
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module) or any(path.startswith(f"{p}.") for p in found):
            continue
        if id(module) in seen or not all(any(True for _ in m.children()) for m in module):
            continue
        if any(type(m).forward is nn.Module.forward for m in module):  # a list of lists: what is never called is no layer
            continue
        if any(True for _ in module.parameters()):
            found[path] = module
            seen.add(id(module))
    return found


def _marks(model):
    """A function: whether transformers treats a module as a layer, by its class, when it checkpoints or shards."""
    names = set()
    for module in model.modules():
        names |= set(getattr(module, "_no_split_modules", None) or ())

    def marked(module):
        return type(module).__name__ in names or hasattr(type(module), "gradient_checkpointing")

    return marked


def _largest(lists):
    """The list with the most parameters, and the lists that might be meant as well."""
    size = {path: sum(p.numel() for p in module.parameters()) for path, module in lists.items()}
    top = max(size.values(), default=0)
    return [path for path, n in size.items() if top and n * _SHARE >= top]


def _named(model, found):
    if len(found) == 1:
        return [("layers", found[0])]
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", config is None):
        sides = {}
        for path in found:
            side = [side for part in path.split(".") for side in _SIDES if part == side or part.endswith(f"_{side}")]
            sides.setdefault(side[-1] if side else None, []).append(path)
        if set(sides) == set(_SIDES) and all(len(paths) == 1 for paths in sides.values()):
            return [(side, sides[side][0]) for side in _SIDES]
    inside = _of_text(model, found)
    if len(inside) == 1:
        return [("layers", inside[0])]
    raise ValueError(
        f"found {len(found)} stacks of layers ({', '.join(found)}), expected one, or an encoder and a decoder; patch the "
        f"submodule that holds the one you mean, such as model.get_submodule({found[0].rpartition('.')[0]!r}): the whole "
        "model runs with its edits"
    )


def _of_text(model, found):
    """Of a model that reads images or sound beside text, and says which part writes the text, the stacks in that part; where
    all of the model is that part, those that have the model's own config around them, as others have one for pictures."""
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    if config is None or not hasattr(model, "get_decoder") or not model.can_generate():
        return []
    if text is config:
        return [p for p in found if type(_configs_around(model, p)[0]) is type(config)]
    writes = model.get_decoder()
    path = next((p for p, m in model.named_modules() if m is writes), "")
    return [p for p in found if path and p.startswith(f"{path}.")]


def _described(model):
    lists = [f"{p or 'the model'} ({len(m)} × {type(m[0]).__name__})" for p, m in model.named_modules()
             if isinstance(m, nn.ModuleList) and len(m)]  # fmt: skip
    return ", ".join(lists[:4]) or "no ModuleList at all"
