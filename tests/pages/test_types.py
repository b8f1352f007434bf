"""The public face: types on it, docstrings that are whole, and stubs that say what the lazy modules load."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import fastedit
from fastedit import arrays, ops, recipes, training
from fastedit.ops import public

SOURCE = Path(fastedit.__file__).parent
STUBBED = set(ops.__all__)  # typed in ops/__init__.pyi


def public_things():
    """(name, function or class) of everything that a user calls."""
    face = [(f"fastedit.{name}", getattr(fastedit, name)) for name in fastedit.__all__]
    for module in (ops, arrays, recipes, training):
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        names = getattr(module, "__all__", own)
        face += [(f"{module.__name__}.{name}", getattr(module, name)) for name in names if not name.startswith("_")]
    return {name: thing for name, thing in face if inspect.isroutine(thing) or inspect.isclass(thing)
            if getattr(thing, "__module__", "").startswith("fastedit")}  # fmt: skip


def own_methods(kind):
    """Public methods and properties that fastedit defines, and no class of another library before it."""
    for name, value in vars(kind).items():
        foreign = any(name in vars(base) for base in kind.__mro__[1:] if not base.__module__.startswith("fastedit"))
        if not name.startswith("_") and not foreign:
            value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if inspect.isfunction(value):
                yield name, value


THINGS = public_things()
CALLS = {**THINGS, **{f"{name}.{method}": function for name, kind in THINGS.items() if inspect.isclass(kind)
                      for method, function in own_methods(kind)}}  # fmt: skip
FOR_EDITS = {"values", "tensors", "neutral_tensor", "shape", "holding", "form", "derive", "pull_back", "check", "hold",
             "leaves", "combine", "spec", "constrained"}  # of edits and gates: what patching calls, not users  # fmt: skip
CALLS = {name: call for name, call in CALLS.items() if name.rpartition(".")[2] not in FOR_EDITS}


def parameters(call):
    """Those that a caller names."""
    if inspect.isclass(call) and issubclass(call, Exception):
        return {}
    own = not inspect.isclass(call) or call.__init__.__module__.startswith("fastedit") or "__new__" in vars(call)
    found = inspect.signature(call).parameters if own else {}
    fixed = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: p for name, p in found.items() if p.kind in fixed and name not in ("self", "cls")}


# Made by fastedit, not by users: what these hold is said under the name of the attribute.
MADE = {"fastedit.Captured", "fastedit.Sweep", "fastedit.Handle"}


@pytest.mark.parametrize("name", sorted(CALLS))
def test_docstring_names_every_parameter(name):
    call = CALLS[name]
    said = inspect.getdoc(call)
    assert said, f"{name} has no docstring"
    if name not in MADE:
        missing = [p for p in parameters(call) if not re.search(rf"(?<![\w.]){p}(?!\w)", said)]
        assert not missing, f"help({name}) does not say what {', '.join(missing)} is"


@pytest.mark.parametrize("name", sorted(name for name in CALLS if not name.startswith("fastedit.ops.")))
def test_every_parameter_has_a_type(name):
    call = CALLS[name]
    if name in MADE or (inspect.isclass(call) and not parameters(call)):
        return
    bare = [p for p, said in parameters(call).items() if said.annotation is inspect.Parameter.empty]
    assert not bare, f"{name} gives no type for {', '.join(bare)}"
    if not inspect.isclass(call):
        assert inspect.signature(call).return_annotation is not inspect.Signature.empty, f"{name} gives no type of its result"


def stub_imports(path):
    """{name: (module, its name there)} of a stub's `from .module import name as name`."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            found |= {alias.asname or alias.name: (node.module or "", alias.name) for alias in node.names}
    return found


def test_stub_of_fastedit_says_what_loads():
    there = {name: (module, name) for name, module in fastedit._WHERE.items()}
    there |= {name: ("", name) for name in fastedit._MODULES}
    for short, path in fastedit._ALIASES.items():
        package, _, module = path.rpartition(".")
        there[short] = (package, module) if module == short else ("", short)  # a stub gives on what keeps its name alone
        assert (SOURCE / f"{short}.pyi").read_text().startswith(f"from .{path} import *")
    assert stub_imports(SOURCE / "__init__.pyi") == there


def test_stubs_of_training_and_methods_say_what_loads():
    assert stub_imports(SOURCE / "training/__init__.pyi") == {n: (m, n) for n, m in training._WHERE.items()}
    methods = importlib.import_module("fastedit.methods")
    assert stub_imports(SOURCE / "methods/__init__.pyi") == {name: ("", name) for name in methods.__all__}


def test_stub_of_ops_has_the_signatures():
    stubs = [node for node in ast.parse((SOURCE / "ops/__init__.pyi").read_text()).body if isinstance(node, ast.FunctionDef)]
    assert {stub.name for stub in stubs} == STUBBED
    for stub in stubs:
        given, wanted = stub.args, inspect.signature(getattr(public, stub.name)).parameters
        positional = [p.name for p in wanted.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert [a.arg for a in given.args] == positional, stub.name
        assert {a.arg for a in given.kwonlyargs} == {p.name for p in wanted.values() if p.kind is p.KEYWORD_ONLY}, stub.name
        defaults = dict(zip([a.arg for a in given.args[::-1]], given.defaults[::-1], strict=False))
        defaults |= {a.arg: d for a, d in zip(given.kwonlyargs, given.kw_defaults, strict=True) if d is not None}
        for name, said in wanted.items():
            if name in defaults:
                assert ast.literal_eval(defaults[name]) == said.default, (stub.name, name)
            else:
                assert said.default is said.empty or name == "return_projection", (stub.name, name)


def test_help_on_an_edit_is_whole():
    said = inspect.getdoc(fastedit.Steer)
    for part in ("v, values (width,)", "site:", 'None is "block"', "layers:", "positions:", "strength:", "keep_norm:", "Raises:"):
        assert part in said, part
    assert 'None is "mlp"' in inspect.getdoc(fastedit.RED)


def test_an_edit_of_ones_own_needs_no_docstring():
    class Plain(fastedit.Edit):
        pass

    class Told(fastedit.Edit):
        """Says {braces}.

        Args:
            names: of the tensors.
        """

    assert Plain.__doc__ is None
    assert "{braces}" in Told.__doc__ and "keep_norm:" in Told.__doc__


def test_the_reference_has_everything():
    text = "".join(page.read_text() for page in (SOURCE.parent / "docs/reference").glob("*.md"))
    whole = {importlib.import_module(name).__name__ for name in re.findall(r"automodule:: (fastedit[.](?!jax)\S+)", text)}
    named = {name.rpartition(".")[2] for name in re.findall(r"auto(?:class|function|exception):: (\S+)", text)}
    missing = [name for name in THINGS if name.rpartition(".")[0] not in whole and name.rpartition(".")[2] not in named]
    assert not missing
