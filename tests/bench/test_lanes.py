"""The tested versions, and the table of the newest ones."""

import importlib.metadata
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench import lanes  # noqa: E402

PINS = lanes.tested(ROOT / "constraints.txt")[1]


def required(name):
    """The packages that pyproject.toml asks for by a list of that name, with their lower bounds."""
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(rf"^{name} = \[(.*?)\]\s*(#.*)?$", text, re.M | re.S)[1]
    return re.findall(r'"([A-Za-z0-9_.-]+?)(?:\[[^]]*\])?(?:>=([0-9.]+)[^"]*)?"', found)


@pytest.mark.parametrize("extra", ["dependencies", "requires", "train", "triton", "gguf", "jax", "demo", "test"])
def test_all_that_the_two_commands_install_is_pinned_and_bounded_below_only(extra):
    for name, least in required(extra):
        if name == "fastedit-kernels":
            continue
        pin = PINS[re.sub("[-_.]+", "-", name).lower()]
        assert re.fullmatch(r"\d[\w.]*", pin)
        numbers = [int(n) for n in re.findall(r"\d+", pin)]
        assert numbers >= [int(n) for n in least.split(".") if n]


def test_the_makefile_takes_its_versions_from_there():
    text = (ROOT / "Makefile").read_text()
    assert PINS["torch"] not in text
    lane = text[text.index("$(STAMPS)/torch:") : text.index("$(STAMPS)/older:")]
    installs = [line for line in lane.splitlines() if "$(INSTALL)" in line and "--no-deps" not in line]
    assert len(installs) >= 3 and all("$(TESTED)" in line for line in installs)


XML = """<testsuites><testsuite tests="3" failures="{bad}" errors="0" skipped="1">
<testcase classname="tests.a" name="one"/><testcase classname="tests.a" name="two">{fault}</testcase>
</testsuite></testsuites>"""


@pytest.mark.parametrize("bad", [0, 1])
def test_the_table_says_what_failed_and_what_is_newer(bad, tmp_path, capsys):
    (tmp_path / "tests.xml").write_text(XML.format(bad=bad, fault="<failure/>" * bad))
    here = importlib.metadata.version("numpy")
    (tmp_path / "constraints.txt").write_text("# a comment\nnumpy==1.0\nno-such-package==3.1\n")
    arguments = [str(tmp_path / "tests.xml"), "--constraints", str(tmp_path / "constraints.txt")]
    lanes.main([*arguments, "--out", str(tmp_path / "newest.md")])
    said = (tmp_path / "newest.md").read_text()
    assert f"3 tests, {bad} failed, 1 skipped" in said and f"| numpy | 1.0 | {here} |" in said
    assert ("`tests.a::two`" in said) == bool(bad)
    before = (tmp_path / "constraints.txt").read_text()
    if bad:
        with pytest.raises(SystemExit, match="not renewed: 1 of 3"):
            lanes.main([*arguments, "--renew"])
        assert (tmp_path / "constraints.txt").read_text() == before
    else:
        lanes.main([*arguments, "--renew"])
        assert (tmp_path / "constraints.txt").read_text() == f"# a comment\nnumpy=={here}\nno-such-package==3.1\n"
