"""The examples of docs/frameworks.md, as they stand on the page."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "frameworks.md").read_text()
EXAMPLES = dict(re.findall(r"^## (\S[^\n]*)\n(?:(?!^## ).)*?^```python\n(.*?)^```", PAGE, re.S | re.M))


def run(title):
    names = {}
    exec(compile(EXAMPLES[title], f"docs/frameworks.md, {title}", "exec"), names)
    return names


def test_the_page_has_an_example_for_each():
    assert list(EXAMPLES) == ["NumPy", "CuPy", "JAX"]


def test_numpy():
    names = run("NumPy")
    hidden, edited = names["hidden"], names["edited"]
    np.testing.assert_array_equal(edited, names["scale"] * hidden + names["bias"])
    np.testing.assert_allclose(names["d_scale"], (edited * hidden).sum((0, 1)), rtol=1e-4)
    np.testing.assert_array_equal(names["d_hidden"], names["scale"] * edited)


def test_jax():
    pytest.importorskip("jax", reason="needs JAX: pip install jax")
    losses = run("JAX")["losses"]
    assert losses[-1] < 0.8 * losses[0] and losses == sorted(losses, reverse=True)


@pytest.mark.gpu
def test_cupy():
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("needs CuPy")
    names = run("CuPy")
    assert abs(names["steered"] - names["x"] - names["residual"] - 0.5).max() < 1e-5
