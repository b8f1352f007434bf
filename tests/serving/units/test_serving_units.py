"""What of serving needs no engine: rows and slots of a step against a definition, names, plans, salts, files."""

import json
import os
import shutil
import time
import types

import numpy as np
import pytest
import serving_support as support
import torch

import fastedit as fe
from fastedit.banks.tables import Tables
from fastedit.edits.form import Form
from fastedit.edits.per_layer import Spot
from fastedit.edits.positions import positions
from fastedit.edits.stack import stacked
from fastedit.serving.admission import Library, Refused, admit, meant, wanted
from fastedit.serving.contents import read_contents
from fastedit.serving.failures import clean
from fastedit.serving.options import _KNOWN, resolve
from fastedit.serving.residency import Residency
from fastedit.serving.rows import Rows, Wanted


class AnyShelf:
    """Every key is an edit that writes its own number."""

    def forms(self, key):
        return {("0", "mlp"): Form(bias=torch.full((4,), float(key)))}, {}


def rows_of(capacity=3, requests=3, tokens=64):
    tables = Tables([("0", "mlp", 4)], capacity)
    return Rows(Residency(tables, AnyShelf()), requests, tokens, "cpu"), tables


def brute_force(rows, tables, req_ids, counts, computed):
    """For each token the number its slot holds, or None: one token after the other."""
    found = []
    for place, req_id in enumerate(req_ids):
        want = rows.wanted.get(req_id)
        for position in range(computed[place], computed[place] + counts[place]):
            rule = None if want is None else want.positions
            prompt = want is not None and position < want.prompt
            acts = want is not None and (
                rule is None or (prompt and (rule.prompt or position < rule.first or position >= want.prompt - rule.last))
                or (not prompt and rule.generated)
            )  # fmt: skip
            found.append((float(want.key), want.strength) if acts else None)
    return found


def test_rows_over_random_steps():
    """Requests come, go, are preempted, reordered and chunked: each token is under its own request's edit."""
    draw = np.random.default_rng(0)
    rows, tables = rows_of()
    bias, live = tables.tensors("0", "mlp")[1], {}
    rules = (None, None, "prompt", "generated", "first 2", "first 1 + last 2", "last 3 + generated")
    for number in range(400):
        if len(live) < 5:
            name, prompt = f"r{number}", int(draw.integers(1, 9))
            live[name] = [0, prompt, prompt + int(draw.integers(1, 6))]
            if draw.random() < 0.7:
                rule = positions(rules[draw.integers(len(rules))])
                rows.wanted[name] = Wanted(int(draw.integers(1, 9)), float(draw.integers(1, 4)), rule, prompt)
        chosen = list(draw.permutation(sorted(live))[: draw.integers(1, 4)])
        if number % 3 == 0:
            chosen = [name for name in rows.req_ids if name in live] or chosen
        counts = [min(int(draw.integers(1, 5)), live[name][2] - live[name][0]) for name in chosen]
        computed = np.array([live[name][0] for name in chosen])
        rows.step(chosen, np.array(counts), computed)
        expected = brute_force(rows, tables, chosen, counts, computed)
        for token, want in enumerate(expected):
            slot = int(rows.slot[token])
            assert (slot == -1) if want is None else (float(bias[slot, 0]), float(rows.strength[token])) == want
        assert bool((rows.slot[len(expected) :] == -1).all()), "padding is never edited"
        for name, count in zip(chosen, counts, strict=True):
            live[name][0] += count
            if live[name][0] >= live[name][2]:
                del live[name]
                rows.forget([name])
        if live and draw.random() < 0.1:
            live[next(iter(live))][0] = 0  # preempted: all over again
    assert rows.residency.loads > 8 > tables.capacity, "nothing was evicted: nothing was tested"


def test_a_slot_that_is_held_is_never_given_away():
    """Three rows in three slots; the second leaves for a new edit: the first, held the longest, must stay."""
    rows, tables = rows_of()
    for number, name in enumerate("abcd"):
        rows.wanted[name] = Wanted(number + 1, 1.0, None, 4)
    for names in (["a", "b", "c"], ["a", "d", "c"], ["a", "d", "b"]):
        rows.step(names, np.array([1, 1, 1]), np.array([0, 0, 0]))
        held = tables.tensors("0", "mlp")[1][rows.slot[:3].long(), 0]
        assert held.tolist() == [rows.wanted[name].key for name in names]


def test_a_step_of_the_same_requests_writes_nothing():
    rows, _ = rows_of()
    rows.wanted["a"] = Wanted(1, 1.0, None, 4)
    rows.step(["a", "b"], np.array([1, 1]), np.array([4, 4]))
    rows._fill = None  # would be called
    for position in (5, 6):
        rows.step(["a", "b"], np.array([1, 1]), np.array([position, 4]))
    assert rows.slot[:3].tolist() == [0, -1, -1]


def test_a_dummy_run_edits_nothing():
    rows, _ = rows_of()
    rows.wanted["a"] = Wanted(1, 1.0, None, 4)
    rows.step(["a"], np.array([4]), np.array([0]))
    assert rows.edited
    rows.idle()
    assert not rows.edited and bool((rows.slot == -1).all())
    rows.step(["a"], np.array([4]), np.array([0]))
    assert rows.slot[:5].tolist() == [0, 0, 0, 0, -1]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    model = support.save_model("llama", folder / "model")
    support.save_edits(model, folder / "edits")
    options = {"edits": folder / "edits", "staging": folder / "edits" / ".served", "width": 64, "depth": 2, "rank": 4}
    options["gates"] = True
    library = Library(options | {"sites": ["mlp", "attn", "block"]})
    library.model = model
    return library


def test_contents_are_what_the_model_runs(library):
    """A file's forms, stacked, against the patched model's own masters."""
    hidden = support.random(5, 64, seed=3)
    for name, stack in support.edits().items():
        assert bool(read_contents(library.folder / name, 64, 2).gates) == (name == "gated")
        contents = read_contents(library.folder / name, 64, 2)
        with fe.patch(library.model, stack) as handle:
            for dial in (1.0, 0.25):
                handle.strength = dial
                forms = stacked([contents.parts], [dial])
                for (index, site), form in forms.items():
                    layer = next(la for la in fe.families.find_layers(library.model) if la.index == index)
                    edited = hidden
                    for edit in stack:
                        if edit.site == site:  # of a gated one what it does where the gate is open
                            own = edit.form(edit.tensors(_spot(layer), 64))
                            edited = edited + dial * edit.strength * (own(edited) - edited)
                    torch.testing.assert_close(form(hidden), edited, rtol=1e-5, atol=1e-5)


def _spot(layer):
    return Spot(layer.name, layer.index, 2, layer.index, 2)


def test_plans_and_salts(library):
    plan = library.plan([("red", 1.0), ("steer", 0.5)])
    assert [strength for _, strength in plan] == [1.0, 0.5]
    assert all((library.staging / digest).is_dir() for digest, _ in plan)
    assert library.plan([("red", 0.0)]) == []
    asked = (("red", 1.0), ("red", 0.5), ("steer", 1.0), ("generated", 1.0))
    salts = {library.salted(library.plan([one]), None) for one in asked}
    assert len(salts) == 4
    assert library.salted(plan, "mine") != library.salted(plan, None) != library.salted(plan[::-1], None)


def test_gates_of_a_file_are_the_patched_model_s(library, tmp_path):
    """The tables' numbers are the sensors', and what kernels cannot decide or tell apart is refused by name."""
    contents = read_contents(library.folder / "gated", 64, 2)
    with fe.patch(library.model, support.edits()["gated"]) as handle:
        for edit, layer, masters in handle._each():
            (sensor,) = masters.gating.sensors
            for mine, own in zip(contents.gates[layer.index, edit.site], sensor.gate(), strict=True):
                assert torch.equal(mine, own)
    with pytest.raises(Refused, match="cannot hold red beside gated, whose edit at site 'mlp' of layer 0 is behind a gate"):
        library.plan([("red", 1.0), ("gated", 1.0)])
    assert len(library.plan([("low-rank", 1.0), ("gated", 0.5)])) == 2
    bare = Library(library.options | {"gates": False})
    with pytest.raises(Refused, match="'gated' is behind a gate, and this server was started without: start it with gates"):
        bare.plan([("gated", 1.0)])
    direction = support.random(64)
    refused = {
        "combined": (fe.Gate(direction) & fe.Gate(direction), "several gates are combined"),
        "prompt": (fe.Gate(direction, decide="prompt"), "decided on the prompt"),
        "elsewhere": (fe.Gate(direction, layer=0, site="mlp"), "measures at layer 0"),
        "cast": (fe.Gate(direction, kind="cast"), "of kind 'cast'"),
    }
    for name, (gate, said) in refused.items():
        support.save_edit(library.model, tmp_path / name, [fe.Steer(direction, site="block").when(gate)])
        with pytest.raises(fe.store.EditFileError, match=said):
            read_contents(tmp_path / name, 64, 2)
    beside = [fe.Steer(direction, site="block"), fe.Steer(direction, site="block").when(fe.Gate(direction))]
    support.save_edit(library.model, tmp_path / "beside", beside)
    with pytest.raises(fe.store.EditFileError, match="2 edits are at site 'block' of layer 0, one of them behind"):
        read_contents(tmp_path / "beside", 64, 2)


def test_a_digest_is_of_what_an_edit_does(library, tmp_path):
    """Saved again it is the same edit; under another strength or with other positions it is not."""
    vectors = support.random(2, 64)
    made = {
        "same": fe.Steer(vectors, site="block"), "strong": fe.Steer(vectors, site="block", strength=2.0),
        "prompt": fe.Steer(vectors, site="block", positions="prompt"), "other": fe.Steer(vectors + 1e-6, site="block"),
    }  # fmt: skip
    for name, edit in made.items():
        with fe.patch(library.model, edit) as handle:
            fe.store.save(handle, tmp_path / name, training={"steps": name})
    digests = {name: read_contents(tmp_path / name, 64, 2).digest for name in made}
    assert digests["same"] == library.look("steer").digest
    assert len(set(digests.values())) == 4


def test_admission_changes_no_request_that_asks_for_nothing():
    request = types.SimpleNamespace(sampling_params=types.SimpleNamespace(extra_args={"else": 1}), cache_salt="s")
    admit(request, None)
    assert request.cache_salt == "s" and request.sampling_params.extra_args == {"else": 1}


def test_replaced_and_removed(library):
    edits = support.edits(seed=5)
    support.save_edit(library.model, library.folder / "mine", edits["red"])
    first = library.look("mine").digest
    support.save_edit(library.model, library.folder / "mine", edits["steer"])
    assert library.look("mine").digest != first
    shutil.rmtree(library.folder / "mine")
    with pytest.raises(Refused, match="no edit 'mine'"):
        library.look("mine")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"fastedit": 1}, "expected an edit's name"), ({"fastedit": ["a", 2]}, "expected an edit's name"),
        ({"fastedit": "a", "fastedit_strength": True}, "finite"), ({"fastedit_strength": 1}, "without"),
        ({"fastedit": "a", "fastedit_strength": [1, 2]}, "2 numbers for 1"), ({"fastedit": "a", "fastedit_x": 1}, "unknown"),
        ({"fastedit": ["a"] * 17}, "a list of 17, expected at most 16"), ({"fastedit": []}, "expected an edit's name"),
        ({"fastedit": "a", "fastedit_strength": [1.0] * 4000}, "a list of 4000"),
        ({"fastedi": "a"}, "unknown argument 'fastedi'"),
        ({"FastEdit": "a"}, "unknown"), ({"fast_edit": "a"}, "unknown"), ({"fasetdit": "a"}, "unknown"),
        ({"fastedit": "a", "fastedit_strenght": 1}, "unknown"), ({"fastedit": "a", "fastedit_strength": 10**400}, "finite"),
    ],
)  # fmt: skip
def test_wanted_refuses(given, said):
    with pytest.raises(Refused, match=said):
        wanted(given)


def test_damage_is_refused(library, tmp_path):
    shutil.copytree(library.folder / "red", tmp_path / "red")
    payload = bytearray((tmp_path / "red" / "edit.safetensors").read_bytes())
    payload[-1] ^= 1
    (tmp_path / "red" / "edit.safetensors").write_bytes(payload)
    with pytest.raises(fe.store.EditFileError, match="checksum"):
        read_contents(tmp_path / "red", 64, 2)
    with pytest.raises(fe.store.EditFileError, match="another base"):
        read_contents(library.folder / "red", 32, 2)
    with pytest.raises(fe.store.EditFileError, match="layers 0 to 0"):
        read_contents(library.folder / "red", 64, 1)


def test_the_command_that_is_started(monkeypatch, tmp_path):
    from fastedit.cli import app, loading, serve

    with pytest.raises(loading.UsageError, match=r"needs vllm: pip install vllm|no folder"):
        serve.command("m", tmp_path / "none", None, None, None, [])
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: name)
    line = serve.command("m", tmp_path, "mlp,block", 4, None, ["--port", "1"])
    assert "m" in line and line[-2:] == ["--port", "1"]
    config = line[line.index("--additional-config") + 1]
    assert json.loads(config) == {"fastedit": {"edits": str(tmp_path), "sites": ["mlp", "block"], "rank": 4}}
    line = serve.command("m", tmp_path, None, None, None, [], gates=True)
    assert json.loads(line[line.index("--additional-config") + 1])["fastedit"]["gates"] is True
    started = []
    monkeypatch.setattr(serve.os, "execv", lambda program, line: started.append(line))
    given = {"rank": 2, "capacity": 8, "gates": True, "max_names": 3, "max_change": 9.0, "staging": str(tmp_path / "kept")}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if name != "gates"]
    command = ["serve", "m", "--edits", str(tmp_path), "--sites", "mlp", "--gates", *flags]
    app(command, standalone_mode=False)
    told = json.loads(started[0][started[0].index("--additional-config") + 1])["fastedit"]
    assert told == given | {"edits": str(tmp_path), "sites": ["mlp"]} and set(told) == _KNOWN, "a flag for each option"
    for sites, rest, said in (("mlp,q", [], "expected some of"), (None, ["--additional-config={}"], "additional-config")):
        with pytest.raises(serve.typer.BadParameter, match=said):
            serve.command("m", tmp_path, sites, None, None, rest)


def engine_config(**parallel):
    """As much of vLLM's configuration as the options look at."""
    model = types.SimpleNamespace(hf_text_config=types.SimpleNamespace(num_hidden_layers=2), get_hidden_size=lambda: 64)
    return types.SimpleNamespace(
        model_config=model, scheduler_config=types.SimpleNamespace(max_num_seqs=16),
        parallel_config=types.SimpleNamespace(**parallel), cache_config=types.SimpleNamespace(),
    )  # fmt: skip


def test_options_are_made_whole(library, tmp_path):
    found = resolve({"edits": str(library.folder)}, engine_config())
    assert (found["sites"], found["rank"], found["gates"], found["capacity"]) == (["mlp", "attn", "block"], 2, True, 16)
    assert resolve(found, engine_config()) == found, "a configuration that was resolved is resolved again in no other way"
    empty = resolve({"edits": str(tmp_path)}, engine_config())
    assert empty["sites"] == ["mlp", "attn", "block"] and empty["gates"] is False


def test_one_bad_folder_keeps_no_server_from_starting(library, tmp_path, caplog):
    """A pipe in the place of a file, one that is no JSON, a folder without any: left out, and refused by name."""
    shutil.copytree(library.folder, tmp_path / "edits")
    for name in ("pipe", "torn", "empty"):
        (tmp_path / "edits" / name).mkdir()
    os.mkfifo(tmp_path / "edits" / "pipe" / "edit.json")
    (tmp_path / "edits" / "torn" / "edit.json").write_text("{")
    found = resolve({"edits": str(tmp_path / "edits")}, engine_config())
    assert found | {"edits": None, "staging": None} == resolve({"edits": str(library.folder)}, engine_config()) | {
        "edits": None, "staging": None
    }  # fmt: skip
    for name, said in (("pipe", "is not a regular file"), ("torn", "not valid JSON"), ("empty", "there is no edit 'empty'")):
        assert any(name in record.getMessage() for record in caplog.records)
        with pytest.raises(Refused, match=said):
            Library(found).plan([(name, 1.0)])


@pytest.mark.parametrize(
    ("changed", "parallel", "said"),
    [
        ({"edits": "/nowhere"}, {}, "no folder"), ({"edits": 3}, {}, "expected"), ({"site": "mlp"}, {}, "no option 'site'"),
        ({"sites": ["q"]}, {}, "expected some of"), ({"gates": "yes"}, {}, "true or false"),
        ({"rank": 65}, {}, "0 to 64"), ({"capacity": 0}, {}, "from 1 on"),
        ({}, {"num_ubatches": 2}, "dual batch"), ({}, {"prefill_context_parallel_size": 2}, "context parallelism"),
    ],
)  # fmt: skip
def test_options_refused(tmp_path, changed, parallel, said):
    with pytest.raises(ValueError, match=said):
        resolve({"edits": str(tmp_path), **changed}, engine_config(**parallel))


def test_a_copy_for_the_workers_is_made_again(library):
    """Where it was cleared away, and said where it cannot be made."""
    plan = library.plan([("red", 1.0)])
    shutil.rmtree(library.staging)
    assert library.plan([("red", 1.0)]) == plan and (library.staging / plan[0][0]).is_dir()
    shutil.rmtree(library.staging)
    library.staging.write_text("in the way")
    with pytest.raises(Refused, match="could not be kept") as caught:
        library.plan([("red", 1.0)])
    assert str(library.staging) not in str(caught.value), "where things lie on the server is not the client's business"
    library.staging.unlink()


def test_other_people_s_keys_are_left_alone():
    assert not meant({"fastest": 1, "edit": 2, "kv_transfer_params": {}, "session_id": "a", "breakfast": 0, 3: 4})
    assert not meant(None)


def test_misspelt_keys_are_refused_without_a_library():
    request = types.SimpleNamespace(sampling_params=types.SimpleNamespace(extra_args={"fastedi": "red"}), cache_salt=None)
    with pytest.raises(Refused, match="unknown argument 'fastedi'"):
        admit(request, None)


def test_a_salt_cannot_be_written_by_a_client(library):
    """Keyed by the process, and with the client's own inside: neither equals what a client may send."""
    plan, other = library.plan([("red", 1.0)]), Library(library.options)
    assert library.salted(plan, None) != other.salted(plan, None), "two processes have two keys"
    theirs = (None, "", "a", "fastedit:" + plan[0][0] + "*1.0", library.salted(plan, None))
    salts = [library.salted(plan, salt) for salt in theirs]
    assert len({*salts}) == len(salts) and all(plan[0][0] not in salt for salt in salts)


def test_strengths_are_bounded_by_what_the_edit_makes_of_typical_rows(library):
    """The limit is on the change of rows of root mean square 1, of a stack's edits together, and is the operator's."""
    contents = library.look("steer")
    rate = max(max(rates) for rates in contents.rates.values())
    vectors = support.random(support.LAYERS, support.WIDTH)
    assert rate == pytest.approx(float(vectors.norm(dim=-1).max()) / support.WIDTH**0.5, rel=1e-5)
    largest = library.max_change / rate
    assert library.plan([("steer", 0.999 * largest)]) and library.plan([("steer", -0.999 * largest)])
    for asked in ([("steer", 1.001 * largest)], [("steer", -1e38)], [("red", 1e39)], [("steer", 0.7 * largest)] * 2):
        with pytest.raises(Refused, match=r"would change typical rows at site .* this server lets at most 1000"):
            library.plan(asked)
    narrow = Library(library.options | {"max_change": rate / 2})
    with pytest.raises(Refused, match="steer at strength 1 would change typical rows"):
        narrow.plan([("steer", 1.0)])


def test_an_edit_saved_at_a_strength_that_overflows_is_refused_at_the_door(library):
    stack = support.edits()["stacked"]
    with fe.patch(library.model, stack) as handle:
        handle.save(library.folder / "steep")
    header, tensors = fe.store.read(library.folder / "steep")
    header = {key: value for key, value in header.items() if key not in ("format", "version", "tensors", "sha256")}
    fe.store.write(library.folder / "steep", header | {"strength": 1e39}, tensors)
    with pytest.raises(Refused, match=r"edit 'steep' cannot be served: .*strength") as caught:
        library.plan([("steep", 1.0)])
    assert str(library.folder) not in str(caught.value)
    shutil.rmtree(library.folder / "steep")


def test_what_a_request_costs_the_event_loop(library):
    """Once a thread has prepared it, the most that a request may name is looked up in under ten milliseconds."""
    for number in range(16):
        shutil.copytree(library.folder / "steer", library.folder / f"many-{number}")
    given = {"fastedit": [f"many-{number}" for number in range(16)], "fastedit_strength": 0.5}
    library.prepare(given)
    spent = []
    for _ in range(5):
        start = time.perf_counter()
        library.plan(wanted(given))
        spent.append(time.perf_counter() - start)
    assert min(spent) < 0.01
    start = time.perf_counter()
    with pytest.raises(Refused):
        wanted({"fastedit": ["red"] * 4000})
    assert time.perf_counter() - start < 0.01
    reads = []
    library._read = lambda *asked: reads.append(asked)
    library.prepare(given)
    del library._read
    assert not reads, "an edit that did not change is not read again"


def test_tidy_leaves_what_it_did_not_make(library, tmp_path):
    own = Library(library.options | {"staging": tmp_path})
    (digest, _), = own.plan([("red", 1.0)])
    theirs = [tmp_path / name for name in ("notes", "f" * 63, ".hidden")]
    for folder in theirs:
        folder.mkdir()
        (folder / "file").write_text("mine")
    mixed = tmp_path / ("e" * 64)
    mixed.mkdir()
    (mixed / "thesis.txt").write_text("mine")
    (tmp_path / ("d" * 64)).symlink_to(theirs[0])
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0), follow_symlinks=False)
    own.tidy()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*(p.name for p in theirs), mixed.name, "d" * 64])
    assert (mixed / "thesis.txt").exists() and all((folder / "file").exists() for folder in theirs)
    assert not (tmp_path / digest).exists()


def test_a_row_whose_edit_cannot_be_had_is_poisoned_and_its_neighbours_are_not():
    failed = {}
    rows, _ = rows_of()
    rows.failed = failed.__setitem__
    bias = lambda key: torch.full((4,), float("nan") if key == 9 else float(key))  # noqa: E731
    rows.residency.shelf.forms = lambda key: ({("0", "mlp"): Form(bias=bias(key))}, {})
    rows.wanted |= {"a": Wanted(1, 1.0, None, 4), "b": Wanted(9, 1.0, positions("prompt"), 4)}
    rows.step(["a", "b", "c"], np.array([2, 2, 1]), np.array([0, 4, 0]))
    assert "NaN" in str(failed.pop("b")) and not failed
    assert rows.slot[:5].tolist() == [0, 0, 0, 0, -1] and rows.strength[:2].tolist() == [1.0, 1.0]
    assert bool(rows.strength[2:4].isnan().all()), "on all its tokens, whatever its positions"
    rows.step(["a", "c"], np.array([1, 1]), np.array([2, 1]))
    assert rows.slot[:3].tolist() == [0, -1, -1] and rows.strength[:2].tolist() == [1.0, 1.0]


def test_blocks_are_made_finite_and_finite_values_stay():
    def runner(caches, kind="auto"):
        some = types.SimpleNamespace
        return some(kv_caches=caches, kv_cache_config=some(num_blocks=5), cache_config=some(cache_dtype=kind))

    for shape in ((2, 5, 3, 4), (5, 2, 3, 4), (10, 3, 4)):  # the last: laid out otherwise
        cache = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        cache.view(-1)[-1], cache.view(-1)[-2] = float("nan"), float("inf")
        before = cache.clone()
        clean(runner([cache]), {4, 1})
        assert bool(cache.isfinite().all()) and torch.equal(cache, before.nan_to_num(0, 0, 0))
    bytes_ = torch.tensor([[0x7F, 0x3C], [0xFF, 0x01]], dtype=torch.uint8).repeat(5, 1)
    clean(runner([bytes_], "fp8_e4m3"), {0})
    assert bytes_[:2].tolist() == [[0, 0x3C], [0, 0x01]]
