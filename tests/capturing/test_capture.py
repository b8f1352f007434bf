"""Capture: the moments of hidden states over a data set, in one pass that stores none of them; over two real processes in
test_distributed.py."""

import types

import pytest
import torch
from tiny_models import FAMILIES, build, exact, inputs, number_of_layers, sequences, site_module

import fastedit as fe
from fastedit.capturing import capture as capturing
from fastedit.capturing.rows_on_disk import Rows
from fastedit.texts import picking
from fastedit.texts.batches import WINDOW


def labels_of(data):
    return ["even" if len(ids) % 2 == 0 else "odd" for ids in data]


def hidden_states(model, family, places, ids):
    """{(site, layer): (tokens, width)} of one sequence on its own, by plain hooks."""
    found, hooks = {}, []
    for place in places:

        def keep(module, args, output, place=place):
            found[place] = (output[0] if isinstance(output, tuple) else output)[0].double()

        hooks.append(site_module(model, family, *place).register_forward_hook(keep))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return found


PICK = {
    "last token": lambda h: h[-1:], "first token": lambda h: h[:1], "all tokens": lambda h: h,
    "mean": lambda h: h.mean(0, keepdim=True),
}  # fmt: skip


def rows_of(model, family, site, layer, data, at):
    """[rows (n, width) of each sequence] as `at` says."""
    place = (site, layer)
    return [PICK[at](hidden_states(model, family, [place], ids)[place]) for ids in data]


def assert_moments(found, group, rows, rtol=1e-6):
    """Against the two-pass mean and variance in float64, relative to the largest of each."""
    rows = torch.cat(rows)
    mean, variance = rows.mean(0), rows.var(0)
    assert int(found.count[group]) == len(rows)
    assert (found.mean()[group] - mean).abs().max() <= rtol * mean.abs().max()
    assert (found.variance()[group] - variance).abs().max() <= rtol * variance.abs().max()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "roberta"])
def test_moments_are_those_of_two_passes_in_float64(family):
    model, data = exact(build(family)), sequences(24)
    labels = labels_of(data)
    places = [(site, layer) for site in ("block", "mlp", "attn") for layer in (0, number_of_layers(family) - 1)]
    whole = [hidden_states(model, family, places, ids) for ids in data]
    for site, at in [*(("block", at) for at in picking.FIXED), ("mlp", "last token"), ("attn", "all tokens")]:
        found = fe.capture(model, None, data, site=site, at=at, groups=labels, layers=[0, -1], batch_size=4)
        assert list(found) == [0, number_of_layers(family) - 1] and found.names == ("odd", "even")
        for layer, moments in found.items():
            for number, name in enumerate(found.names):
                rows = [PICK[at](h[site, layer]) for h, label in zip(whole, labels, strict=True) if label == name]
                assert_moments(moments, number, rows)


def test_in_float32_the_sums_add_nothing_to_the_forwards_own_error():
    model, data = build("llama"), sequences(60)
    found = fe.capture(model, None, data, at="all tokens", batch_size=1)
    for layer, moments in found.items():
        assert_moments(moments, 0, rows_of(model, "llama", "block", layer, data, "all tokens"))


def test_a_far_mean_does_not_eat_the_variance():
    model, data = build("llama"), sequences(60)
    with fe.patch(model, fe.Steer(torch.full((32,), 1000.0), layers=1)):
        found = fe.capture(model, None, data, layers=1, batch_size=1)[1]
        rows = rows_of(model, "llama", "block", 1, data, "last token")
    assert_moments(found, 0, rows)
    assert found.mean().abs().min() > 900


def test_the_encoder_alone_and_the_decoder_of_batches():
    model = exact(build("t5"))
    given = inputs("t5")
    encoder = fe.capture(model, None, sequences(10), layers="encoder")
    assert list(encoder) == [0, 1]
    both = fe.capture(model, None, [given], at="all tokens")
    assert [int(m.count) for m in both.values()] == [12, 12, 10, 10]
    with pytest.raises(ValueError, match="decoder_input_ids"):
        fe.capture(model, None, sequences(4), layers="decoder")


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_behind_the_deepest_layer_runs_and_the_model_is_left_as_it_was(family):
    model = build(family)
    model.train()
    site_module(model, family, "mlp", 0).eval()
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) for m in model.modules()]
    ran = []
    deeper = site_module(model, family, "block", 1)
    handle = deeper.register_forward_hook(lambda *a: ran.append("deeper"))
    fe.capture(model, None, sequences(6), layers=0)
    assert ran == []
    fe.capture(model, None, sequences(6), layers=[0, 1])
    assert ran == ["deeper"]
    handle.remove()
    dropping = fe.capture(model, None, sequences(6), layers=0)
    assert modes == [m.training for m in model.modules()]
    assert hooks == [len(m._forward_hooks) for m in model.modules()]
    same(dropping, fe.capture(model.eval(), None, sequences(6), layers=0))


def test_hooks_are_gone_after_an_error():
    model = build("llama")
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fe.capture(model, None, sequences(3))
    assert not any(m._forward_hooks for m in model.modules())


def test_edits_on_the_model_are_captured():
    model, data = exact(build("llama")), sequences(10)
    plain = fe.capture(model, None, data, layers=1)[1].mean()
    push = torch.randn(32)
    with fe.patch(model, fe.Steer(push, layers=1)):
        assert torch.allclose(fe.capture(model, None, data, layers=1)[1].mean(), plain + push, atol=1e-7)


def test_ready_batches_with_left_padding_and_their_own_groups():
    model = exact(build("llama"))
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    found = fe.capture(model, None, [batch | {"group": ["b", "a"]}], group_names=["a", "b"], at="first token", layers=2)
    for number, sequence in ((1, [5, 6]), (0, [7, 8, 9, 10])):
        row = hidden_states(model, "llama", [("block", 2)], sequence)["block", 2][0]
        assert torch.allclose(found[2].mean()[number], row, rtol=0, atol=1e-7)


def test_a_stream_is_read_a_window_at_a_time():
    model, ahead = build("llama"), []

    def stream():
        for number, ids in enumerate(sequences(3 * WINDOW * 2)):
            ahead.append(number)
            yield ids

    seen = []
    model.model.embed_tokens.register_forward_hook(lambda *a: seen.append(len(ahead)))
    found = fe.capture(model, None, stream(), layers=0, batch_size=2)
    assert int(found[0].count) == 3 * WINDOW * 2
    assert seen[0] == WINDOW * 2 and seen[WINDOW] == 2 * WINDOW * 2


def test_batches_are_of_like_lengths():
    model, columns = build("llama"), []
    model.model.embed_tokens.register_forward_hook(lambda m, a, out: columns.append(out.shape[:2].numel()))
    data = sequences(240, longest=12)
    fe.capture(model, None, data, layers=0, batch_size=8)
    assert sum(columns) <= 1.05 * sum(map(len, data))


# --- resume, processes, rows --------------------------------------------------------------------------------


class Killed(Exception):
    pass


def interrupted(data, after):
    for number, item in enumerate(data):
        if number == after:
            raise Killed
        yield item


def same(one, other):
    assert list(one) == list(other)
    for layer in one:
        for name, tensor in one[layer].state_dict().items():
            assert torch.equal(tensor, other[layer].state_dict()[name]), name


def test_an_interrupted_pass_goes_on_with_the_same_bits(tmp_path):
    model, data = build("llama"), sequences(3 * WINDOW * 2 + 5)
    labels = labels_of(data)
    how = {"groups": labels, "batch_size": 2, "at": "all tokens"}
    whole = fe.capture(model, None, data, **how)
    with pytest.raises(Killed):
        streamed = how | {"groups": iter(labels), "group_names": ["odd", "even"]}
        fe.capture(model, None, interrupted(data, 2 * WINDOW * 2 + 3), **streamed, resume=tmp_path, save_every=0)
    seen = []
    model.model.embed_tokens.register_forward_hook(lambda m, a, out: seen.append(len(out)))
    same(whole, fe.capture(model, None, data, **how, resume=tmp_path))
    assert sum(seen) == WINDOW * 2 + 5
    seen.clear()
    same(whole, fe.capture(model, None, data, **how, resume=tmp_path))
    assert seen == []


def test_a_state_of_other_data_or_another_pass_is_refused(tmp_path):
    model, data = build("llama"), sequences(20)
    fe.capture(model, None, data, resume=tmp_path)
    before = (tmp_path / "capture.safetensors").read_bytes()
    with pytest.raises(ValueError, match="other data"):
        fe.capture(model, None, [[7], *data[1:]], resume=tmp_path)
    with pytest.raises(ValueError, match="other data"):
        fe.capture(model, None, data[:10], resume=tmp_path)
    with pytest.raises(ValueError, match=r"another pass \(at 'last token'\)"):
        fe.capture(model, None, data, at="mean", resume=tmp_path)
    assert (tmp_path / "capture.safetensors").read_bytes() == before


def test_the_shares_of_processes_make_up_the_whole(monkeypatch):
    model, data = exact(build("llama")), sequences(50)
    monkeypatch.setattr(capturing.Moments, "all_reduce", lambda self: self)
    monkeypatch.setattr(capturing, "_summed", lambda counts, found: counts)
    shares = [
        fe.capture(model, None, data, batch_size=4, processes=types.SimpleNamespace(process_index=i, num_processes=3))
        for i in range(3)
    ]
    whole = fe.capture(model, None, data, batch_size=4)
    for layer, moments in whole.items():
        merged = shares[0][layer].merge(shares[1][layer]).merge(shares[2][layer])
        assert torch.equal(merged.count, moments.count)
        assert torch.allclose(merged.mean(), moments.mean(), rtol=0, atol=1e-7)
        assert torch.allclose(merged.variance(), moments.variance(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("at", ["last token", "all tokens"])
def test_rows_on_disk_in_the_order_of_the_data(tmp_path, at):
    model, data = exact(build("llama")), sequences(2 * WINDOW * 2 + 7)
    labels = labels_of(data)
    found = fe.capture(model, None, data, layers=[0, 2], at=at, groups=labels, batch_size=2, rows=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    rows = Rows(tmp_path)
    assert rows.layers == [0, 2] and rows.names == ["odd", "even"]
    for layer in rows.layers:
        hidden, group, index = rows.layer(layer)
        assert torch.allclose(hidden, torch.cat(rows_of(model, "llama", "block", layer, data, at)), rtol=0, atol=1e-7)
        assert [rows.names[g] for g in group] == [labels[i] for i in index]
        assert torch.allclose(hidden[group == 1].mean(0), found[layer].mean()[1])
    with pytest.raises(ValueError, match="another pass"):
        fe.capture(model, None, data, rows=tmp_path)


def test_rows_of_an_interrupted_pass_are_whole(tmp_path):
    model, data = build("llama"), sequences(3 * WINDOW * 2)
    fe.capture(model, None, data, layers=1, batch_size=2, rows=tmp_path / "whole")
    how = {"layers": 1, "batch_size": 2, "rows": tmp_path / "again", "resume": tmp_path / "sums"}
    with pytest.raises(Killed):
        fe.capture(model, None, interrupted(data, WINDOW * 5), **how)
    with pytest.raises(ValueError, match="another pass"):
        fe.capture(model, None, data, **how | {"resume": tmp_path / "other"})
    fe.capture(model, None, data, **how)
    again, whole = (Rows(tmp_path / name).layer(1) for name in ("again", "whole"))
    assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data": "a text"}, "expected a list of texts"),
        ({"data": []}, "data is empty"),
        ({"data": ["a text"]}, "tokenizer is None"),
        ({"data": [[3], []]}, "item 1 has no tokens"),
        ({"data": [[3] * 65]}, "has 65 tokens, the model takes 64; max_length=64"),
        ({"data": [[3], {"input_ids": torch.ones(1, 2)}]}, "ready batches beside token ids"),
        ({"data": [{"attention_mask": torch.ones(1, 2)}]}, "expected a tensor input_ids"),
        ({"data": [{"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(2, 4)}]}, "expected one number per token"),
        ({"data": [{"input_ids": torch.ones(2, 3), "attention_mask": torch.eye(2, 3) * 0}]}, "without a token"),
        ({"data": [{"input_ids": torch.ones(2, 3).long(), "group": [0, 1]}]}, "group_names"),
        ({"groups": ["a"]}, "groups has 1 labels for 4"),
        ({"groups": list("abab"), "group_names": ["a"]}, "item 1 is of group 'b'"),
        ({"groups": iter("abab")}, "group_names"),
        ({"at": "middle"}, "at is 'middle'"),
        ({"site": "nowhere"}, "no site"),
        ({"layers": 7}, "no layer 7"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_what_cannot_be_captured(changes, message):
    given = {"data": [[3, 4]] * 4} | changes
    with pytest.raises((ValueError, TypeError), match=message):
        fe.capture(build("llama"), None, given.pop("data"), **given)


def test_texts_are_cut_only_when_asked():
    found = fe.capture(build("llama"), None, [[3] * 70], max_length=8, layers=0, at="all tokens")
    assert int(found[0].count) == 8


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sites_that_are_no_modules_output(family):
    """ffn_in is an input, GPT-2's q a part of a fused projection, embed the input of the first layer, final a norm's."""
    model, data = exact(build(family)), sequences(12)
    for site in ("ffn_in", "q", "embed", "final"):
        found = fe.capture(model, None, data, site=site, batch_size=4)
        seen = []
        layer, moments = next(iter(found.items()))
        with fe.patch(model, fe.Probe(torch.eye(moments.mean().shape[1])[:8], site=site, layers=layer)) as handle:
            for ids in data:
                with torch.no_grad():
                    model(input_ids=torch.tensor([ids]))
                seen.append(handle.readings[0][0, 0, -1:])
        assert torch.allclose(moments.mean()[0, :8], torch.cat(seen).double().mean(0), rtol=0, atol=1e-6), site
    with fe.patch(model, fe.Steer(torch.ones(32), site="embed")), pytest.raises(ValueError, match="before that"):
        fe.capture(model, None, data, site="embed")
