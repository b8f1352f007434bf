"""What `verify` runs a model on: requests, each a dictionary of the model's arguments for a batch of one."""

import inspect

import torch

from ..families.own_class import base_of

_ANY_SIZE = 64  # of pictures, for a model that takes all sizes
LENGTHS = (9, 6)  # of two random requests: different, so that batches of them are padded


def takes(model, name):
    """Whether the model's forward has an argument of this name."""
    return name in inspect.signature(base_of(model).forward).parameters


def as_requests(inputs, model):
    """The user's inputs as requests.

    Raises:
        TypeError, ValueError: no requests, or something that is neither token ids nor a dictionary of tensors.
    """
    if not isinstance(inputs, (list, tuple)) or not inputs:
        raise TypeError(f"inputs is {inputs!r:.60}, expected a list of requests: token ids, or dictionaries of arguments")
    found = []
    for request in inputs:
        if isinstance(request, dict) or hasattr(request, "items"):
            request = dict(request)
        else:
            try:
                ids = torch.as_tensor(request)
            except (TypeError, ValueError, RuntimeError):
                raise TypeError(f"a request is {request!r:.60}, expected token ids, or a dictionary of arguments") from None
            if ids.dim() != 1 or ids.is_floating_point() or not len(ids):
                raise ValueError(f"a request has shape {tuple(ids.shape)} and dtype {ids.dtype}, expected token ids (tokens,)")
            request = {"input_ids": ids[None]}
        sizes = {len(t) for t in request.values() if isinstance(t, torch.Tensor)}
        if sizes != {1}:
            raise ValueError(f"a request's tensors have {sorted(sizes)} rows, expected a batch of one in each")
        found.append({k: v.to(_device(model)) if isinstance(v, torch.Tensor) else v for k, v in request.items()})
    return found


def made(model, seed):
    """Two random requests by the model's config: token ids, and for a decoder behind an encoder ids for it; or pictures.

    Raises:
        ValueError: a model that takes neither.
    """
    generator, device = torch.Generator().manual_seed(seed), _device(model)
    if takes(model, "input_ids"):
        words = _vocabulary(model)
        found = [{"input_ids": torch.randint(3, words, (1, n), generator=generator).to(device)} for n in LENGTHS]
        if takes(model, "decoder_input_ids"):
            found = [r | {"decoder_input_ids": r["input_ids"][:, :4].clone()} for r in found]
        return found
    if takes(model, "pixel_values"):
        seeing = getattr(model.config, "vision_config", None) or model.config
        channels, size = getattr(seeing, "num_channels", None), getattr(seeing, "image_size", None) or _ANY_SIZE
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        if isinstance(channels, int) and isinstance(height, int):
            dtype = next(model.parameters()).dtype
            shape = (1, channels, height, width)
            return [{"pixel_values": torch.randn(shape, generator=generator).to(device, dtype)} for _ in LENGTHS]
    raise ValueError(
        f"what to give {type(model).__name__} is not known: give inputs, a list of dictionaries of its arguments, each a batch "
        "of one"
    )


def _vocabulary(model):
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    size = getattr(embedding, "num_embeddings", None) or getattr(getattr(model, "config", None), "vocab_size", None)
    if not isinstance(size, int) or size < 5:
        raise ValueError(f"the size of the vocabulary of {type(model).__name__} was not found: give inputs")
    return min(size, 1000)


def _device(model):
    return next((p.device for p in model.parameters()), torch.device("cpu"))
