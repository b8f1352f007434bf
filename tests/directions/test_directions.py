"""Directions: how they are found, their arithmetic and their files."""

import os
import struct
import types

import numpy as np
import pytest
import torch
from tiny_models import build, exact, site_module

import fastedit as fe
from fastedit.capturing import capture as capturing
from fastedit.directions import contrast as contrasting
from fastedit.interop import control_vectors

DIRECTIONS = {1: torch.tensor([3.0, 0.0, 4.0]), 4: torch.tensor([0.0, 2.0, 0.0])}


def sets(count=24, seed=0):
    """Token ids in pairs that differ in their last token: 40 to 42 for positive, 10 to 12 for negative."""
    generator = torch.Generator().manual_seed(seed)
    positive, negative = [], []
    for _ in range(count):
        start = torch.randint(20, 40, (4,), generator=generator).tolist()
        positive.append(start + torch.randint(40, 43, (1,), generator=generator).tolist())
        negative.append(start + torch.randint(10, 13, (1,), generator=generator).tolist())
    return positive, negative


def last_tokens(model, layer, data):
    """(n, width) float64, of each sequence on its own."""
    rows = []
    hook = site_module(model, "llama", "block", layer).register_forward_hook(
        lambda m, a, out: rows.append((out[0] if isinstance(out, tuple) else out)[0, -1].double())
    )
    with torch.no_grad():
        for ids in data:
            model(input_ids=torch.tensor([ids]))
    hook.remove()
    return torch.stack(rows)


@pytest.fixture(scope="module")
def model():
    return exact(build("llama"))


# --- how they are found -------------------------------------------------------------------------------------


def test_contrast_of_means(model):
    positive, negative = sets()
    found = fe.contrast(model, None, positive, negative[:20])
    assert found.layers == (0, 1, 2) and found.about == {
        "method": "mean", "site": "block", "at": "last token", "model": None, "type": "llama",
    }  # fmt: skip
    for layer in found:
        high, low = last_tokens(model, layer, positive), last_tokens(model, layer, negative[:20])
        expected = high.mean(0) - low.mean(0)
        assert found[layer].dtype == torch.float32
        assert torch.allclose(found[layer].double(), expected, rtol=0, atol=1e-6 * expected.abs().max().item())
        within = ((high.var(0).sum() + low.var(0).sum()) / 2).sqrt()
        noted = found.statistics[layer]
        assert (noted["positive"], noted["negative"]) == (24, 20)
        assert noted["norm"] == pytest.approx(expected.norm().item(), rel=1e-6)
        assert noted["residual"] == pytest.approx(torch.cat([high, low]).square().sum(1).mean().sqrt().item(), rel=1e-6)
        assert noted["separation"] == pytest.approx((expected.norm() / within).item(), rel=1e-6)


@pytest.mark.parametrize("centre", [False, True])
def test_the_first_component_of_paired_differences(model, centre):
    positive, negative = sets()
    found = fe.contrast(model, None, positive, negative, method="pca", layers=[1, 2], centre=centre)
    for layer in (1, 2):
        high, low = last_tokens(model, layer, positive), last_tokens(model, layer, negative)
        pairs = high - low
        pairs = pairs - pairs.mean(0) if centre else pairs
        values, vectors = torch.linalg.eigh(pairs.T @ pairs)
        expected = vectors[:, -1]
        expected = expected * torch.sign(expected @ (high - low).mean(0))
        assert torch.allclose(found[layer].double(), expected, rtol=0, atol=1e-5)
        assert found.statistics[layer]["explained"] == pytest.approx((values[-1] / values.sum()).item(), rel=1e-6)


def test_probes_are_judged_on_what_they_were_not_fitted_to(model):
    positive, negative = sets(40)
    for probe in ("logistic", "mass-mean"):
        found = fe.contrast(model, None, positive, negative, method="probe", probe=probe, layers=0, held_out=0.25)
        noted = found.statistics[0]
        assert noted["held_out"] == 20 and noted["accuracy"] >= 0.9 and found.best() == 0
        high, low = last_tokens(model, 0, positive), last_tokens(model, 0, negative)
        order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
        score = lambda rows: rows @ found[0].double() + noted["offset"]  # noqa: E731
        right = [(score(rows[order[:10]]) > 0).double().mean().item() for rows in (high, low)]
        assert noted["accuracy"] == pytest.approx((right[0] + 1 - right[1]) / 2)
        if probe == "mass-mean":
            expected = high[order[10:]].mean(0) - low[order[10:]].mean(0)
            assert torch.allclose(found[0].double(), expected, rtol=0, atol=1e-5)
    assert found.about["method"] == "mass-mean probe"


SAVE = capturing._State.save


def _save_now(self, *sums, now=True):
    SAVE(self, *sums, now=True)


@pytest.mark.parametrize("method", ["mean", "pca"])
def test_a_contrast_goes_on_where_it_was_interrupted(model, tmp_path, monkeypatch, method):
    positive, negative = sets(40)
    expected = fe.contrast(model, None, positive, negative, method=method, batch_size=1)
    forward, forwards = type(model.model).forward, []

    def dies(self, *args, **kwargs):
        forwards.append(1)
        if len(forwards) == 70:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", dies)
    monkeypatch.setattr(capturing._State, "save", _save_now)
    with pytest.raises(KeyboardInterrupt):
        fe.contrast(model, None, positive, negative, method=method, batch_size=1, resume=tmp_path)
    found = fe.contrast(model, None, positive, negative, method=method, batch_size=1, resume=tmp_path)
    assert found == expected and found.statistics == expected.statistics
    assert len(forwards) == 70 + 80 - 64  # windows of 32 batches: two were done


def test_labels_that_mean_nothing_are_guessed_held_out_and_learnt_by_heart(model):
    generator = torch.Generator().manual_seed(3)
    data = [torch.randint(3, 60, (5,), generator=generator).tolist() for _ in range(64)]
    noted = fe.contrast(model, None, data[:32], data[32:], method="probe", layers=2, held_out=0.5).statistics[2]
    assert noted["fitted_accuracy"] == 1.0 and 0.2 <= noted["accuracy"] <= 0.8


def test_a_logistic_probe_agrees_with_scikit_learn_on_standardised_features():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    generator = torch.Generator().manual_seed(0)
    high = torch.randn(30, 4, generator=generator, dtype=torch.float64) * torch.tensor([1, 10, 0.1, 1]) + 0.5
    low = torch.randn(30, 4, generator=generator, dtype=torch.float64) * torch.tensor([1, 10, 0.1, 1])
    vector, offset = contrasting._logistic(high, low, 0)
    rows, labels = torch.cat([high, low]).numpy(), [1] * 30 + [0] * 30
    expected = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(rows, labels)
    margin = torch.from_numpy(expected.decision_function(rows))
    mine = torch.cat([high, low]) @ vector + offset
    assert vector.norm().item() == pytest.approx(1)
    assert torch.allclose(mine / mine.norm(), margin / margin.norm(), atol=2e-3)  # n − 1 and n in the deviation


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"method": "median"}, "method is 'median'"),
        ({"probe": "forest"}, "probe is 'forest'"),
        ({"at": "all tokens"}, "one row per text"),
        ({"positive": []}, "positive is empty"),
        ({"negative": "a text"}, "negative is one text"),
        ({"method": "pca", "negative": [[3]]}, "found 4 positive and 1 negative"),
        ({"method": "probe", "held_out": 1.0}, "held_out is 1.0"),
        ({"method": "probe", "negative": [[3]] * 3}, "needs 4 texts"),
        ({"method": "pca", "positive": [[3, 4]] * 4}, "pairs do not differ"),
        ({"layers": 9}, "no layer 9"),
    ],
)
def test_what_cannot_be_contrasted(model, changes, message):
    given = {"positive": [[4, 5]] * 4, "negative": [[3, 4]] * 4} | changes
    with pytest.raises((ValueError, TypeError), match=message):
        fe.contrast(model, None, given.pop("positive"), given.pop("negative"), **given)


def test_directions_steer_and_ablate_as_they_are(model):
    positive, negative = sets(8)
    found = fe.contrast(model, None, positive, negative).at(1, 2)
    before = last_tokens(model, 2, positive)
    with fe.patch(model, fe.Steer(found, layers=2, strength=2.0)):
        assert torch.allclose(last_tokens(model, 2, positive), before + 2 * found[2], atol=1e-6)
    with fe.patch(model, fe.Ablate(found)) as handle:
        assert [config["layers"] for config in handle.config()] == [[1, 2]]
        assert (last_tokens(model, 2, positive) @ found[2].double()).abs().max() < 1e-5


@pytest.mark.slow
def test_moods_in_a_real_model(chat_model):
    """Whether a sentence is happy or sad shows at the mean of its tokens, once sinks are left out."""
    from fastedit import examples

    sets = [examples.lines(path) for path in (examples.HAPPY, examples.SAD)]
    found = fe.contrast(*chat_model, *sets, at="mean", method="probe", probe="mass-mean")
    assert found.statistics[found.best()]["accuracy"] >= 0.95
    assert found.statistics[15]["sinks"] == 80 and found.statistics[15]["tokens"] > 900  # the first token of each


# --- arithmetic ---------------------------------------------------------------------------------------------


def test_arithmetic():
    one = fe.Directions(DIRECTIONS, {1: {"norm": 5.0}}, {"method": "mean", "site": "block"})
    other = fe.Directions({1: torch.tensor([1.0, 1.0, 1.0]), 2: torch.tensor([0.0, 0.0, 1.0])})
    assert (one + other).layers == (1, 2, 4)
    assert torch.equal((one + other)[1], torch.tensor([4.0, 1.0, 5.0]))
    assert torch.equal((one - other)[2], torch.tensor([0.0, 0.0, -1.0]))
    assert torch.equal((-one)[4], torch.tensor([0.0, -2.0, 0.0]))
    assert 2 * one == one * 2 == one + one and one / 2 == 0.5 * one
    assert (one + other).statistics == {} and (2 * one).about == {"site": "block"}
    assert torch.equal(one.normalised()[1], torch.tensor([0.6, 0.0, 0.8]))
    assert one.at(1).statistics == {1: {"norm": 5.0}} and one.at(1).layers == (1,)
    with pytest.raises(TypeError):
        one * "2"
    with pytest.raises(TypeError):
        one + 1
    with pytest.raises(ValueError, match="width 3 and of width 2"):
        one + fe.Directions({1: torch.ones(2)})
    with pytest.raises(ValueError, match="layer 2 is zero"):
        fe.Directions({2: torch.zeros(3)}).normalised()
    with pytest.raises(ValueError, match="finite number"):
        one * float("nan")


def test_the_earliest_of_the_best_neighbours():
    vectors = {layer: torch.ones(3) for layer in range(2, 8)}

    def noted(name, values, **more):
        return fe.Directions(vectors, {n: {name: v} | more for n, v in zip(vectors, values, strict=True)})

    accurate = noted("accuracy", [0.5, 0.9, 0.9, 0.8, 1.0, 0.9], held_out=10)
    assert accurate.window(2) == (3, 4) and accurate.window(1) == (3,)  # within one text of ten of the best
    assert noted("accuracy", [0.5, 0.9, 0.9, 0.8, 1.0, 0.9], held_out=100).window(2) == (6, 7)
    assert noted("separation", [0.1, 0.2, 0.39, 0.39, 0.4, 0.4]).window(2) == (4, 5)
    for count in (0, 7, True):
        with pytest.raises(ValueError, match="from 1 to 6"):
            accurate.window(count)
    with pytest.raises(KeyError, match="neither"):
        noted("norm", [1.0] * 6).window(2)


def test_lengths_relative_to_the_residuals():
    found = fe.Directions(DIRECTIONS, {1: {"residual": 20.0}, 4: {"residual": 3.0}})
    torch.testing.assert_close(found.relative(0.1)[1], torch.tensor([1.2, 0.0, 1.6]))
    torch.testing.assert_close(found.relative(-0.5)[4], torch.tensor([0.0, -1.5, 0.0]))
    with pytest.raises(ValueError, match=r"not known at layers \[4\]"):
        fe.Directions(DIRECTIONS, {1: {"residual": 20.0}}).relative(0.1)
    with pytest.raises(ValueError, match="share is nan"):
        found.relative(float("nan"))


def test_project_out_leaves_nothing_along_the_others():
    generator = torch.Generator().manual_seed(0)
    one, two, three = (
        fe.Directions({layer: torch.randn(16, generator=generator) for layer in (0, 3)}) for _ in range(3)
    )
    left = one.project_out(two, three)
    for layer in (0, 3):
        span = torch.stack([two[layer], three[layer]]).double()
        assert (span @ left[layer].double()).abs().max() < 1e-6
        gone = one[layer].double() - left[layer].double()
        coefficients = torch.linalg.lstsq(span.T, gone).solution
        assert torch.allclose(coefficients @ span, gone, atol=1e-6)
    with pytest.raises(ValueError, match=r"at layers \[3\]"):
        one.project_out(two.at(0))


@pytest.mark.parametrize(
    "vectors, message",
    [
        ({}, "mapping"), (torch.ones(3), "mapping"), ({-1: torch.ones(3)}, "-1"), ({"1": torch.ones(3)}, "'1'"),
        ({1: torch.ones(3), 2: torch.ones(2)}, "shapes"), ({1: torch.ones(1, 3)}, "shapes"),
        ({1: torch.tensor([1.0, float("nan")])}, "NaN"), ({1: torch.ones(3).long()}, "dtype"),
    ],
)  # fmt: skip
def test_what_is_no_directions(vectors, message):
    with pytest.raises((ValueError, TypeError), match=message):
        fe.Directions(vectors)


# --- files --------------------------------------------------------------------------------------------------


def test_saved_and_loaded(tmp_path):
    saved = fe.Directions(DIRECTIONS, {1: {"norm": 5.0}, 4: {"norm": 2.0}}, {"method": "mean", "type": "llama"})
    saved.save(tmp_path / "new" / "folder")
    (2 * saved).save(tmp_path / "new" / "folder")
    saved.save(tmp_path / "new" / "folder")
    loaded = fe.Directions.load(tmp_path / "new" / "folder")
    assert loaded == saved and loaded.statistics == saved.statistics and loaded.about == saved.about
    assert [p.name for p in (tmp_path / "new" / "folder").iterdir()] == ["directions.safetensors"]


def test_damaged_files_are_refused(tmp_path):
    with pytest.raises(fe.DirectionsFileError, match=r"has no directions\.safetensors"):
        fe.Directions.load(tmp_path)
    fe.Directions(DIRECTIONS).save(tmp_path)
    path = tmp_path / "directions.safetensors"
    whole = path.read_bytes()
    for content, said in (
        (whole[:-1] + b"\x01", "checksum"), (whole[:-1], "checksum"), (b"", "announces a header"),
        (whole.replace(b'"version":"2"', b'"version":"9"'), "version '9'"), (whole.replace(b'"sha256"', b'"sha257"'), "metadata"),
    ):
        path.write_bytes(content)
        with pytest.raises(fe.DirectionsFileError, match=said):
            fe.Directions.load(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(fe.DirectionsFileError, match="is not a regular file"):
        fe.Directions.load(tmp_path)


def test_two_writers_of_one_folder_leave_one_of_theirs(tmp_path):
    """Each saves its own again and again; whatever order, what is there is whole, and one of the two."""
    from test_store_files import fork

    made = [fe.Directions({1: torch.full((64,), float(n + 1))}) for n in range(2)]
    children = []
    for directions in made:
        pid = fork()
        if pid == 0:
            for _ in range(30):
                directions.save(tmp_path)
            os._exit(0)
        children.append(pid)
    seen = 0
    while seen < 20 or children:
        if (tmp_path / "directions.safetensors").exists():
            assert fe.Directions.load(tmp_path) in made
            seen += 1
        children = [pid for pid in children if os.waitpid(pid, os.WNOHANG) == (0, 0)]
    assert [path.name for path in tmp_path.iterdir()] == ["directions.safetensors"]


# --- control vectors ----------------------------------------------------------------------------------------


def test_gguf_both_ways(tmp_path):
    gguf = pytest.importorskip("gguf")
    saved = fe.Directions(DIRECTIONS, about={"type": "llama", "site": "block"})
    path = saved.save_gguf(tmp_path / "vector.gguf")
    reader = gguf.GGUFReader(path)
    assert [(t.name, t.data.dtype, t.data.tolist()) for t in reader.tensors] == [
        ("direction.1", np.float32, [3.0, 0.0, 4.0]), ("direction.4", np.float32, [0.0, 2.0, 0.0]),
    ]  # fmt: skip
    text = lambda name: bytes(reader.get_field(name).parts[-1]).decode()  # noqa: E731
    assert text("general.architecture") == "controlvector" and text("controlvector.model_hint") == "llama"
    assert reader.get_field("controlvector.layer_count").parts[-1][0] == 2
    loaded = fe.Directions.load_gguf(path)
    assert loaded == saved and loaded.about["type"] == "llama"
    path.chmod(0o600)
    saved.save_gguf(path)
    assert [p.name for p in tmp_path.iterdir()] == ["vector.gguf"] and path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (struct.pack("<IIQ", 9, 7, 1 << 20), "announces 1,048,576 values in an array"),
        (struct.pack("<IIQIQ", 9, 9, 1, 9, 1 << 20), "announces 1,048,576 values in an array"),
        (struct.pack("<IIQ", 9, 4, 100), "ends within its header"), (struct.pack("<IQ", 8, 1 << 62), "ends within its header"),
        (struct.pack("<IB", 13, 0), "unknown kind 13"),
    ],
)  # fmt: skip
def test_gguf_headers_that_announce_what_is_not_there(tmp_path, value, said):
    """gguf's reader reads on behind the end of a file, as often as its header says."""
    pytest.importorskip("gguf")
    path = tmp_path / "vector.gguf"
    path.write_bytes(struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 3) + b"key" + value)
    with pytest.raises(fe.DirectionsFileError, match=said):
        fe.Directions.load_gguf(path)


def test_gguf_refusals(tmp_path):
    gguf = pytest.importorskip("gguf")
    with pytest.raises(ValueError, match="layer 0"):
        fe.Directions({0: torch.ones(2)}).save_gguf(tmp_path / "vector.gguf")
    with pytest.raises(ValueError, match="site 'mlp'"):
        fe.Directions(DIRECTIONS, about={"site": "mlp"}).save_gguf(tmp_path / "vector.gguf")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "no.gguf").write_bytes(b"not one")
    with pytest.raises(fe.DirectionsFileError, match="not a GGUF"):
        fe.Directions.load_gguf(tmp_path / "no.gguf")
    for architecture, name, array, message in (
        ("llama", "direction.1", np.ones(2, np.float32), "architecture 'llama'"),
        ("controlvector", "token_embd", np.ones(2, np.float32), "token_embd"),
        ("controlvector", "direction.1", np.ones((2, 2), np.float32), "F32 vectors"),
        ("controlvector", "direction.1", np.full(2, np.nan, np.float32), "NaN"),
    ):
        writer = gguf.GGUFWriter(tmp_path / "other.gguf", architecture)
        writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(fe.DirectionsFileError, match=message):
            fe.Directions.load_gguf(tmp_path / "other.gguf")


def test_a_control_vector_of_repeng():
    vector = types.SimpleNamespace(model_type="mistral", directions={2: np.array([1.0, 2.0], np.float64)})
    found = control_vectors.from_repeng(vector)
    assert torch.equal(found[2], torch.tensor([1.0, 2.0])) and found.about["type"] == "mistral"
    with pytest.raises(TypeError, match="repeng ControlVector"):
        control_vectors.from_repeng({1: np.ones(2)})
