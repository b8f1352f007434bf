"""Two sites that no linear map's output is, and where a merge goes all the same: a vector at `block` is a bias of the FFN's
last map, where that map's output is added to the stream as it is; an edit at `embed` is one of each row of the table, where
the table's rows enter the first layer as they are.
"""

import torch
from torch import nn

from ..families.own_class import base_of
from . import shape_probe as probe


def map_behind_block(handle, layer, masters):
    """(site whose last map takes a vector at `block` of `layer`, None), or (None, why there is none)."""
    for m in masters:
        form = m.form()
        if form.read is not None or form.write is not None or (form.scale is not None and bool((form.scale != 1).any())):
            return None, (
                "the residual stream is a sum of many maps, none of which the edit alone follows; a vector alone (Steer) "
                "would be a bias of the FFN's last map"
            )
    handle._root.prove([(layer, "block")])
    for recipe in layer.family.fused:
        verdict = handle._root.verdicts.get((layer.name, recipe))
        if verdict is None or verdict.reason is not None:
            continue
        site = next((add.site for add in recipe.adds() if add.ends_block and add.site is not None), None)
        if site is not None:
            return _unless_shared(handle, layer, site)
    return None, (
        f"a vector there is a bias of the FFN's last map only where that map's output is added to the stream as it is, which is "
        f"not proved of {base_of(layer.module).__name__}"
    )


def _unless_shared(handle, layer, site):
    own = {id(m) for _, _, m in handle._each()}
    if any(id(m) not in own for m in handle._root.stack(layer, site)):
        return None, (
            f"it would become part of what another handle's edit or probe at {site!r} of this layer acts on: merge or remove "
            "that handle before this one"
        )
    return site, None


def table_behind_embed(handle, layer):
    """(the embedding whose rows enter `layer` as they are, None), or (None, why there is none)."""
    model = handle.model
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if not isinstance(table, nn.Embedding) or base_of(table).forward is not nn.Embedding.forward:
        found = "nothing" if table is None else type(table).__name__
        return None, f"the model's rows come from {found}, expected a plain nn.Embedding"
    if table.max_norm is not None or table.sparse:
        return None, "its table is changed by its own forward (max_norm), or its gradients are sparse"
    config = getattr(model, "config", None)
    if config is not None and config.get_text_config() is not config:
        return None, "other rows than the table's enter there, too: those of pictures or sound"
    if not _enters(model, table, layer.module):
        return None, (
            "what enters the first layer is not the table's row alone, but a sum of embeddings, or behind a norm or a scale"
        )
    return table, None


def _enters(model, table, first):
    """Whether a forward hands what the table says to the first layer, the same tensor."""
    said, given = [], []

    def enters(module, args, kwargs):
        given.append(args[0] if args else kwargs.get("hidden_states"))

    with probe.bare(model):
        hooks = [table.register_forward_hook(lambda module, args, output: said.append(output))]
        hooks.append(first.register_forward_pre_hook(enters, with_kwargs=True))
        try:
            model(torch.zeros(1, 3, dtype=torch.long, device=table.weight.device))
        except Exception:
            return False
        finally:
            for hook in hooks:
                hook.remove()
    return len(said) == len(given) == 1 and said[0] is given[0]
