"""Pictures of what the library holds: matplotlib axes with the right numbers, in one style, and no backend chosen."""

import subprocess
import sys

import numpy as np
import pytest
import tiny_models as tiny
import torch

import fastedit as fe

plt = pytest.importorskip("matplotlib.pyplot", reason="needs matplotlib")
plt.switch_backend("Agg")


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def image(axes):
    return np.asarray(axes.images[0].get_array())


def test_a_handle_draws_scale_and_bias_by_layer():
    model = tiny.build("llama")
    handle = fe.patch(model, [fe.RED(), fe.LoReFT(2, site="block", layers=[0, 2])])
    for name, tensor in handle.named_tensors().items():
        tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))))
    scale, bias, *low = handle.plot()
    held = handle.named_tensors()
    expected = torch.stack([held[f"0.layers.{layer}.mlp.scale"] - 1 for layer in range(3)])
    np.testing.assert_allclose(image(scale), expected, rtol=1e-6)
    np.testing.assert_allclose(image(bias), torch.stack([held[f"0.layers.{layer}.mlp.bias"] for layer in range(3)]), rtol=1e-6)
    assert scale.get_title(loc="left") == "edit 0 at mlp" and all(image(one).shape == (2, 2) for one in low)
    _, own = plt.subplots(1, 2 + len(low))
    assert handle.plot(list(own)) == list(own)
    with pytest.raises(ValueError, match="this picture needs"):
        handle.plot(own[0])


def test_readings_sweeps_directions_and_captures_draw():
    model, ids = tiny.build("llama"), tiny.inputs("llama")["input_ids"]
    handle = fe.patch(model, fe.Probe(torch.eye(32)[:2], layers=[0, 2]))
    with pytest.raises(IndexError, match="run a forward first"):
        handle.readings.plot()
    with torch.no_grad():
        model(ids)
    axes = handle.readings.plot(probe=1, sequence=1, tokens=list("abcdefg"))
    np.testing.assert_allclose(image(axes), handle.readings[0][:, 1, :, 1], rtol=1e-6)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "2"]
    handle.remove()
    captured = fe.capture(model, None, [row.tolist() for row in ids], groups=["x", "y"], layers=[0, 1], progress=False)
    means, spreads = captured.plot()
    np.testing.assert_allclose(means.lines[1].get_ydata(), [float(captured[k].mean()[1].norm()) for k in (0, 1)])
    assert [text.get_text() for text in means.get_legend().get_texts()] == ["x", "y"] and len(spreads.lines) == 2
    vectors = {0: torch.ones(32), 1: torch.ones(32)}
    with pytest.raises(ValueError, match="no statistics"):
        fe.Directions(vectors).plot()
    noted = {layer: {"separation": 1.5 + layer, "accuracy": 0.9, "fitted_accuracy": 1.0} for layer in vectors}
    accuracy, separation = fe.Directions(vectors, noted).plot()
    assert [bar.get_height() for bar in separation.patches] == [1.5, 2.5] and len(accuracy.lines) == 3
    found = fe.sweep(model, fe.Directions(vectors), lambda m: [1.0, 3.0], doses=[1.0, 2.0], progress=False)
    assert image(found.plot()).shape == (2, 2)


def test_pictures_in_files_open_nothing_and_choose_no_backend(tmp_path):
    code = (
        "import sys, torch, fastedit as fe; from fastedit.plots import directions, probes, sweep, tokens, edits, style\n"
        "noted = {0: {'separation': 1.0}}\n"
        f"directions.write(fe.Directions({{0: torch.ones(4)}}, noted), {str(tmp_path / 'a.svg')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "a.svg").read_text().lstrip().startswith("<?xml")


def test_show_draws_bars(tmp_path):
    from test_cli import invoke

    from fastedit.cli.show import bar

    assert (bar(1.0, 1.0, 4), bar(0.5, 1.0, 4), bar(0.0, 1.0), bar(1 / 32, 1.0, 4)) == ("████", "██", "", "▏")
    noted = {layer: {"separation": 1.0 + layer} for layer in (0, 1)}
    fe.Directions({0: torch.ones(4), 1: torch.ones(4)}, noted).save(tmp_path)
    said = invoke("show", tmp_path)
    assert "separation" in said and "█" * 12 in said and "2.000" in said
