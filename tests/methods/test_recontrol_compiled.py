"""RE-Control under torch.compile and export: one graph for every dial, mask, length and net, with the eager bits."""

import copy

import pytest
import tiny_models as tiny
import torch
from ascent_support import make_net
from test_recontrol import A, N, generate, hooked, net_for, prompts
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CompileConfig

import fastedit as fe
from fastedit.methods import recontrol


def controlled(units=48, layers=1):
    model = tiny.build("llama", num_hidden_layers=layers)
    return model, fe.patch(model, recontrol.Control(net_for(model, units), A, N))


def compiled(model, dynamic=True):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(model, fullgraph=True, dynamic=dynamic, backend=counter), counter


def logits(model, given):
    with torch.no_grad():
        return model(**given, use_cache=False).logits


def test_one_graph_before_any_forward_for_every_dial_length_and_net():
    model, handle = controlled((48, 24))
    fast, counter = compiled(model)
    given, said, frames = prompts(3, 6, "right"), {}, []
    for strength in (1.0, 0.5, -1.0, 0.0):
        handle.strength = strength
        said[strength] = logits(fast, given)
        frames.append(counter.frame_count)
        assert torch.equal(said[strength], logits(model, given))
    assert not torch.equal(said[1.0], said[0.5])
    longer = prompts(2, 9, "right")
    assert torch.equal(logits(fast, longer), logits(model, longer))
    handle.strength = 1.0
    other = make_net(tiny.WIDTH, (48, 24), 4.0, seed=5)
    handle.load_tensors(dict(zip(handle.named_tensors(), other.parameters(), strict=True)))
    after = logits(fast, given)
    assert torch.equal(after, logits(model, given)) and not torch.equal(after, said[1.0])
    masters = handle._root.sites["layers.0", "final"].masters[0]
    for name, tensor in net_for(model, (48, 24)).state_dict().items():
        setattr(masters, name, tensor.clone())  # what a graph of the other net's Gram matrix would get wrong
    assert torch.equal(logits(fast, given), said[1.0])
    assert {*frames, counter.frame_count} == {frames[0]}
    handle.remove()
    assert torch.equal(said[0.0], logits(model, given)), "dialled to 0 it leaves every bit"


def test_a_copy_has_a_stage_of_its_own():
    model, handle = controlled()
    twin = copy.deepcopy(model)
    handle.strength = 2.0
    stages = [h._root.sites["layers.0", "final"].stages[0] for h in (handle, fe.patching.handle.handles(twin)[0])]
    hidden = torch.randn(2, 1, tiny.WIDTH)
    first, second = (torch.ops.fastedit.control.default(hidden, stage.number) for stage in stages)
    assert torch.equal(first, fe.ops.value_ascent(hidden, net_for(model), N, 2 * A))
    assert torch.equal(second, fe.ops.value_ascent(hidden, net_for(model), N, A))


@pytest.mark.slow
def test_inductors_code_keeps_the_promise():
    model, _ = controlled()
    slow = hooked(tiny.build("llama", num_hidden_layers=1), "llama", net_for(model))
    exact = hooked(tiny.exact(tiny.build("llama", num_hidden_layers=1)), "llama", net_for(model))
    torch._dynamo.reset()
    fast = torch.compile(model, fullgraph=True)
    given = prompts(side=None)
    tiny.assert_promise(logits(fast, given), logits(slow, given), logits(exact, given))


def test_generate_with_compiled_steps_says_the_same():
    model, handle = controlled()
    options = {"do_sample": True, "top_p": 0.9}
    expected = generate(model, **options)
    config = CompileConfig(fullgraph=True, backend="eager", mode="default")
    config._compile_all_devices = True
    static = {"cache_implementation": "static", "compile_config": config}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert torch.equal(generate(model, **static, **options), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    handle.strength = -1.0
    assert torch.equal(generate(model, **static, **options), generate(model, **options))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    with pytest.raises(ValueError, match="does not go with beam search"):
        generate(model, num_beams=2, **static)


def test_a_compiled_forward_that_needs_a_gradient_says_why_not():
    model, _ = controlled()
    fast, _ = compiled(model)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"at generation alone\. Use model\.generate or torch"):
        fast(**prompts())


def test_export_holds_the_net_of_now():
    class Said(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    model, handle = controlled()
    model.requires_grad_(False)
    given = prompts(3, 6, "right")
    with pytest.raises(RuntimeError, match=r"run one before torch\.export"):
        torch.export.export(Said(model), (), given, strict=False)
    expected = logits(model, given)
    program = torch.export.export(Said(model), (), given, strict=False)
    handle.strength = 0.5
    with torch.no_grad():
        assert torch.equal(program.module()(**given), expected)
        assert not torch.equal(logits(model, given), expected)


def test_the_operator_as_pytorch_wants_it():
    _, handle = controlled()
    stage = handle._root.sites["layers.0", "final"].stages[0]
    torch.library.opcheck(torch.ops.fastedit.control.default, (torch.randn(2, 1, tiny.WIDTH), stage.number))
