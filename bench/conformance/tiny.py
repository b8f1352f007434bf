"""Tiny random models of any class of transformers: its default config, each size in it shrunk by its name."""

import dataclasses
import re

import torch
from transformers import PreTrainedConfig

from .overrides import LAYERS, OVERRIDES

WIDTH, INNER, HEADS, KEYS, HEAD, VOCABULARY = 32, 48, 4, 2, 8, 64

# The first pattern that fits the whole of a size's name says how large it becomes; a size never grows.
SIZES = (
    (r"vocab_size|text_vocab_size|vocab_size_.*|.*_vocab_size|num_embeddings|codebook_size", VOCABULARY),
    (r"(.*_)?hidden_size|d_model|n_embd|(.*_)?embed_dim|dim|embedding_size|emb_dim|hidden_dim|model_dim|(.*_)?embedding_dim"
     r"|word_embed_proj_dim|input_hidden_size|hidden_sizes?|out_hidden_size|projection_dim|text_dim|d_embed", WIDTH),
    (r"num_hidden_layers|n_layers?|(encoder|decoder|num_encoder|num_decoder)_layers|num_layers|depth|num_decoder_layers"
     r"|.*_num_hidden_layers", LAYERS),
    (r"num_key_value_heads|.*num_key_value_heads|num_kv_heads|n_head_kv|num_key_value_groups", KEYS),
    (r"(.*_)?num_attention_heads|n_heads?|num_heads|(encoder|decoder)_attention_heads|.*num_heads|.*_heads", HEADS),
    (r"head_dim|.*_head_dim|d_kv|attention_head_dim|.*head_size|kv_channels|head_size", HEAD),
    (r".*intermediate_size|d_ff|ffn_dim|(encoder|decoder)_ffn_dim|n_inner|.*ffn_hidden_size|inner_dim|ffn_dim|mlp_dim"
     r"|.*ffn_size|inner_size|.*intermediate_dim|mlp_hidden_size|ffn_intermediate_size", INNER),
    (r"n_routed_experts|num_local_experts|num_experts|moe_num_experts|n_experts|num_routed_experts", 4),
    (r"(.*_)?index_topk", 32),  # of scores behind a ReLU many are 0: a choice among equals would differ from mode to mode
    (r".*num_experts_per_tok|moe_k|moe_topk|num_selected_experts|.*top_?k", 2),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank|.*lora_dim|.*_lora_rank|.*low_rank_dim|lora_rank", 16),
    (r"qk_nope_head_dim|qk_rope_head_dim|v_head_dim", HEAD),
    (r"max_position_embeddings|n_positions|n_ctx|max_sequence_length|max_target_positions|seq_length", 128),
    (r"rotary_dim|rotary_ndims", 4),
    (r"(ssm_)?state_size|mamba_d_state|mamba_state_dim|ssm_state_size", 8),
    (r"mamba_chunk_size|chunk_size", 8),
    (r"sliding_window|attention_window_size|local_window_size|window_size|attention_chunk_size", 8),
    (r"image_size", 16), (r"patch_size|spatial_patch_size", 4), (r"num_mel_bins", 8), (r"max_source_positions", 10),
)  # fmt: skip


def kwargs_of(config, path=""):
    """What the class of `config` is to be called with for the same model, tiny."""
    changes = {}
    layers = None
    for name in _fields(type(config)):
        value = _read(config, name)
        if isinstance(value, PreTrainedConfig):
            changes[name] = kwargs_of(value, f"{path}.{name}") | {"model_type": value.model_type}
        elif isinstance(value, bool) or value is None:
            continue
        elif isinstance(value, int):
            small = _small(name, value)
            if small is not None:
                changes[name] = small
                layers = small if re.fullmatch(r"num_hidden_layers|n_layers?|num_layers", name) else layers
        elif isinstance(value, (list, tuple)) and len(value) and isinstance(value[0], str) and "layer" in name:
            changes[name] = value
    for name, value in list(changes.items()):
        if isinstance(value, (list, tuple)):
            changes[name] = _sample(list(value), layers or LAYERS)
    if _read(config, "kv_lora_rank"):  # latent attention has a key for every head
        changes["num_key_value_heads"] = HEADS
    for name, size in (("head_dim", HEAD), ("num_key_value_heads", HEADS)):
        if name in _fields(type(config)) and _read(config, name) is None:
            changes[name] = size
    for kind in type(config).__mro__:
        if kind.__name__ in OVERRIDES:
            for name, value in OVERRIDES[kind.__name__].items():
                if isinstance(value, dict) and isinstance(changes.get(name), dict):
                    changes[name] = changes[name] | value
                elif value is None and name in changes and name not in _fields(kind):
                    del changes[name]
                else:
                    changes[name] = value
            break
    return changes


def _fields(kind):
    if dataclasses.is_dataclass(kind):
        return [f.name for f in dataclasses.fields(kind) if f.init]
    return []


def _read(config, name):
    """An attribute, also one that the layers have each for themselves."""
    try:
        return getattr(config, name, None)
    except Exception:
        return config.__dict__.get(name)


def _small(name, value):
    if name.endswith("_token_id") or name.endswith("_token_index"):
        return min(value, VOCABULARY - 1) if value is not None and value >= VOCABULARY else None
    for pattern, size in SIZES:
        if re.fullmatch(pattern, name):
            return min(value, size) if value > 0 else None
    return None


def _sample(kinds, number):
    """`number` of a list's members, each kind among them where there is room, in the order in which they come."""
    first = sorted({kinds.index(kind) for kind in kinds})[:number]
    rest = [n for n in range(len(kinds)) if n not in first]
    return [kinds[n] for n in sorted(first + rest[: number - len(first)])]


def tiny_config(config_class, **more):
    default = config_class()
    config = config_class(**kwargs_of(default) | more)
    for part in _parts(config):
        part._attn_implementation = "eager"
        part._experts_implementation = "eager"
        for name in ("pad", "bos", "eos"):
            if getattr(part, f"{name}_token_id", None) is not None:
                setattr(part, f"{name}_token_id", {"pad": 0, "bos": 1, "eos": 2}[name])
    return config


def _parts(config):
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


def build(model_class, seed=0):
    """A random model in eval mode, float32, every part of which matters."""
    torch.manual_seed(seed)
    config_class = model_class.config_class
    writes = re.search("ForCausalLM|LMHeadModel|Decoder$", model_class.__name__) and "is_decoder" in _fields(config_class)
    config = tiny_config(config_class, **({"is_decoder": True} if writes else {}))
    model = model_class(config).eval()
    if getattr(config, "is_encoder_decoder", False) and model.generation_config.decoder_start_token_id is None:
        model.generation_config.decoder_start_token_id = 0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                noise = torch.randn_like(parameter)
                if parameter.dim() > 1:
                    parameter.copy_(noise * (0.7 / max(parameter.shape[-1], 1) ** 0.5))
                else:
                    parameter.add_(noise * 0.1)
    return model
