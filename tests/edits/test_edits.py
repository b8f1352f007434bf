"""Edits as objects: what each does to hidden states, by its formula, and what is refused."""

import json
import types

import pytest
import torch

import fastedit as fe
from fastedit.edits.config import from_config
from fastedit.edits.per_layer import Spot

WIDTH = 8
SPOT = Spot("layers.1", index=1, total=3, order=0, count=1)


def form(edit, spot=SPOT, width=WIDTH):
    return edit.form(edit.tensors(spot, width))


def applied(edit, h, spot=SPOT):
    """The edit on float64 rows, from its fp32 tensors."""
    wide = type(form(edit, spot))(*(None if t is None else t.double() for t in form(edit, spot).tensors()))
    return wide(h)


def rows():
    return torch.randn(6, WIDTH, dtype=torch.float64)


def unit(v):
    return (v / v.norm(dim=-1, keepdim=True)).double()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_each_edit_is_its_formula():
    h, v, w = rows(), torch.randn(WIDTH), torch.randn(WIDTH)
    s, b = torch.randn(WIDTH), torch.randn(WIDTH)
    read, offset, write = torch.randn(3, WIDTH), torch.randn(3), torch.randn(3, WIDTH)
    u = unit(v)
    along = h @ u
    close(applied(fe.ScaleBias(s, b), h), h * s + b)
    close(applied(fe.ScaleBias(s, bias=False), h), h * s)
    close(applied(fe.Steer(v), h), h + v)
    close(applied(fe.Ablate(v), h), h - along[:, None] * u)
    close(applied(fe.Clamp(v, 2.5), h), h + (2.5 - along)[:, None] * u)
    close(applied(fe.Amplify(v, 3.0), h), h + 2.0 * along[:, None] * u)
    close(applied(fe.LowRank(read, offset, write), h), h + (h @ read.T.double() + offset) @ write.double())
    close(applied(fe.LowRank(read, None, write), h), h + (h @ read.T.double()) @ write.double())
    both = fe.Ablate(torch.stack([v, w]))
    basis, _ = torch.linalg.qr(torch.stack([v, w]).double().T)
    close(applied(both, h), h - h @ basis @ basis.T)


@pytest.mark.parametrize("edit", [fe.RED(), fe.ScaleBias(), fe.DiReFT(3), fe.NoReFT(3)])
def test_trainable_edits_start_as_the_identity(edit):
    h = rows()
    assert torch.equal(applied(edit, h), h) and edit.trainable


def test_noreft_trains_w_and_r_apart():
    edit = fe.NoReFT(2)
    masters = {n: t.double().requires_grad_() for n, t in edit.tensors(SPOT, WIDTH).items()}
    w, c, r = masters["source"], masters["offset"], masters["write"]
    with torch.no_grad():
        w.add_(torch.randn_like(w))
    h = rows()
    out = edit.form(masters)(h)
    torch.testing.assert_close(out, h + (h @ w.T + c - h @ r.T) @ r)
    out.square().sum().backward()
    assert all(t.grad.abs().max() > 0 for t in masters.values())


def test_rotation_turns_the_first_direction_towards_the_second():
    e = torch.eye(WIDTH)
    quarter = fe.Rotate(torch.stack([e[0], e[0] + e[1]]), torch.pi / 2)
    close(applied(quarter, e[:3].double()), torch.stack([e[1], -e[0], e[2]]).double())
    h = rows()
    close(applied(fe.Rotate(torch.randn(2, WIDTH), 0.7), h).norm(dim=1), h.norm(dim=1))


def test_dependent_directions_count_once():
    v = torch.randn(WIDTH)
    edit = fe.Ablate(torch.stack([v, 2 * v, torch.randn(WIDTH)]))
    assert edit.rank == 2
    by_layer = fe.Ablate({0: v, 1: torch.randn(3, WIDTH)})
    assert by_layer.rank == 3 and by_layer.layers == (0, 1)
    h = rows()
    close(applied(by_layer, h, Spot("layers.0", 0, 3)), h - (h @ unit(v))[:, None] * unit(v))


def test_starts_differ_by_layer_and_seed_and_leave_the_random_state():
    before = torch.get_rng_state()
    reads = [
        fe.DiReFT(2, seed=seed).tensors(Spot("x", index, 3), WIDTH)["read"]
        for seed in (0, 1)
        for index in (0, 1)
    ]
    again = fe.DiReFT(2).tensors(Spot("x", 0, 3), WIDTH)["read"]
    assert torch.equal(reads[0], again) and torch.equal(torch.get_rng_state(), before)
    assert len({tuple(r.flatten().tolist()) for r in reads}) == 4


def test_values_by_layer():
    stack = torch.randn(3, WIDTH)

    def at(edit, spot):
        return edit.tensors(spot, WIDTH)["bias"]

    assert torch.equal(at(fe.Steer(stack), SPOT), stack[1])
    assert torch.equal(at(fe.Steer(stack[:2]), Spot("layers.2", 2, 3, order=1, count=2)), stack[1])
    named = fe.Steer({1: stack[0], -1: stack[2]})
    assert named.layers == (-1, 1)
    assert torch.equal(at(named, SPOT), stack[0]) and torch.equal(at(named, Spot("layers.2", 2, 3)), stack[2])

    vectors = types.SimpleNamespace(directions={1: stack[1].numpy()})
    assert torch.equal(at(fe.Steer(vectors), SPOT), stack[1])
    with pytest.raises(ValueError, match=r"nothing for layer layers.1.*\[0\]"):
        at(fe.Steer({0: stack[0]}, layers=[0, 1]), SPOT)


def test_an_edit_keeps_its_own_copy():
    v = torch.ones(WIDTH, dtype=torch.bfloat16)
    edit = fe.Steer(v)
    v.zero_()
    bias = edit.tensors(SPOT, WIDTH)["bias"]
    assert bias.dtype is torch.float32 and bias.sum() == WIDTH


@pytest.mark.parametrize("make, error, says", [
    (lambda: fe.Steer(torch.tensor([1.0, float("nan")])), ValueError, "1 values that are NaN or infinite"),
    (lambda: fe.Steer({2: torch.tensor([float("inf")])}), ValueError, r"vectors\[2\]"),
    (lambda: fe.Steer(torch.tensor([1e39], dtype=torch.float64)), ValueError, "infinite in fp32"),
    (lambda: fe.Steer(torch.ones(4, dtype=torch.int64)), TypeError, "torch.int64, expected a floating dtype"),
    (lambda: fe.Steer(torch.ones(2, 3, 4)), ValueError, r"shape \(2, 3, 4\), expected \(width,\)"),
    (lambda: fe.Steer({}), ValueError, "empty mapping"),
    (lambda: fe.Steer({"a": torch.ones(4)}), TypeError, "layer numbers"),
    (lambda: fe.Steer({0: torch.ones(4), 1: torch.ones(5)}), ValueError, "different widths"),
    (lambda: fe.ScaleBias(False, False), ValueError, "nothing is left"),
    (lambda: fe.RED(site="elsewhere"), ValueError, "no site 'elsewhere'.*'mlp'"),
    (lambda: fe.RED(positions="last"), ValueError, "'last 4'"),
    (lambda: fe.RED(layers=[]), ValueError, "layers is empty"),
    (lambda: fe.RED(layers=[1.5]), TypeError, "1.5"),
    (lambda: fe.RED(strength=float("inf")), ValueError, "strength is inf"),
    (lambda: fe.RED(strength="much"), ValueError, "strength is 'much'"),
    (lambda: fe.Ablate(torch.zeros(4)), ValueError, "all zero"),
    (lambda: fe.Ablate(torch.eye(65)), ValueError, "rank 65.*64"),
    (lambda: fe.DiReFT(65), ValueError, "rank is 65"),
    (lambda: fe.DiReFT(0), ValueError, "rank is 0"),
    (lambda: fe.Clamp(torch.ones(4), float("nan")), ValueError, "value is nan"),
    (lambda: fe.Rotate(torch.ones(3, 4), 0.1), ValueError, "3 rows"),
    (lambda: fe.Rotate(torch.ones(2, 4), 0.1), ValueError, "parallel"),
    (lambda: fe.LowRank(torch.ones(2, 4), None, torch.ones(3, 4)), ValueError, r"ranks \[2, 3\]"),
    (lambda: fe.LowRank(torch.ones(2, 4), torch.ones(1), torch.ones(2, 4)), ValueError, r"ranks \[1, 2\]"),
])  # fmt: skip
def test_bad_input_is_refused_when_the_edit_is_made(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_the_wrong_width_is_refused_for_its_layer():
    with pytest.raises(ValueError, match=r"bias has width 4, but site 'block' of layer layers.1 is 8 wide"):
        fe.Steer(torch.ones(4)).tensors(SPOT, WIDTH)
    with pytest.raises(ValueError, match="read has width 4"):
        fe.LowRank(torch.ones(2, 4), torch.ones(2), torch.ones(2, 8)).tensors(SPOT, WIDTH)


def stack():
    v, plane = torch.randn(WIDTH), torch.randn(2, WIDTH)
    return [
        fe.RED(), fe.ScaleBias(bias=False, trainable=False), fe.Steer({0: v, 2: v}, strength=2.0),
        fe.Ablate(plane, layers=range(2), site="attn"), fe.Clamp(v, 1.5), fe.Amplify(v, 0.5),
        fe.Rotate(plane, 0.25),
        fe.LowRank(plane, torch.ones(2), plane), fe.LowRank(plane, None, plane), fe.DiReFT(3), fe.NoReFT(2),
    ]  # fmt: skip


def test_edits_survive_their_config():
    made = stack()
    configs = json.loads(json.dumps([edit.config() for edit in made]))
    again = from_config(configs)
    assert [type(e) for e in again] == [type(e) for e in made]
    assert [e.config() for e in again] == configs
    h = rows()
    for old, new in zip(made, again, strict=True):
        here = Spot("layers.0", 0, 3)
        assert new.trainable == old.trainable
        assert {n: t.shape for n, t in old.tensors(here, WIDTH).items()} == {
            n: t.shape for n, t in new.tensors(here, WIDTH).items()
        }
        assert torch.equal(applied(new, h, here), h), "a rebuilt edit must change nothing before it is loaded"


@pytest.mark.parametrize("change, says", [
    ({"kind": "Steel"}, "unknown kind of edit 'Steel'"), ({"site": "nowhere"}, "no site 'nowhere'"),
    ({"colour": 1}, "unknown key 'colour'"), ({"tensors": ["bias", "gain"]}, "gain"),
    ({"tensors": []}, "tensors is"),
    ({"rank": 2}, "rank is 2"), ({"rank": -1}, "rank is -1"),
])  # fmt: skip
def test_an_unknown_config_is_refused_by_name(change, says):
    config = fe.Steer(torch.ones(WIDTH)).config() | change
    with pytest.raises(ValueError, match=says):
        from_config([config])
