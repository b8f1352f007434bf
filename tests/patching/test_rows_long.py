"""Quantised caches, and Whisper on sound longer than its window, segment by segment: the tokens that are edited are those that
a hook edits, which counts columns itself.
"""

import pytest
import torch
import transformers
import zoo
from row_models import where

import fastedit as fe
from bench.conformance import tiny
from fastedit.families import find_layers

VECTOR = torch.randn(tiny.WIDTH, generator=torch.Generator().manual_seed(5)) * 3


class Counted:
    """A model steered by a hook at its last layer: of each forward of `stack` by how much its cache holds; a prompt is what is
    given to an empty one, or goes on for `columns`.
    """

    def __init__(self, model, stack, positions):
        self.model, self.positions, self.prompt = model, positions, 0
        stack.register_forward_pre_hook(self._see, with_kwargs=True)  # which is given the ids
        find_layers(model)[-1].module.register_forward_hook(self._edit)

    def _see(self, module, args, kwargs):
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, transformers.Cache)), None)
        self.offset = 0 if cache is None else int(cache.get_seq_length())
        tokens = (args[0] if args else kwargs["input_ids"]).shape[1]
        self.prompt = tokens if not self.offset else self.prompt
        self.rows = where(self.positions, self.prompt, self.offset + tokens)[self.offset :]

    def _edit(self, module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        edited = hidden + self.rows[:, None] * VECTOR
        return (edited, *output[1:]) if isinstance(output, tuple) else edited


def said(model, head, call):
    """(what the call returns, every forward's last logits)"""
    kept = []
    hook = head.register_forward_hook(lambda module, args, output: kept.append(output[:, -1].detach()))
    with torch.no_grad():
        tokens = call(model)
    hook.remove()
    return tokens, torch.stack(kept)


@pytest.mark.skipif(not hasattr(transformers.cache_utils, "Fp8QuantizedLayer"), reason="a backend of transformers' own")
@pytest.mark.parametrize("positions", ["generated", "first 2 + last 1"])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM", "GPTNeoXForCausalLM"])
def test_a_quantised_cache(name, positions):
    def call(model):
        return model.generate(
            torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(3)), max_new_tokens=5, min_new_tokens=5,
            do_sample=False, cache_implementation="quantized", cache_config={"backend": "fp8"},
        )  # fmt: skip

    edited, hooked = (tiny.build(getattr(transformers, name)) for _ in range(2))
    fe.patch(edited, fe.Steer(VECTOR, site="block", layers=[-1], positions=positions))
    Counted(hooked, hooked.get_decoder() if "OPT" in name else hooked.base_model, positions)
    (tokens, logits), (expected, slow) = (said(m, m.get_output_embeddings(), call) for m in (edited, hooked))
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logits, slow, rtol=1e-4, atol=1e-4)
    bare = tiny.build(getattr(transformers, name))
    assert not torch.allclose(said(bare, bare.get_output_embeddings(), call)[1], slow, atol=1e-2)


@pytest.mark.parametrize("previous", [False, True])
@pytest.mark.parametrize("positions", ["generated", "last 1", "prompt"])
def test_whisper_on_sound_longer_than_its_window(positions, previous):
    def build():
        model = zoo.build("whisper").eval()
        settings = model.generation_config
        settings.no_timestamps_token_id, settings.is_multilingual, settings.prev_sot_token_id = 49, False, 4
        settings.begin_suppress_tokens = None
        return model

    def call(model):
        frames = torch.randn(1, 8, 50, generator=torch.Generator().manual_seed(0))
        return model.generate(
            frames, attention_mask=torch.ones(1, 50, dtype=torch.long), return_timestamps=True, max_new_tokens=4, do_sample=False,
            condition_on_prev_tokens=previous,
        )  # fmt: skip

    edited, hooked, bare = build(), build(), build()
    fe.patch(edited, fe.Steer(VECTOR, site="block", layers=[-1], positions=positions))
    Counted(hooked, hooked.model.decoder, positions)
    (tokens, logits), (expected, slow) = (said(m, m.proj_out, call) for m in (edited, hooked))
    assert torch.equal(tokens, expected) and len(logits) > 8
    torch.testing.assert_close(logits, slow, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(said(bare, bare.proj_out, call)[1][:4], slow[:4], atol=1e-2)
