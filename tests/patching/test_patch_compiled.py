"""torch.compile of patched models."""

import pytest
import tiny_models as tiny
import torch
from patch_cases import scrambled

import fastedit as fe


@pytest.mark.parametrize("fused", [True, False])
def test_a_patched_model_compiles_whole_and_its_dial_needs_no_retrace(fused):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = tiny.build("llama", num_hidden_layers=2)
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output * 1.5)
    vector = torch.randn(tiny.WIDTH)
    handle = scrambled(
        fe.patch(model, [fe.RED(), fe.Steer(vector), fe.Ablate(vector, site="block")], fused=fused)
    )
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for strength in (1.0, 0.5, 0.0):
        handle.strength = strength
        expected = tiny.output(model, "llama")
        torch.testing.assert_close(tiny.output(compiled, "llama"), expected, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
    compiled(**tiny.inputs("llama")).logits.sum().backward()
    got = [p.grad.clone() for p in handle.parameters()]
    model.zero_grad()
    model(**tiny.inputs("llama")).logits.sum().backward()
    for parameter, grad in zip(handle.parameters(), got, strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("positions", [None, "last 2"])
def test_jit_trace_records_the_edits(positions):
    """What a trace is then run on: other tokens, another batch and another length."""

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(input_ids=ids).logits

    model = tiny.build("llama", num_hidden_layers=2, use_cache=False)
    scrambled(fe.patch(model, [fe.RED(positions=positions), fe.Steer(torch.randn(tiny.WIDTH), site="block")]))
    logits = Logits().eval()
    with torch.no_grad():
        logits(torch.ones(2, 7, dtype=torch.long))  # adds are held ready
        traced = torch.jit.trace(logits, torch.ones(2, 7, dtype=torch.long), check_trace=False)
        for shape in ((2, 7), (3, 5)):
            ids = torch.randint(0, 50, shape)
            torch.testing.assert_close(traced(ids), logits(ids), rtol=1e-5, atol=1e-5)
