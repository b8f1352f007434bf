"""RE-Control's control at work in `generate`, on files, and what it does to rewards."""

import copy
import pickle

import pytest
import tiny_chat
import tiny_models as tiny
import torch
from ascent_support import make_net
from test_recontrol import A, N, generate, hooked, net_for, prompts, read_by_head
from transformers import DynamicCache

import fastedit as fe
from fastedit.methods import recontrol

# --- the same as plain hooks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_p": 0.9}, {"prompt_lookup_num_tokens": 3}], ids=str)
@pytest.mark.parametrize("side", ["left", "right", None])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tokens_are_those_of_the_autograd_loop(family, side, options):
    model, given = tiny.build(family), prompts(3, 6, side)
    if "prompt_lookup_num_tokens" in options:
        given = {name: value[1:2].repeat(1, 3) for name, value in given.items()}  # something to look up
    slow = generate(hooked(model, family, net_for(model)), given, **{k: v for k, v in options.items() if "lookup" not in k})
    plain = generate(model, given, **options)
    with fe.patch(model, recontrol.Control(net_for(model), A, N)):
        found = generate(model, given, **options)
    assert torch.equal(found, slow) and not torch.equal(found, plain)
    assert torch.equal(generate(model, given, **options), plain)


@pytest.mark.parametrize("units", [48, (48, 24)])
def test_states_in_float64(units):
    model = tiny.exact(tiny.build("llama"))
    slow = hooked(model, "llama", net_for(model, units))
    fe.patch(model, recontrol.Control(net_for(model, units), A, N))
    found, expected = read_by_head(model), read_by_head(slow)
    generate(model)
    generate(slow)
    found, expected = torch.stack(found), torch.stack(expected)
    assert found.dtype is torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_last_position_moves_and_the_cache_holds_nothing_of_it(dtype):
    model, given = tiny.build("llama", dtype), prompts(side=None)
    caches, states = [], []
    for strength in (None, 1.0, 0.0):
        with fe.patch(model, recontrol.Control(net_for(model), A, N)) as handle, torch.no_grad():
            if strength is None:
                handle.remove()
            else:
                handle.strength = strength
            caches.append(DynamicCache(config=model.config))
            states.append(model.model(**given, past_key_values=caches[-1]).last_hidden_state)
    plain, moved, dialled_off = states
    assert torch.equal(plain, dialled_off) and torch.equal(plain[:, :-1], moved[:, :-1])
    assert not torch.equal(plain[:, -1], moved[:, -1])
    for layer, other in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.equal(layer.keys, other.keys) and torch.equal(layer.values, other.values)


def test_a_forward_by_hand_moves_each_last_real_token():
    model, given = tiny.build("llama"), prompts(side="right")
    with torch.no_grad():
        plain = model.model(**given).last_hidden_state
        with fe.patch(model, recontrol.Control(net_for(model), A, N)):
            found = model.model(**given).last_hidden_state
    apart = (plain != found).any(-1)
    assert apart.nonzero().tolist() == [[0, 2], [1, 5], [2, 5]]
    expected = fe.ops.value_ascent(plain[0, 2], net_for(model), N, A)
    assert torch.equal(found[0, 2], expected)


def test_a_sequence_is_controlled_alone_as_in_its_batch():
    model, given = tiny.build("llama"), prompts(side=None)
    fe.patch(model, recontrol.Control(net_for(model), A, N))
    together = generate(model, given)
    alone = [generate(model, {name: value[i : i + 1] for name, value in given.items()}) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))


def test_a_static_cache_and_chunks_of_the_prompt():
    model, given = tiny.build("llama"), prompts(side=None)
    fe.patch(model, recontrol.Control(net_for(model), A, N))
    expected = generate(model, given)
    assert torch.equal(generate(model, given, cache_implementation="static", disable_compile=True), expected)
    assert torch.equal(generate(model, given, prefill_chunk_size=4), expected)


def test_with_other_edits_on_the_model():
    model = tiny.build("llama")
    vector = torch.randn(tiny.WIDTH, generator=torch.Generator().manual_seed(2))
    slow = copy.deepcopy(model)
    slow.model.layers[1].register_forward_hook(lambda m, a, out: out + vector)
    slow.model.norm.register_forward_hook(lambda m, a, out: out + 0.5 * vector)
    slow = hooked(slow, "llama", net_for(model))
    slow.model.norm.register_forward_hook(lambda m, a, out: out - 0.25 * vector)
    edits = [
        fe.Steer(vector, layers=[1]), fe.Steer(vector, site="final", strength=0.5), recontrol.Control(net_for(model), A, N),
        fe.Steer(vector, site="final", strength=-0.25),
    ]  # fmt: skip
    before = tiny.state(model)
    handles = [fe.patch(model, edits[:2]), fe.patch(model, edits[2:])]
    assert torch.equal(generate(model), generate(slow))
    for handle in handles:
        handle.remove()
    tiny.assert_same_state(model, before)


def test_the_dial_is_on_the_step_size():
    model = tiny.build("llama")
    expected = [generate(hooked(model, "llama", net_for(model), step_size=A * s)) for s in (2.0, -1.0)]
    handle = fe.patch(model, recontrol.Control(net_for(model), A, N))
    for strength, tokens in zip((2.0, -1.0), expected, strict=True):
        handle.strength = strength
        assert torch.equal(generate(model), tokens)


def test_other_values_in_place_and_a_copy_of_the_model():
    model, other = tiny.build("llama"), make_net(tiny.WIDTH, 48, 4.0, seed=5)
    plain, expected = generate(model), generate(hooked(model, "llama", other))
    handle = fe.patch(model, recontrol.Control(net_for(model), A, N))
    before = generate(model)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    handle.load_tensors({f"0.layers.2.final.{name}": p for name, p in other.named_parameters()})
    assert torch.equal(generate(model), expected) and not torch.equal(before, expected)
    assert torch.equal(generate(twin), before)
    fe.patching.handle.handles(twin)[0].remove()
    assert torch.equal(generate(twin), plain)
    wide = model.to(torch.bfloat16)
    assert handle.named_tensors()["0.layers.2.final.weight"].dtype is torch.float32
    assert generate(wide).shape[0] == 3


# --- what is refused ----------------------------------------------------------------------------------------------------


def test_beams_gradients_and_merging_are_refused():
    model = tiny.build("llama")
    handle = fe.patch(model, recontrol.Control(net_for(model)))
    for beams in ({"num_beams": 2}, {"generation_config": copy.deepcopy(model.generation_config)}):
        if "generation_config" in beams:
            beams["generation_config"].num_beams = 3
        with pytest.raises(ValueError, match="does not go with beam search"):
            generate(model, **beams)
    with pytest.raises(RuntimeError, match=r"handle.strength = 0 or handle.remove\(\)"):
        model(**prompts())
    handle.strength = 0
    model(**prompts()).logits.sum().backward()
    with pytest.raises(fe.patching.handle.MergeError, match="final"):
        handle.merge()


def test_what_a_control_cannot_be():
    model = tiny.build("llama")
    before = tiny.state(model)
    with pytest.raises(TypeError, match="expected a fastedit"):
        recontrol.Control(torch.nn.Linear(4, 1))
    for wrong in ({"steps": -1}, {"steps": 2.5}, {"step_size": float("inf")}, {"step_size": True}):
        with pytest.raises(ValueError, match="expected"):
            recontrol.Control(net_for(model), **wrong)
    with pytest.raises(ValueError, match=r"width 8, but this model's are 32"):
        fe.patch(model, recontrol.Control(fe.ValueNet(8, 4)))
    with pytest.raises(TypeError, match="no coefficient for a gate"):
        recontrol.Control(net_for(model)).when(fe.Gate(torch.ones(32), 0.0))
    with pytest.raises(ValueError, match="a Control has none"):
        fe.patch(model, recontrol.Control(net_for(model)), tenants=2)
    broken = net_for(model)
    broken.head[0] = float("nan")
    with pytest.raises(ValueError, match="head holds values that are NaN"):
        recontrol.Control(broken)
    tiny.assert_same_state(model, before)


# --- files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("units", [16, (16, 8)])
def test_saved_and_loaded_it_says_the_same(tmp_path, units):
    model, twin = tiny.build("llama"), tiny.build("llama")
    net = net_for(model, units)
    handle = fe.patch(model, recontrol.Control(net, 0.25, 20))
    handle.strength = 2.0
    handle.save(tmp_path)
    loaded = fe.load(twin, tmp_path)
    assert loaded.strength == 2.0 and torch.equal(generate(twin), generate(model))
    again = recontrol.value_net(loaded)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), net.parameters(), strict=True))
    assert torch.equal(again(torch.ones(2, 32)), net(torch.ones(2, 32)))
    with pytest.raises(ValueError, match="holds no Control"):
        recontrol.value_net(fe.patch(tiny.build("llama"), fe.RED()))
    with pytest.raises(fe.EditFileError, match="a base of width 32"):
        fe.load(tiny.build("llama", hidden_size=16), tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("units", [16, "8"]), ("units", None), ("units", [7]), ("steps", -3), ("steps", "30"), ("step_size", None),
     ("site", "block"), ("positions", "prompt"), ("keep_norm", True), ("tensors", ["weight"])],
)  # fmt: skip
def test_a_file_that_makes_no_sense_is_refused(tmp_path, key, value):
    model = tiny.build("llama")
    fe.patch(model, recontrol.Control(net_for(model, 16))).save(tmp_path)
    header, tensors = fe.store.read(tmp_path)
    for name in ("format", "version", "tensors"):
        del header[name]
    header["edits"][0][key] = value
    fe.store.write(tmp_path, header, tensors)
    fresh = tiny.build("llama")
    before = tiny.state(fresh)
    with pytest.raises(fe.EditFileError):
        fe.load(fresh, tmp_path)
    tiny.assert_same_state(fresh, before)


# --- what it does to rewards --------------------------------------------------------------------------------------------


def share_of_e(prompts, responses):
    """Per cent of a response's letters."""
    return [100 * text.count("e") / max(1, len(text)) for text in responses]


def test_controlled_samples_earn_more():
    model, tokenizer = tiny_chat.build(sharp=4.0)
    asked = [" ".join(tiny_chat.words()[n : n + 3]) for n in range(0, 192, 3)]
    collect = {"max_new_tokens": 16, "batch_size": 32}
    data = recontrol.collect(model, tokenizer, asked[:48], share_of_e, samples=6, **collect)
    torch.manual_seed(0)
    net = fe.ValueNet(data.width, 256)
    fitted = recontrol.fit(net, data, lam=0.9, lr=1e-3, batch_size=64, epochs=60)
    assert fitted.error < fitted.epochs[0]["error"]
    earned = {}
    with fe.patch(model, recontrol.Control(net, A, N)) as handle:
        for strength in (0.0, 1.0):
            handle.strength = strength
            said = recontrol.collect(model, tokenizer, asked[48:], share_of_e, samples=6, seed=1, **collect)
            earned[strength] = said.rewards
    error = float((earned[0.0].var() / 96 + earned[1.0].var() / 96).sqrt())
    gained = float(earned[1.0].mean() - earned[0.0].mean())
    assert gained > 5 * error, (gained, error)
