"""Tiny models whose caches differ: what says how far a forward has come is another thing in each."""

import copy

import torch
import transformers

import fastedit as fe
from fastedit.families import find_layers

_TOKENS = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
_LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
CONFIGS = {
    "llama": _SHAPE,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gemma3_text": _SHAPE | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "qwen3_5_text": _SHAPE | _LINEAR,  # linear attention beside full attention
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},  # a state, no length
    "recurrent_gemma": {  # a state that its own modules hold, and no cache at all
        "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 1, "num_hidden_layers": 3,
        "lru_width": 32, "attention_window_size": 8,
    },
    "t5": {
        "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
        "decoder_start_token_id": 0,
    },
    "bart": {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 1, "max_position_embeddings": 64,
        "forced_eos_token_id": None,
    },
}  # fmt: skip
SEQ2SEQ = ("t5", "bart")
VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(5)) * 3


def build(kind, **changes):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **_TOKENS | CONFIGS[kind] | changes)
    auto = transformers.AutoModelForSeq2SeqLM if kind in SEQ2SEQ else transformers.AutoModelForCausalLM
    model = auto.from_config(config).eval().double()
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3.0)
    return model


def last_layer(model):
    """The last layer of the decoder that has the site."""
    layers = [layer for layer in find_layers(model) if not layer.name.startswith("encoder")]
    return [layer for layer in layers if layer.at(site_of(model)) is not None][-1]


def site_of(model):
    return "mlp" if model.config.model_type.startswith("qwen3_5") else "block"


class Slow:
    """A copy of a model, steered by a plain hook at its last_layer, where `rows` (sequences, columns) says."""

    def __init__(self, model):
        self.model, self.rows = copy.deepcopy(model), None
        last_layer(self.model).at(site_of(model)).register_forward_hook(self._edit)

    def _edit(self, module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        edited = hidden + self.rows[..., None].to(hidden) * VECTOR.to(hidden)
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    def logits(self, rows, ids, **given):
        self.rows = rows
        name = "decoder_input_ids" if self.model.config.is_encoder_decoder else "input_ids"
        with torch.no_grad():
            return self.model(**{name: ids}, use_cache=False, **given).logits


def steered(kind, positions, gate=None, **changes):
    """(model with one edit at its last decoder layer, its handle, the slow model)"""
    model = build(kind, **changes)
    slow = Slow(model)
    edit = fe.Steer(VECTOR, site=site_of(model), layers=[last_layer(model).index], positions=positions)
    return model, fe.patch(model, edit if gate is None else edit.when(gate)), slow


def ids_of(rows=2, columns=6, seed=3):
    return torch.randint(3, 60, (rows, columns), generator=torch.Generator().manual_seed(seed))


def generated(model, ids, new=5, **options):
    out = model.generate(
        ids, **{"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, **options}, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return out.sequences, out.logits


def where(positions, columns, total):
    """(columns,) by the words of fastedit/edits/positions.py for one sequence without padding."""
    found = torch.zeros(total)
    for part in positions.split(" + "):
        word, _, number = part.partition(" ")
        if word == "generated":
            found[columns:] = 1
        elif word == "prompt":
            found[:columns] = 1
        elif word == "first":
            found[: min(int(number), columns)] = 1
        else:
            found[max(columns - int(number), 0) : columns] = 1
    return found


def check(slow, positions, sequences, logits, columns, **given):
    """Each step's logits are the slow model's, which runs the whole sequence of that step."""
    for step, said in enumerate(logits):
        seen = sequences[:, : columns + step]
        rows = where(positions, columns, seen.shape[1]).expand(len(seen), -1)
        expected = slow.logits(rows, seen, **given)[:, -1]
        torch.testing.assert_close(said.double(), expected.double(), rtol=1e-5, atol=1e-6)
