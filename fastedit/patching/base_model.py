"""What edit.json says about the model that an edit was made on, and whether another model matches it."""

import hashlib
import json
import logging
from pathlib import Path

from ..families import find_layers
from ..files.edit_file import JSON, EditFileError
from .layer_plan import site_width

logger = logging.getLogger("fastedit")
_SHAPE = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "hidden_act", "encoder_layers", "decoder_layers", "num_decoder_layers",
)  # fmt: skip



def describe_base(model, base_model=None, layers=None):
    """What edit.json says about a model: id, type, width, depth and a digest of its shape. No weights.

    layers: the model's, if they are known (families.Layer).
    """
    layers = find_layers(model) if layers is None else layers
    config = getattr(model, "config", None)
    name = (
        base_model or getattr(config, "name_or_path", None) or getattr(config, "_name_or_path", None) or None
    )
    if name is not None and Path(name).exists():
        name = Path(name).resolve().name  # a local path says nothing to others, and too much of this machine
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    shape = {key: value for key in _SHAPE if isinstance(value := getattr(config, key, None), (int, str))}
    return {
        "model": name, "type": shape.get("model_type", type(model).__name__),
        "width": site_width(layers[0].module, layers[0]), "depth": len(layers),
        "shape": hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16],
    }  # fmt: skip


def check_base(folder, saved, found):
    where = folder / JSON
    if not isinstance(saved, dict):
        raise EditFileError(f'{where}: "base" is {saved!r:.40}, expected the model that the edit was made on')
    for key in ("width", "depth"):
        if saved.get(key) != found[key]:
            raise EditFileError(
                f"{where}: the edit was made on a base of {key} {saved.get(key)!r:.60} ({saved.get('model')!r:.80}, "
                f"{saved.get('type')!r:.60}), but this model has {key} {found[key]} ({found['model']}, "
                f"{found['type']}); load the base it was made on"
            )
    what = {"type": "a model of type", "shape": "a base of shape", "model": "the base"}
    for key, words in what.items():
        was, now = saved.get(key), found[key]
        comparable = (
            isinstance(was, str) and now is not None and (key != "model" or ("/" in was and "/" in now))
        )
        if comparable and was != now:
            logger.warning(
                "fastedit: %s was made on %s %r, this model is %r; it fits, but may mean something else here",
                where, words, was, now,
            )  # fmt: skip
            return
