"""Strength as a dial, torch.compile, static caches and export: what is traced, and that nothing is traced again."""

import copy

import pytest
import tiny_models as tiny
import torch
from mode_cases import KINDS, one_of_each
from patch_cases import everything, scrambled
from torch._dynamo.testing import CompileCounterWithBackend

import fastedit as fe
from fastedit.edits.form import Form, at_strength, fold_all
from fastedit.patching.site import Stage


def compiled(model, backend="aot_eager"):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, fullgraph=True, dynamic=True, backend=counter), counter


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def ids(batch=2, length=7):
    return tiny.inputs("llama", batch=batch, length=length)["input_ids"]


def hooked(model, family, handle):
    """The slow reference of what a handle does now, and the same in float64."""
    stacks = {}
    for edit, layer, masters in handle._each():
        form = Form(*(None if t is None else t.detach().double() for t in masters.form().tensors()))
        stacks.setdefault((edit.site, layer.index), []).append(at_strength(form, masters.strength))
    edits = [(site, layer, fold_all(forms)) for (site, layer), forms in stacks.items()]
    bare = copy.deepcopy(model)
    fe.patching.handle.handles(bare)[0].remove()
    return tiny.hook_reference(bare, family, edits), tiny.hook_reference(tiny.exact(bare), family, edits)


# --- the dial -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_dial_turns_between_eager_calls(kind, fused):
    """Compared with a model patched at that strength: no state of an earlier strength is left."""
    edit = KINDS[kind](site="mlp")
    model = tiny.build("llama", num_hidden_layers=2)
    handle = scrambled(fe.patch(model, edit, fused=fused))
    addresses = [t.data_ptr() for _, _, m in handle._each() for _, _, t in m.sources()]
    said = []
    for strength in (0.5, 0.0, 2.0, 0.5):
        handle.strength = strength
        other = tiny.build("llama", num_hidden_layers=2)
        again = scrambled(fe.patch(other, KINDS[kind](site="mlp"), fused=fused))
        again.strength = strength
        said.append(logits(model, ids()))
        assert torch.equal(said[-1], logits(other, ids()))
    assert torch.equal(said[0], said[3]) and not torch.equal(said[0], said[2])
    assert addresses == [t.data_ptr() for _, _, m in handle._each() for _, _, t in m.sources()]


def test_the_dial_moves_no_tensor_of_a_folded_stack_on_a_gpu(monkeypatch):
    """A CUDA graph holds the addresses that the kernels read."""
    monkeypatch.setattr(Stage, "in_place", lambda self: True)
    model = tiny.build("llama", num_hidden_layers=2)
    handle = scrambled(fe.patch(model, [fe.RED(), fe.Steer(torch.ones(tiny.WIDTH), site="mlp")]))
    logits(model, ids())
    stages = [stage for site in handle._root.sites.values() for stage in site.stages]
    before = [[t.data_ptr() for t in stage.folded if t is not None] for stage in stages]
    handle.strength = 0.5
    logits(model, ids())
    assert len(before) == 2 and before == [[t.data_ptr() for t in s.folded if t is not None] for s in stages]


@pytest.mark.gpu
def test_the_dial_turns_under_a_cuda_graph():
    model = tiny.build("llama").cuda()
    handle = scrambled(fe.patch(model, everything()))
    given = ids().cuda()
    static, stream = given.clone(), torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            model(input_ids=static, use_cache=False)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = model(input_ids=static, use_cache=False).logits
    for strength in (1.0, 0.5, 0.0):
        handle.strength = strength
        said = logits(model, given)  # refolds into the tensors that the graph reads
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, said)


# --- torch.compile --------------------------------------------------------------------------------------------


# What a kind computes knows no family: one has every kind, the others each some, together all of them.
FAMILIES = {
    "llama": KINDS, "gpt2": ("red", "ablate", "noreft"), "bert": ("clamp", "scale", "direft"), "t5": ("low rank", "steer", "red"),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_compiles_whole_with_every_kind(family):
    """fullgraph: a graph break is an error. Other lengths, strengths and tensors run what was compiled first."""
    fewer = {"llama": {"num_hidden_layers": 1}, "gpt2": {"n_layer": 1}, "bert": {"num_hidden_layers": 1}}
    model = tiny.build(family, **fewer.get(family, {"num_layers": 1, "num_decoder_layers": 1}))
    stacks = [0, 1] if family == "t5" else [0]  # the encoder's layer and the decoder's
    edits = [KINDS[kind](site=("mlp", "attn", "block")[n % 3], layers=stacks) for n, kind in enumerate(FAMILIES[family])]
    handle = scrambled(fe.patch(model, edits))
    slow, exact = hooked(model, family, handle)
    subject = model.base_model if family == "bert" else model
    fast, counter = compiled(subject, "aot_eager" if family in ("llama", "gpt2") else "eager")  # of each kind of norm one
    frames = []
    for length in (7, 9):
        given = tiny.inputs(family, length=length)
        with torch.no_grad():
            tiny.assert_promise(
                fast(**given)[0], tiny.output(slow, family, length=length), tiny.output(exact, family, length=length)
            )
        frames.append(counter.frame_count)
    assert len(set(frames)) == 1, f"{frames} frames: a length was traced again"
    halved = {name: t * 0.5 for name, t in handle.named_tensors().items()}
    changes = [lambda s=s: setattr(handle, "strength", s) for s in (0.5, 0.0, 2.0)] + [lambda: handle.load_tensors(halved)]
    with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile"):
        said = [fast(**given)[0]]
        for change in changes:
            change()
            said.append(fast(**given)[0])
            torch.testing.assert_close(said[-1], subject(**given)[0], rtol=1e-4, atol=1e-4)
            assert not torch.equal(*said[-2:]), "nothing was turned"
    assert counter.frame_count == frames[0]


@pytest.mark.slow
def test_inductors_code_keeps_the_promise():
    """Of a scale and a bias, of a low-rank form that a kind computes from its tensors, and of one that is given; the layer
    alone, since the embedding, the mask and the head are a third of the compiler's time and none of the edit's."""
    model = tiny.build("llama", num_hidden_layers=1)
    handle = scrambled(fe.patch(model, [KINDS[kind](site="mlp") for kind in ("red", "clamp", "low rank")]))
    slow, exact = hooked(model, "llama", handle)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.model.layers[0].compile(fullgraph=True, dynamic=True)
    tiny.assert_promise(logits(model, ids()), logits(slow, ids()), logits(exact, ids()))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_patching_and_unpatching_a_compiled_model_is_seen():
    model = tiny.build("llama", num_hidden_layers=1)
    fast = torch.compile(model, backend="aot_eager")
    torch._dynamo.reset()
    bare = logits(fast, ids())
    handle = scrambled(fe.patch(model, fe.RED()))
    torch.testing.assert_close(logits(fast, ids()), logits(model, ids()), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(fast, ids()), bare, atol=1e-2)
    handle.remove()
    assert torch.equal(logits(fast, ids()), bare)


def test_a_hook_put_on_after_compiling_is_pytorchs_to_see():
    """By default PyTorch guards no hooks, on any module; told to, it sees the edited output through them."""
    model = tiny.build("llama", num_hidden_layers=1)
    scrambled(fe.patch(model, fe.RED()))
    for skipped in (True, False):
        torch._dynamo.reset()
        with torch._dynamo.config.patch(skip_nnmodule_hook_guards=skipped):  # as monkeypatch undoes it, it is gone
            fast = torch.compile(model, backend="aot_eager")
            before = logits(fast, ids())
            hook = model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output * 1.5)
            after, eager = logits(fast, ids()), logits(model, ids())
            hook.remove()
            assert not torch.allclose(eager, before, atol=1e-2)
            if skipped:
                assert torch.equal(after, before), "PyTorch guards hooks now: say so in docs/run-modes.md"
            else:
                torch.testing.assert_close(after, eager, rtol=1e-4, atol=1e-4)


# --- generation and export ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_with_a_static_cache_writes_what_hooks_write(family):
    model = tiny.build(family)
    handle = scrambled(fe.patch(model, one_of_each(family)))
    slow, _ = hooked(model, family, handle)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :2] = 0
    options = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    expected = slow.generate(ids(), **options)
    assert torch.equal(model.generate(ids(), **options, cache_implementation="static"), expected)
    assert torch.equal(model.generate(ids(), **options), expected)
    handle.strength = 0.0
    assert not torch.equal(model.generate(ids(), **options, cache_implementation="static"), expected)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_patched_model_is_exported(family):
    model = tiny.build(family)
    scrambled(fe.patch(model, one_of_each(family)))

    class Said(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]

    if family == "llama":
        model.config.use_cache = False
    length = torch.export.Dim("length", min=2, max=60)
    program = torch.export.export(
        Said(), (), tiny.inputs(family), dynamic_shapes={n: {1: length} for n in tiny.inputs(family)}
    )
    longer = tiny.inputs(family, length=11)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(**longer), Said()(**longer), rtol=1e-4, atol=1e-4)
