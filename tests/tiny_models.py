"""Tiny random models of every family, their inputs, and slow references made of plain forward hooks."""

import copy
import warnings

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

WIDTH, LAYERS, VOCABULARY = 32, 3, 60
_COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

LAYER = {"llama": "model.layers.{}", "gpt2": "transformer.h.{}", "bert": "bert.encoder.layer.{}"}
LAYER["roberta"] = LAYER["bert"].replace("bert.", "roberta.", 1)
BERT = {"mlp": ".output.dense", "attn": ".attention.output.dense", "block": ""}
SITES = {  # written out, so that the families table is checked against something else than itself
    "llama": {"mlp": ".mlp.down_proj", "attn": ".self_attn.o_proj", "block": ""},
    "gpt2": {"mlp": ".mlp.c_proj", "attn": ".attn.c_proj", "block": ""},
    "bert": BERT,
    "roberta": BERT,
    "t5": {
        "mlp": "{}.layer.{last}.DenseReluDense.wo", "attn": "{}.layer.0.SelfAttention.o", "block": "{}",
    },
}  # fmt: skip
FAMILIES = tuple(SITES)


def config(family, **changes):
    if family == "llama":
        base = {
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
        }
        return LlamaConfig(
            **_COMMON | base | {"num_key_value_heads": 2, "max_position_embeddings": 64} | changes
        )
    if family == "gpt2":
        return GPT2Config(
            **_COMMON | {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 64} | changes
        )
    if family == "t5":
        base = {
            "d_model": WIDTH,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_heads": 4,
        }
        return T5Config(**_COMMON | base | {"decoder_start_token_id": 0} | changes)
    kind = BertConfig if family == "bert" else RobertaConfig
    base = {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
    }
    return kind(**_COMMON | base | {"max_position_embeddings": 64} | changes)


MODELS = {
    "llama": LlamaForCausalLM, "gpt2": GPT2LMHeadModel, "bert": BertForSequenceClassification,
    "roberta": RobertaForSequenceClassification, "t5": T5ForConditionalGeneration,
}  # fmt: skip


def build(family, dtype=torch.float32, **changes):
    """A random model in eval mode; weights larger than at initialisation, so that every part of it
    matters.
    """
    torch.manual_seed(0)
    model = MODELS[family](config(family, **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0 if family != "t5" else 1.0)
            elif "norm" in name.lower() or "ln_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype)


def inputs(family, batch=2, length=7):
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    return given | ({"decoder_input_ids": ids[:, :5]} if family == "t5" else {})


def output(model, family, **changes):
    """What the model says: logits, or for an encoder the last hidden states."""
    with torch.no_grad():
        if family in ("bert", "roberta"):
            return model.base_model(**inputs(family, **changes)).last_hidden_state
        return model(**inputs(family, **changes)).logits


def site_module(model, family, site, layer):
    """The module whose output is the site of a layer, the stacks numbered through."""
    path = SITES[family][site]
    if family != "t5":
        return model.get_submodule(LAYER[family].format(layer) + path)
    encoder = len(model.encoder.block)
    side, number = ("encoder", layer) if layer < encoder else ("decoder", layer - encoder)
    return model.get_submodule(path.format(f"{side}.block.{number}", last=1 if side == "encoder" else 2))


def number_of_layers(family):
    return 4 if family == "t5" else LAYERS


def hook_reference(model, family, edits):
    """A copy of the model with [(site, layer, Form)] put on by plain forward hooks, each in fp32, rounded
    once.
    """
    slow = copy.deepcopy(model)

    def put(form):
        def hook(module, args, output):
            rows = output[0] if isinstance(output, tuple) else output
            wide = torch.promote_types(rows.dtype, torch.float32)
            cast = type(form)(*(None if t is None else t.to(wide) for t in form.tensors()))
            edited = cast(rows.to(wide)).to(rows.dtype)
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return hook

    for site, layer, form in edits:
        site_module(slow, family, site, layer).register_forward_hook(put(form))
    return slow


class _ExactRMSNorm(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, hidden):
        return self.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.eps)


def exact(model):
    """The model in float64, its norms too (RMSNorm modules compute in float32 whatever they are given)."""
    wide = copy.deepcopy(model).double()
    for module in list(wide.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ in ("LlamaRMSNorm", "T5LayerNorm"):
                setattr(module, name, _ExactRMSNorm(child))
    return wide


def assert_promise(got, eager, reference):
    """The numerics promise: error ≤ 2 × eager's error + 1 ulp of the largest value."""
    scale = reference.abs().max()
    ulp = torch.finfo(got.dtype).eps * scale
    error, allowed = (got.double() - reference).abs().max(), (eager.double() - reference).abs().max()
    assert error <= 2 * allowed + ulp, f"error {error:.3e}, eager's {allowed:.3e}, ulp {ulp:.3e}"


def state(model):
    """What removal must give back: keys and bits of the state dict, classes, hooks, flags, attributes."""
    return {
        "bits": {k: v.clone() if not v.is_meta else v for k, v in model.state_dict().items()},
        "classes": [type(m) for m in model.modules()],
        "hooks": [tuple(m._forward_hooks.items()) for m in model.modules()],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
        "modules": [list(m._modules) for m in model.modules()],
        "flags": [p.requires_grad for p in model.parameters()],
    }


def assert_same_state(model, before):
    after = state(model)
    bits, old = after.pop("bits"), dict(before)
    old_bits = old.pop("bits")
    assert list(bits) == list(old_bits)
    assert all(torch.equal(bits[k], old_bits[k]) for k in bits if not bits[k].is_meta)
    assert after == old


def quiet(call, *args, **kwargs):
    """The call, with any warning an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call(*args, **kwargs)


def sequences(count=40, longest=12, seed=0):
    """Lists of token ids of every length up to the longest."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (1 + i % longest,), generator=generator).tolist() for i in range(count)]
