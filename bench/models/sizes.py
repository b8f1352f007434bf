"""The models of the study: random weights from a seed, and copies that share them."""

import copy
from typing import NamedTuple

import torch


class Size(NamedTuple):
    family: str
    width: int
    layers: int
    inner: int
    heads: int


SIZES = {
    "64x5": Size("llama", 64, 5, 172, 8),
    "256x8": Size("llama", 256, 8, 688, 8),
    "512x8": Size("llama", 512, 8, 1376, 8),
    "2048x4": Size("llama", 2048, 4, 5504, 16),
    "bert 512x6": Size("bert", 512, 6, 2048, 8),
}
VOCABULARY = 1000
_STACK = {"llama": "model.layers", "bert": "bert.encoder.layer"}
_MLP = {"llama": "mlp.down_proj", "bert": "output.dense"}


def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype():
    """What such a model runs in on this device."""
    return torch.bfloat16 if device() == "cuda" else torch.float32


def build(size):
    """The base model of a Size: frozen, in eval mode, on this device."""
    torch.manual_seed(0)
    model = _llama(size) if size.family == "llama" else _bert(size)
    return model.to(device(), dtype()).eval().requires_grad_(False)


def _llama(size):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=size.width, intermediate_size=size.inner, num_hidden_layers=size.layers,
            num_attention_heads=size.heads, num_key_value_heads=size.heads, vocab_size=VOCABULARY,
            max_position_embeddings=1024, attn_implementation="sdpa", bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip


def _bert(size):
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            hidden_size=size.width, intermediate_size=size.inner, num_hidden_layers=size.layers,
            num_attention_heads=size.heads, vocab_size=VOCABULARY, max_position_embeddings=512,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="sdpa",
        )
    )  # fmt: skip


def family(model):
    return "llama" if hasattr(model, "model") else "bert"


def blocks(model):
    """The ModuleList of a base model's layers."""
    return model.get_submodule(_STACK[family(model)])


def site(model, layer, name):
    """The module whose output is the site `mlp` or `block` of a layer."""
    return layer if name == "block" else layer.get_submodule(_MLP[family(model)])


def site_path(model, name):
    """The same as a path with a gap for the layer's number."""
    stack = _STACK[family(model)] + ".{}"
    return stack if name == "block" else f"{stack}.{_MLP[family(model)]}"


def sharing(model):
    """A copy with modules of its own and the same weight tensors: neither memory nor cache is paid twice."""
    memo = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def shortened(model, layers):
    """A copy of the first `layers` layers, sharing weights."""
    short = sharing(model)
    del blocks(short)[layers:]
    short.config.num_hidden_layers = layers
    return short
