"""The model study: everybody does the same edit, the counts are right, and the table keeps what it had."""

import copy
import functools
import itertools

import pytest
import torch

from bench.models import check, counts, cuts, measure, plot, registry, rows, study, table
from bench.models.edits import values
from bench.models.sizes import Size, build, device, sharing
from bench.models.variants.plain import hook
from bench.models.works import BATCH, LENGTH, WORKS
from fastedit import dispatch
from fastedit.patching.residual_add import Add, Norm

TINY = {"llama": Size("llama", 32, 3, 48, 4), "bert": Size("bert", 32, 3, 48, 4)}
EAGER = [v for v in registry.variants().values() if not v.compiled]
EDITING = [v for v in registry.variants().values() if v.same_edit]
PLAIN_EDITING = [v for v in EDITING if not v.compiled]
PREFILL, TRAINING = "prefill 256", "training step"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small are slower on more, tenfold where other work holds the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def base(family):
    return build(TINY[family])


@functools.cache
def cell(family, kind, work):
    return measure.Cell(base(family), TINY[family], kind, work)


@functools.cache
def reference(family, kind, work):
    return check.Reference(base(family), cell(family, kind, work).values, work)


def cases(variants, work, families=("llama",)):
    """Every variant of a work under every kind that it serves."""
    for variant, kind, family in itertools.product(variants, registry.KINDS, families):
        if variant.serves(family, kind, work):
            yield pytest.param(variant, family, kind, work, id=f"{variant.name}-{family}-{kind}-{work}")


def checked(variant, family, kind, work):
    if variant.missing():
        pytest.skip(variant.missing())
    return cell(family, kind, work).checked(variant, reference(family, kind, work))


# --- the same edit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant, family, kind, work",
    [
        *cases(PLAIN_EDITING, PREFILL, ("llama", "bert")),
        *cases(PLAIN_EDITING, "decode 16"),
        *(case for case in cases(PLAIN_EDITING, "generate 32") if {"steer", "lowrank4"} & set(case.values)),
        *cases([v for v in EAGER if v.name != "floor again"], TRAINING),
    ],
)
def test_every_variant_does_what_the_plain_hook_does(variant, family, kind, work):
    row, step = checked(variant, family, kind, work)
    assert step is not None, row["note"]


@pytest.mark.parametrize("variant", [v for v in EDITING if v.compiled], ids=lambda v: v.name)
def test_compiled_variants_too(variant, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    row, step = checked(variant, "llama", "red", PREFILL)
    assert step is not None, row["note"]


@pytest.mark.parametrize("kind, names", [("red", ("RED wrapper modules",)), ("lowrank4", ())])
def test_training_goes_where_the_plain_hook_goes(kind, names):
    """The same numbers of parameters and, over some steps, the same losses: so the gradients are the same, too."""
    found, losses = cell("llama", kind, TRAINING), {}
    for name in ("hook", "fastedit plain", "fastedit", *names):
        variant = registry.variants()[name]
        row, step = found.checked(variant, reference("llama", kind, TRAINING))
        losses[name] = torch.stack([step() for _ in range(4)]).double()
        assert row["trained"] == (3 * 64 if kind == "red" else 3 * (2 * 4 * 32 + 4))
    moved = (losses["hook"][0] - losses["hook"][-1]).item()
    assert moved > 0
    for name, said in losses.items():
        torch.testing.assert_close(said, losses["hook"], rtol=0, atol=0.02 * moved, msg=name)


@pytest.mark.parametrize("work", [PREFILL, "generate 32", TRAINING])
def test_another_edit_is_found_out(work):
    """One layer without its bias."""
    right = cell("llama", "red", work).values
    wrong = values("red", base("llama"), right.trainable)
    wrong.forms[1].bias.zero_()
    model = hook(sharing(base("llama")), wrong)
    judge = reference("llama", "red", work)
    assert judge.error(model) > judge.limit


def test_a_variant_that_fails_is_a_row_and_not_the_end():
    broken = registry.Variant("broken", lambda model, values: 1 / 0, ("red",), (PREFILL,))
    lying = registry.Variant("lying", lambda model, values: model, ("red",), (PREFILL,))
    for variant, said in ((broken, "ZeroDivisionError"), (lying, "ValueError: off by")):
        row, step = cell("llama", "red", PREFILL).checked(variant, reference("llama", "red", PREFILL))
        assert step is None and row["note"].startswith(f"not timed: {said}")


def test_variants_share_weights_but_for_those_that_change_them():
    weights = {p.data_ptr() for p in base("llama").parameters()}
    for variant in EAGER:
        if not variant.missing() and variant.serves("llama", "red", PREFILL):
            model, _ = measure.construct(variant, base("llama"), cell("llama", "red", PREFILL).values)
            own = {p.data_ptr() for p in model.parameters()}
            assert weights.isdisjoint(own) if variant.own_weights else weights <= own, variant.name


# --- peers that are not there -------------------------------------------------------------------------------


def test_a_missing_peer_is_reported(tmp_path, monkeypatch):
    absent = registry.Variant("absent", None, ("red",), (PREFILL,), needs=("no_such_package_as_this",))
    row, step = cell("llama", "red", PREFILL).checked(absent, None)
    assert step is None and row["note"] == "skipped: no_such_package_as_this is not installed (make peers)"

    def measured(job, names, counting, seconds):
        return {("64x5", "red", PREFILL, "unedited"): {"note": "no edit", "ratio": 1.0, "ms": 2.0},
                ("64x5", "red", PREFILL, "absent"): row}  # fmt: skip

    monkeypatch.setattr(study, "measure", measured)
    said = []
    path = study.run(tmp_path, 2, sizes=["64x5"], kinds=["red"], works=[PREFILL], say=said.append)
    assert f"1 rows without figures: {row['note']}" in said
    assert rows.read(path)["64x5", "red", PREFILL, "absent"]["note"] == row["note"]
    assert row["note"] in table.markdown(path)


# --- counts -------------------------------------------------------------------------------------------------


def counted(name, work, kind="red"):
    found, variant = cell("llama", kind, work), registry.variants()[name]
    model, _ = measure.construct(variant, base("llama"), found.values)
    step = WORKS[work].prepare(model, base("llama"))
    step()
    return found.counted(variant, step)


@pytest.mark.parametrize("kind", registry.KINDS)
def test_operations_and_bytes_of_an_edited_layer(kind):
    unedited, hooked, plain, fused = (
        counted(n, "decode 16", kind) for n in ("unedited", "hook", "fastedit plain", "fastedit")
    )
    assert plain["ops_layer"] == unedited["ops_layer"] + 1 <= hooked["ops_layer"]
    assert fused["ops_layer"] <= unedited["ops_layer"]
    numbers = cell("llama", kind, "decode 16").values.forms[0].numel() + (kind != "red")  # and the dial
    assert plain["bytes_layer"] == unedited["bytes_layer"] + 4 * (2 * 16 * 32 + numbers)
    assert fused["bytes_layer"] <= unedited["bytes_layer"] + 4 * numbers


def test_a_training_step_is_counted_with_its_backward():
    floor, plain, fused = (counted(n, TRAINING) for n in ("floor", "fastedit plain", "fastedit"))
    assert fused["ops_layer"] < plain["ops_layer"] and fused["bytes_layer"] < plain["bytes_layer"]
    assert plain["ops_layer"] > floor["ops_layer"]
    logits = 4 * 128 * 1000 * 4
    assert all(logits < found["peak_bytes"] < 10 * logits for found in (floor, plain, fused))


def drawn(*shape):
    return torch.randn(shape, device=device()).requires_grad_()


def gradients(forward, *wanted):
    """A function of a forward and its backward, without what autograd does at leaves."""
    outputs = forward()
    grads = [torch.ones_like(out) for out in outputs]
    return lambda: torch.autograd.grad(forward(), wanted, grads)


@pytest.fixture(params=["", "reference"], ids=["usual", "reference"])
def backend(request, monkeypatch):
    """Only the usual one has shorter ways for the commonest calls."""
    monkeypatch.setenv("FASTEDIT_BACKEND", request.param)
    dispatch.select.cache_clear()
    yield
    dispatch.select.cache_clear()


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("on_sum", [False, True])
def test_an_edited_add_is_one_operation_forward_and_one_backward(on_sum, normed, backend):
    rows, width = 4, 32
    x, residual, scale, bias = drawn(rows, width), drawn(rows, width), drawn(width), drawn(width)
    norm = Norm(copy.deepcopy(base("llama").model.norm).float(), "rms", 1e-6) if normed else None

    def forward():
        out = Add.run(x, residual, (scale, bias, None, None, None), None, on_sum, norm)
        return out if normed else (out,)

    operations, size = counts.count(gradients(forward, x, residual, scale, bias))
    assert operations == 2
    # x, residual → sum; its gradient, x and of E(sum) the residual → d_x. With a norm also → normed; its gradient and
    # the sum, and → d_residual of E(x), as of E(sum) that is d_x; the norm's weight twice; what it divided by.
    streams, weights, divisors = (10, 2, rows) if normed else (6 + on_sum, 0, 0)
    assert size == 4 * (streams * rows * width + (2 + 4 + weights) * width + divisors)


def test_a_trained_layer_has_an_edit_more_and_fused_two_norms_less():
    floor, plain, fused = (counted(n, TRAINING) for n in ("floor", "fastedit plain", "fastedit"))
    rows, width = BATCH * LENGTH, 32
    steps = counts.count(stepping(6)), counts.count(stepping(4))
    operations, size = (more - less for more, less in zip(*steps, strict=True))
    assert plain["ops_layer"] == floor["ops_layer"] + 2 + operations
    assert plain["bytes_layer"] == floor["bytes_layer"] + 4 * (5 * rows * width + (2 + 4) * width) + size
    norm, x, residual = base("llama").model.norm, drawn(rows, width), drawn(rows, width)

    def add_and_norm():
        total = x + residual
        return total, norm(total)

    eager, _ = counts.count(gradients(add_and_norm, x, residual))
    assert fused["ops_layer"] == floor["ops_layer"] + operations + 2 * (2 - eager)


def stepping(parameters):
    """AdamW's step over so many vectors, which has run before."""
    vectors = [torch.zeros(32, device=device(), requires_grad=True) for _ in range(parameters)]
    for vector in vectors:
        vector.grad = torch.ones_like(vector)
    optimizer = torch.optim.AdamW(vectors, lr=1e-4)
    optimizer.step()
    return optimizer.step


def test_views_and_allocations_are_free():
    x = torch.ones(4, 8)
    assert counts.count(lambda: (x.view(8, 4).T, x[1:], torch.empty(3), x.detach())) == (0, 0)
    assert counts.count(lambda: x + x) == (1, 3 * 4 * 8 * 4)
    assert counts.count(lambda: x.add_(1)) == (1, 2 * 4 * 8 * 4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the CPU's allocations")
def test_peak_memory_is_that_of_what_lives_at_once():
    held = torch.empty(1)

    def step():
        for _ in range(3):
            torch.empty(1 << 20)
        return torch.empty(1 << 20), torch.empty(1 << 10), held

    assert counts.peak_bytes(step) == 4 * ((1 << 20) + (1 << 10))


# --- the study, the CSV, the pictures -----------------------------------------------------------------------


def row(variant="hook", ratio="1.100", kind="red", **others):
    key = {"size": "64x5", "kind": kind, "work": "decode", "variant": variant}
    return dict.fromkeys(rows.FIELDS, "") | key | {"ratio": ratio, "ratio_95": "0.010"} | others


def by_key(*some):
    return {rows.key(r): r for r in some}


def test_the_csv_keeps_what_is_not_measured_again(tmp_path):
    path = rows.write(tmp_path / "models.csv", by_key(row("hook"), row("fastedit", "0.900"), row("hook", kind="steer")))
    new = by_key(row("fastedit", "0.950"), row("hook", "", note="skipped"), row("pyvene", "", note="skipped"))
    rows.write(path, rows.merged(rows.read(path), new))
    found = rows.read(path)
    assert [(k[1], k[3], r["ratio"], r["note"]) for k, r in found.items()] == [
        ("red", "hook", "1.100", ""), ("red", "fastedit", "0.950", ""), ("red", "pyvene", "", "skipped"),
        ("steer", "hook", "1.100", ""),
    ]  # fmt: skip


def test_rows_from_before_there_were_kinds_are_red(tmp_path):
    path = tmp_path / "models.csv"
    path.write_text("size,work,variant,ratio,ratio_95\n64x5,decode,hook,1.026,0.005\n")
    ((key, found),) = rows.read(path).items()
    assert key == ("64x5", "red", "decode", "hook") and found["ratio"] == "1.026" and found["ops_layer"] == ""


def test_a_figure_is_the_median_with_its_interval():
    found = rows.summary([{"ratio": r, "ms": 2 * r, "note": "", "ops_layer": 7} for r in (1.0, 1.2, 1.1)])
    assert (found["ratio"], found["ms_p50"], found["processes"], found["ops_layer"]) == ("1.100", "2.200", 3, 7)
    assert float(found["ratio_95"]) == pytest.approx(4.30 * 0.1 / 3**0.5, abs=1e-3)
    assert rows.summary([{"ratio": 1.0, "ms": 1.0, "note": ""}])["ratio_95"] == "inf"


def test_table_and_pictures_come_from_the_csv_alone(tmp_path):
    some = by_key(
        row("unedited", "1.000", ops_layer="38", bytes_layer="2500000"), row("fastedit", "0.930"),
        row("hook", "1.020", ratio_95="inf"),
        row("fastedit", "0.940", kind="steer"), row("pyvene", "", kind="steer", note="skipped: why"),
    )  # fmt: skip
    path = rows.write(tmp_path / "models.csv", some)
    said = table.markdown(path)
    assert "| ratio | red | steer |" in said and "| fastedit | 0.930 ± 0.010 | 0.940 ± 0.010 |" in said
    assert "| hook | 1.020 (one process) |  |" in said
    assert "| unedited | 38, 2.5 |" in said and "- pyvene (steer; 1 row): skipped: why" in said
    assert table.write(path).read_text() == said
    (picture,) = plot.ratios(path)
    assert picture == tmp_path / "models-decode.png" and picture.read_bytes().startswith(b"\x89PNG")


def test_what_the_minutes_did_not_reach_is_said(tmp_path, monkeypatch):
    clock = itertools.count(step=40)
    monkeypatch.setattr(study.time, "monotonic", lambda: next(clock))
    measured = {("64x5", "red", "decode", "unedited"): {"note": "", "ratio": 1.0, "ms": 1.0}}
    monkeypatch.setattr(study, "measure", lambda job, names, counting, seconds: measured)
    said = []
    path = study.run(tmp_path, 5, minutes=5, sizes=["64x5"], kinds=["red"], works=["decode"], say=said.append)
    (found,) = rows.read(path).values()
    assert 1 <= int(found["processes"]) < 5
    assert said[-1] == f"not reached in time: {found['processes']} of 5 processes of 64x5: red: decode"


def test_a_process_that_dies_does_not_take_the_rest_with_it(tmp_path, monkeypatch):
    def measured(job, names, counting, seconds):
        if job.size == "64x5":
            raise study.MeasuringFailed("64x5: exit status -9")
        return {(job.size, *job.cells[0], "unedited"): {"note": "", "ratio": 1.0, "ms": 1.0}}

    monkeypatch.setattr(study, "measure", measured)
    with pytest.raises(study.MeasuringFailed, match="2 measuring processes failed"):
        study.run(tmp_path, 2, kinds=["red"], works=["decode"], say=lambda line: None)
    assert {key[0] for key in rows.read(tmp_path / f"models-{device()}.csv")} == {"256x8", "512x8"}


def test_a_process_gets_what_is_left_of_the_minutes_and_no_more(tmp_path, monkeypatch):
    """One that uses it up is said; the rest stays, and that there was a limit is no failure."""
    given, said = [], []

    def measured(job, names, counting, seconds):
        given.append(seconds)
        if job.size == "256x8":
            raise study.OutOfTime("256x8: stopped")
        return {(job.size, *job.cells[0], "unedited"): {"note": "", "ratio": 1.0, "ms": 1.0}}

    monkeypatch.setattr(study, "measure", measured)
    path = study.run(tmp_path, 2, minutes=1, kinds=["red"], works=["decode"], say=said.append)
    assert {key[0] for key in rows.read(path)} == {"64x5", "512x8"}
    assert 60 + study.GRACE >= given[0] > given[1] > given[-1] > 0 and len(given) == 6
    assert "256x8: stopped" in said and "not reached in time: 0 of 2 processes of 256x8: red: decode" in said
    monkeypatch.undo()
    monkeypatch.setattr(study, "GRACE", 0)
    with pytest.raises(study.OutOfTime, match="nothing was measured"):
        study.run(tmp_path, 1, minutes=0.01, sizes=["64x5"], kinds=["red"], works=["decode"], say=said.append)
    assert said[-2].startswith("64x5: red: decode: stopped after 1 s")


def test_jobs_are_within_what_exists():
    for job in (*cuts.DEFAULT, *cuts.full()):
        for kind, work in job.cells:
            served = {v.name for v in registry.serving(cuts.SIZES[job.size].family, kind, work)}
            assert served > {registry.base_of(work), "hook", "fastedit"}
    cells = [(job.size, cell) for job in cuts.DEFAULT for cell in job.cells]
    assert len(set(cells)) == len(cells), "a cell is measured twice"
    assert cuts.chosen(sizes=["2048x4"], kinds=["ablate"], works=["decode 64"])
    assert {work for job in cuts.chosen(works=[PREFILL]) for _, work in job.cells} == {PREFILL}


def test_a_process_measures_what_it_is_asked(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    job = cuts.Job("64x5", (("red", "decode"),), 0.1, compiled=False)
    found = study.measure(job, ["hook"], counting=True)
    assert set(found) == {("64x5", "red", "decode", name) for name in ("unedited", "hook")}
    assert all(r["ratio"] > 0 and r["ms"] > 0 and r["ops_layer"] > 0 for r in found.values())


def test_peers_are_pinned():
    pinned = (study.ROOT / "bench" / "requirements-peers.txt").read_text()
    needed = {package for v in registry.variants().values() for package in v.needs} | {"liger_kernel"}
    assert {"peft", "pyvene", "pyreft", "repeng", "steering_vectors"} < needed
    assert [p for p in needed if f"\n{p.replace('_', '-')}==" not in pinned] == []
