"""A mask that the stack of layers is not given as it was said: kept from it, or made ready for its layers; and a stack whose
class is called an encoder and which decodes."""

import inspect

import pytest
import torch
import transformers

import fastedit as fe
from bench.conformance import tiny
from fastedit.families import find_layers

IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
VECTOR = torch.randn(tiny.WIDTH, generator=torch.Generator().manual_seed(1)) * 3
NAMES = ("RwkvForCausalLM", "Gemma3ForConditionalGeneration", "Gemma4ForConditionalGeneration")


def patched(name, gate=None, positions="last 1"):
    model = tiny.build(getattr(transformers, name))
    edit = fe.Steer(VECTOR, site="block", layers=[-1], positions=positions if gate is None else None)
    fe.patch(model, edit if gate is None else edit.when(gate))
    return model


def handed_on(model, call):
    """What the last layer hands on, (sequences, tokens, width), in a call of the model."""
    layer, seen = find_layers(model)[-1].module, []
    hook = layer.register_forward_hook(lambda m, a, o: seen.append(o[0] if isinstance(o, tuple) else o))
    with torch.no_grad():
        call(model)
    hook.remove()
    return seen[-1]


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_last_real_token_is_the_mask_s_that_the_model_was_given(name, by_position):
    model = patched(name)
    plain = tiny.build(getattr(transformers, name))
    if by_position:
        names = list(inspect.signature(type(plain).forward).parameters)[1:]
        place = names.index("attention_mask")
        given = (IDS, *[None] * (place - 1), MASK)
        edited = handed_on(model, lambda m: m(*given))
        bare = handed_on(plain, lambda m: m(*given))
    else:
        edited = handed_on(model, lambda m: m(input_ids=IDS, attention_mask=MASK))
        bare = handed_on(plain, lambda m: m(input_ids=IDS, attention_mask=MASK))
    at = ((edited - bare).abs().amax(-1) > 1e-3).nonzero().tolist()
    assert at == [[0, 6], [1, 3]]


@pytest.mark.parametrize("name", NAMES)
def test_without_a_mask_every_token_is_real(name):
    edited, bare = (handed_on(m, lambda m: m(IDS)) for m in (patched(name), tiny.build(getattr(transformers, name))))
    assert ((edited - bare).abs().amax(-1) > 1e-3).nonzero().tolist() == [[0, 6], [1, 6]]


@pytest.mark.parametrize("name", NAMES)
def test_a_gate_on_the_prompt_reads_real_tokens_alone(name):
    """Its decision for a padded row is that of the row alone."""
    gate = fe.Gate(VECTOR, decide="prompt", threshold=0.0, sharpness=0.02)
    model = patched(name, gate)
    with torch.no_grad():
        padded = model(input_ids=IDS, attention_mask=MASK).logits[1, :4]
        alone = model(input_ids=IDS[1:, :4]).logits[0]
        bare = tiny.build(getattr(transformers, name))(input_ids=IDS[1:, :4]).logits[0]
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(alone, bare, atol=1e-2)


def test_a_mask_kept_from_the_stack_is_seen_under_a_compiler():
    model = patched("RwkvForCausalLM")
    with torch.no_grad():
        eager = model(input_ids=IDS, attention_mask=MASK).logits
        compiled = torch.compile(model, backend="eager")(input_ids=IDS, attention_mask=MASK).logits
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


def test_what_another_call_was_given_is_forgotten():
    """A stack that is called by itself is told nothing of the model's call before."""
    model = patched("Gemma3ForConditionalGeneration")
    with torch.no_grad():
        model(input_ids=IDS, attention_mask=MASK)
        ready = {kind: None for kind in ("full_attention", "sliding_attention")}
        with pytest.raises(ValueError, match="attention_mask is not a"):
            model.model.language_model(input_ids=IDS, attention_mask=ready)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", ["BertGenerationDecoder", "BertLMHeadModel", "ElectraForCausalLM"])
def test_a_stack_called_an_encoder_decodes_where_its_config_says_so(name, use_cache):
    """The prompt's last token, and none of those that `generate` appends, with a cache and without."""
    model = tiny.build(getattr(transformers, name))
    bare = tiny.build(getattr(transformers, name))
    fe.patch(model, fe.Steer(VECTOR, site="block", layers=[-1], positions="last 1"))
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "use_cache": use_cache}
    said = model.generate(IDS, attention_mask=torch.ones_like(IDS), output_logits=True, return_dict_in_generate=True, **options)

    def hook(module, args, output):
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[:, IDS.shape[1] - 1] += VECTOR
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    find_layers(bare)[-1].module.register_forward_hook(hook)
    with torch.no_grad():
        expected = bare(said.sequences[:, :-1], use_cache=False).logits[:, IDS.shape[1] - 1 :]
    torch.testing.assert_close(torch.stack(said.logits, 1), expected, rtol=1e-4, atol=1e-4)
