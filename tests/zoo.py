"""Tiny random models of every family, with the places of their sites written out: the families table is checked
against something else than itself.
"""

import copy

import torch
import transformers

from fastedit.edits.form import Form

WIDTH, INNER, HEADS, KEYS = 32, 48, 4, 2
_TOKENS = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SHAPE = {
    "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
}  # fmt: skip
_SHARED = {"num_key_value_heads": KEYS}
_GEMMA = _SHARED | {"head_dim": 12, "layer_types": ["sliding_attention", "full_attention"]}
_MOE = _SHARED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
_BART = {
    "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS, "encoder_ffn_dim": INNER, "decoder_ffn_dim": INNER,
    "decoder_start_token_id": 1, "max_position_embeddings": 64,
}  # fmt: skip
_FALCON = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS, "ffn_hidden_size": INNER}
_GPT2 = {"n_embd": WIDTH, "n_layer": 2, "n_head": HEADS, "n_positions": 64, "n_inner": INNER}
_T5 = {
    "d_model": WIDTH, "d_kv": 8, "d_ff": INNER, "num_layers": 2, "num_decoder_layers": 2, "num_heads": HEADS,
    "decoder_start_token_id": 0,
}  # fmt: skip
_WHISPER = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 16, "suppress_tokens": None}
_DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}
_VIT = {"image_size": 8, "patch_size": 4, "num_channels": 1}
_NO_TOKENS = dict.fromkeys(_TOKENS)

_L = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "attn": "self_attn.o_proj",
      "mlp": "mlp.down_proj"}  # fmt: skip
_B = {"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
      "attn": "attention.output.dense", "mlp": "output.dense"}  # fmt: skip
_O = _L | {"attn": "self_attn.out_proj", "mlp": "fc2"}


def _fused(name, **other):
    return {"q": name, "k": name, "v": name, **other}


_PHI3 = _L | _fused("self_attn.qkv_proj")
_NEOX = _fused("attention.query_key_value", attn="attention.dense", mlp="mlp.dense_4h_to_h")
_F = _fused("self_attention.query_key_value", attn="self_attention.dense", mlp="mlp.dense_4h_to_h")
_G = _fused("attn.c_attn", attn="attn.c_proj", mlp="mlp.c_proj")
_T = {"q": "layer.0.SelfAttention.q", "k": "layer.0.SelfAttention.k", "v": "layer.0.SelfAttention.v",
      "attn": "layer.0.SelfAttention.o", "mlp": "layer.-1.DenseReluDense.wo"}  # fmt: skip
_V = {"q": "attention.q_proj", "k": "attention.k_proj", "v": "attention.v_proj", "attn": "attention.o_proj",
      "mlp": "mlp.fc2"}  # fmt: skip
_MODERN = _fused("attn.Wqkv", attn="attn.Wo", mlp="mlp.Wo")
_D = _B | _fused("attention.self.in_proj")
_D2 = _B | {site: f"attention.self.{name}_proj" for site, name in (("q", "query"), ("k", "key"), ("v", "value"))}

_HEAD = WIDTH // HEADS


def _blocks(sizes):
    """Columns of q, k and v that lie behind each other."""
    edges = [0, sizes[0], sizes[0] + sizes[1], sum(sizes)]
    return {site: list(range(edges[n], edges[n + 1])) for n, site in enumerate("qkv")}


def _heads(groups, *heads):
    """Columns of q, k and v, `heads` of each in every group."""
    found, at = {"q": [], "k": [], "v": []}, 0
    for _ in range(groups):
        for site, number in zip("qkv", heads, strict=True):
            found[site] += range(at, at + number * _HEAD)
            at += number * _HEAD
    return found


_EQUAL = _blocks([WIDTH] * 3)
_EVERY = frozenset(("mlp", "attn", "block"))


class Case:
    """name → model class, config changes, stacks (paths of the layer lists), places, final module's path.

    columns: of q, k and v in a fused projection. fused: the sites of a layer that an add carries.
    """

    def __init__(self, kind, changes, stacks, places, final, columns=None, fused=_EVERY, decoder=False):
        self.kind, self.changes, self.places, self.final = kind, changes, places, final
        self.stacks = stacks.split() if isinstance(stacks, str) else stacks
        self.columns, self.fused, self.decoder = columns, frozenset(fused), decoder


_BASE, _NONE = "model.layers", ()
_POST = ("mlp", "attn")
CASES = {
    "llama": Case("LlamaForCausalLM", _SHARED, _BASE, _L, "model.norm"),
    "mistral": Case("MistralForCausalLM", _SHARED, _BASE, _L, "model.norm"),
    "qwen2": Case("Qwen2ForCausalLM", _SHARED, _BASE, _L, "model.norm"),
    "qwen3": Case("Qwen3ForCausalLM", _SHARED | {"head_dim": 12}, _BASE, _L, "model.norm"),
    "phi3": Case("Phi3ForCausalLM", _SHARED, _BASE, _PHI3, "model.norm", _blocks([32, 16, 16])),
    "granite": Case("GraniteForCausalLM", _SHARED | {"residual_multiplier": 0.3}, _BASE, _L, "model.norm", fused=("block",)),
    "olmo2": Case("Olmo2ForCausalLM", _SHARED, _BASE, _L, "model.norm", fused=("block",)),
    "gemma": Case("GemmaForCausalLM", _SHARED | {"head_dim": 12}, _BASE, _L, "model.norm"),
    "gemma2": Case("Gemma2ForCausalLM", _GEMMA, _BASE, _L, "model.norm", fused=("block",)),
    "gemma3": Case("Gemma3ForCausalLM", _GEMMA, _BASE, _L, "model.norm", fused=("block",)),
    "gpt_neox": Case("GPTNeoXForCausalLM", {}, "gpt_neox.layers", _NEOX, "gpt_neox.final_layer_norm", _heads(4, 1, 1, 1)),
    "gpt_neox-sequential": Case(
        "GPTNeoXForCausalLM", {"use_parallel_residual": False}, "gpt_neox.layers", _NEOX, "gpt_neox.final_layer_norm",
        _heads(4, 1, 1, 1),
    ),
    "falcon": Case("FalconForCausalLM", _FALCON, "transformer.h", _F, "transformer.ln_f", _heads(1, 4, 1, 1)),
    "falcon-40b": Case(
        "FalconForCausalLM", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}, "transformer.h", _F,
        "transformer.ln_f", _heads(2, 2, 1, 1),
    ),
    "falcon-rw": Case(
        "FalconForCausalLM", _FALCON | {"parallel_attn": False, "multi_query": False, "alibi": True, "bias": True},
        "transformer.h", _F, "transformer.ln_f", _heads(4, 1, 1, 1),
    ),
    "opt": Case(
        "OPTForCausalLM", {"ffn_dim": INNER, "word_embed_proj_dim": 32}, "model.decoder.layers", _O,
        "model.decoder.final_layer_norm",
    ),
    "opt-350m": Case(
        "OPTForCausalLM", {"ffn_dim": INNER, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
        "model.decoder.layers", _O, "model.decoder.project_out", fused=_POST,
    ),
    "gpt2": Case("GPT2LMHeadModel", _GPT2, "transformer.h", _G, "transformer.ln_f", _EQUAL),
    "mixtral": Case("MixtralForCausalLM", _SHARED | {"num_local_experts": 4}, _BASE, _L | {"mlp": "mlp"}, "model.norm"),
    "qwen2_moe": Case(
        "Qwen2MoeForCausalLM", _MOE | {"shared_expert_intermediate_size": 24, "mlp_only_layers": []}, _BASE,
        _L | {"mlp": "mlp"}, "model.norm",
    ),
    "qwen3_moe": Case("Qwen3MoeForCausalLM", _MOE | {"head_dim": 12}, _BASE, _L | {"mlp": "mlp"}, "model.norm"),
    "bert": Case("BertForMaskedLM", {}, "bert.encoder.layer", _B, "bert.encoder.layer.1", fused=_POST),
    "roberta": Case("RobertaForMaskedLM", {}, "roberta.encoder.layer", _B, "roberta.encoder.layer.1", fused=_POST),
    "deberta": Case(
        "DebertaForMaskedLM", _DEBERTA, "deberta.encoder.layer", _D, "deberta.encoder.layer.1", _heads(4, 1, 1, 1),
        fused=_POST,
    ),
    "deberta-v2": Case("DebertaV2ForMaskedLM", _DEBERTA, "deberta.encoder.layer", _D2, "deberta.encoder.layer.1", fused=_POST),
    "modernbert": Case(
        "ModernBertForMaskedLM", {"layer_types": ["full_attention", "sliding_attention"], "global_attn_every_n_layers": 2,
        "cls_token_id": 1, "sep_token_id": 2}, _BASE, _MODERN, "model.final_norm", _EQUAL,
    ),
    "t5": Case("T5ForConditionalGeneration", _T5, "encoder.block decoder.block", _T, "decoder.final_layer_norm", decoder=True),
    "bart": Case(
        "BartForConditionalGeneration", _BART, "model.encoder.layers model.decoder.layers", _O, "model.decoder.layers.1",
        fused=_POST, decoder=True,
    ),
    "vit": Case("ViTForImageClassification", _VIT, "vit.layers", _V, "vit.layernorm"),
    "whisper": Case(
        "WhisperForConditionalGeneration", _BART | _WHISPER, "model.encoder.layers model.decoder.layers", _O,
        "model.decoder.layer_norm", decoder=True,
    ),
}  # fmt: skip


def config(name):
    case = CASES[name]
    kind = getattr(transformers, case.kind).config_class
    if case.kind.startswith("Gemma3"):
        kind = transformers.Gemma3TextConfig
    shape = {} if {"d_model", "n_embd"} & set(case.changes) else _SHAPE
    tokens = {} if name == "vit" else _TOKENS
    return kind(**{**tokens, **shape, **case.changes})


def build(name, dtype=torch.float32, **changes):
    """A random model in eval mode, every part of which matters."""
    torch.manual_seed(0)
    settings = config(name)
    for key, value in changes.items():
        assert hasattr(settings, key), key
        setattr(settings, key, value)
    settings._experts_implementation = "eager"  # the grouped product is not there in float64
    model = getattr(transformers, CASES[name].kind)(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0 if name != "t5" else 1.0)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype)


def inputs(name):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 60, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    if name == "vit":
        return {"pixel_values": torch.randn(2, 1, 8, 8, generator=generator)}
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 20, generator=generator), "decoder_input_ids": ids[:, :5]}
    given = {"input_ids": ids, "attention_mask": mask}
    return given | ({"decoder_input_ids": ids[:, :5]} if CASES[name].decoder else {})


def output(model, name):
    """The logits; of ViT, whose logits are two, the last hidden states."""
    given = inputs(name)
    dtype = next(model.parameters()).dtype
    given = {key: value.to(dtype) if value.is_floating_point() else value for key, value in given.items()}
    with torch.no_grad():
        return model.vit(**given).last_hidden_state if name == "vit" else model(**given).logits


def layers(model, name):
    """The layers of all stacks, in order."""
    return [layer for path in CASES[name].stacks for layer in model.get_submodule(path)]


def sites(name):
    """The sites that a model of the family has."""
    inside = () if CASES[name].places["mlp"] == "mlp" else ("ffn_in",)
    return ["embed", "q", "k", "v", "attn", *inside, "mlp", "block", "final"]


def module_at(layer, path):
    """`get_submodule`, also from the end."""
    for part in path.split(".") if path else ():
        layer = layer[int(part)] if part.lstrip("-").isdigit() else getattr(layer, part)
    return layer


def spots(model, name, site):
    """[(index of the layer that keeps the site's tensors, module, width)] of every place of a site."""
    case, found, first = CASES[name], layers(model, name), 0
    if site == "final":
        return [(len(found) - 1, model.get_submodule(case.final), 16 if name == "opt-350m" else WIDTH)]
    if site == "embed":
        spots = []
        for path in case.stacks:
            spots.append((first, found[first], WIDTH))
            first += len(model.get_submodule(path))
        return spots
    path = "" if site == "block" else case.places["mlp" if site == "ffn_in" else site]
    return [(index, module_at(layer, path), width_of(name, site)) for index, layer in enumerate(found)]


def width_of(name, site):
    case = CASES[name]
    if site in ("q", "k", "v"):
        if case.columns is not None:
            return len(case.columns[site])
        head = case.changes.get("head_dim", _HEAD)
        return head * (HEADS if site == "q" else case.changes.get("num_key_value_heads", HEADS))
    return INNER if site == "ffn_in" else WIDTH


def hook_reference(model, name, site, forms):
    """A copy with forms {layer index: Form} at a site by plain hooks, each in fp32 (or wider), rounded once."""
    slow = copy.deepcopy(model)
    columns = (CASES[name].columns or {}).get(site)

    def edited(form, rows):
        wide = torch.promote_types(rows.dtype, torch.float32)
        form = Form(*(None if t is None else t.to(wide) for t in form.tensors()))
        if columns is None:
            return form(rows.to(wide)).to(rows.dtype)
        rows = rows.clone()
        rows[..., columns] = form(rows[..., columns].to(wide)).to(rows.dtype)
        return rows

    def on_output(module, args, out, form):
        return (edited(form, out[0]), *out[1:]) if isinstance(out, tuple) else edited(form, out)

    def on_input(module, args, kwargs, form):
        if args:
            return (edited(form, args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edited(form, kwargs["hidden_states"])}

    for index, module, _ in spots(slow, name, site):
        if index not in forms:
            continue
        form = forms[index]
        if site in ("embed", "ffn_in"):
            module.register_forward_pre_hook(lambda m, a, k, form=form: on_input(m, a, k, form), with_kwargs=True)
        else:
            module.register_forward_hook(lambda m, a, o, form=form: on_output(m, a, o, form))
    return slow


def exact(model):
    """The model in float64, its norms too."""
    wide = copy.deepcopy(model).double()
    for module in list(wide.modules()):
        for key, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm") or type(child).__name__ in ("T5LayerNorm", "DebertaLayerNorm"):
                setattr(module, key, _ExactNorm(child))
    return wide


class _ExactNorm(torch.nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.weight, self.bias = norm.weight, getattr(norm, "bias", None)
        self.eps = getattr(norm, "variance_epsilon", None) or norm.eps
        self.one = float(type(norm).__name__.startswith("Gemma"))

    def forward(self, hidden):
        if self.bias is not None:
            hidden = hidden - hidden.mean(-1, keepdim=True)
        out = (self.one + self.weight) * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.eps)
        return out if self.bias is None else out + self.bias
