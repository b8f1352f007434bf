"""Where a bank keeps its edits: slots, eviction, files, pins, and threads that add while others run the model."""

import io
import threading

import pytest
import tiny_models as tiny
import torch
from bank_cases import bank_of, drawn, ids, logits, low_rank, red

import fastedit as fe
from fastedit.banks.tables import Tables
from fastedit.edits.form import Form

ONE = red(0)


def reds(count):
    return {f"e{n}": red(n) for n in range(count)}


def small(capacity=2, count=4, **options):
    model = tiny.build("llama")
    return model, bank_of(model, reds(count), capacity, sites=("mlp",), rank=0, **options)


def said(model, bank, *names):
    with bank.assign(names):
        return logits(model, ids(len(names)))


def expected(name):
    """What one sequence says under one edit, by a patched model of its own."""
    model = tiny.build("llama")
    fe.patch(model, red(int(name[1:])))
    return logits(model, ids(2))


# --- eviction -----------------------------------------------------------------------------------------------------


def test_the_least_recently_used_edit_makes_room():
    model, bank = small()
    assert bank.resident == ["e2", "e3"] and bank.stats().evictions == 2
    said(model, bank, "e2")
    said(model, bank, "e0")
    assert bank.resident == ["e2", "e0"]
    before = bank.stats()
    assert torch.equal(said(model, bank, "e2", "e1"), torch.stack([expected("e2")[0], expected("e1")[1]]))
    after = bank.stats()
    assert (after.hits - before.hits, after.loads - before.loads, after.evictions - before.evictions) == (1, 1, 1)
    assert sorted(bank.resident) == sorted(bank.names[-2:]) == ["e1", "e2"]
    assert after[:4] == (2, 4, 2, 0) and len(bank) == 4 and "e0" in bank and "x" not in bank


def test_edits_in_use_and_pinned_ones_stay():
    model, bank = small()
    bank.pin("e0")
    with bank.assign(["e1", "e0"]):
        with pytest.raises(fe.BankFullError, match="no slot for 'e2': all 2 are pinned, or in use"), bank.assign(["e2"]):
            pass
        with pytest.raises(fe.BankFullError):
            bank.pin("e3")
        with pytest.raises(fe.BankFullError):
            bank.prefetch(["e3"])
        bank.add("new", ONE)
        assert bank.resident == ["e0", "e1"] or bank.resident == ["e1", "e0"]
    assert bank.stats()[3:5] == (1, 0)
    bank.prefetch(["e3"])
    assert "e0" in bank.resident and "e3" in bank.resident
    bank.unpin("e0")
    bank.prefetch(["e1", "e2"])
    assert sorted(bank.resident) == ["e1", "e2"]
    with pytest.raises(fe.BankFullError, match="3 different edits in one batch, and the bank has a capacity of 2"):
        said(model, bank, "e0", "e1", "e2", "e1")
    assert bank.stats().in_use == 0


# --- removal and replacement --------------------------------------------------------------------------------------


def test_a_removed_edit_in_use_keeps_its_slot_until_the_assignment_ends():
    model, bank = small(count=2)
    with bank.assign(["e0", "e1"]):
        before = logits(model, ids(2))
        bank.remove("e0")
        assert "e0" not in bank and not bank.tables.free
        with pytest.raises(KeyError, match="no edit named 'e0'"):
            bank.assign(["e0"])
        bank.add("e0", red(7))  # the name is free, the slot is not
        assert "e0" not in bank.resident
        assert torch.equal(logits(model, ids(2)), before)
    assert len(bank.tables.free) == 1
    assert not torch.equal(said(model, bank, "e0", "e1")[0], before[0])
    assert torch.equal(said(model, bank, "e0", "e1"), torch.stack([expected("e7")[0], before[1]]))


def test_a_replaced_edit_is_switched_between_assignments():
    model, bank = small(capacity=3, count=2)
    with bank.assign(["e0", "e1"]):
        before = logits(model, ids(2))
        bank.replace("e0", red(7))
        assert torch.equal(logits(model, ids(2)), before)
        with bank.assign(["e0", "e1"]):
            assert torch.equal(logits(model, ids(2)), torch.stack([expected("e7")[0], before[1]]))
    assert torch.equal(said(model, bank, "e0", "e1")[0], expected("e7")[0])
    assert len(bank.tables.free) == 1 and bank.stats().entries == 2


def test_replacing_in_a_full_bank():
    model, bank = small(capacity=1, count=1)
    bank.pin("e0")
    with bank.assign(["e0"]), pytest.raises(fe.BankFullError, match="'e0' is pinned and in use"):
        bank.replace("e0", red(7))
    assert torch.equal(said(model, bank, "e0", "e0"), expected("e0"))
    bank.replace("e0", red(7))
    assert bank.resident == ["e0"] and bank.stats().pinned == 1
    assert torch.equal(said(model, bank, "e0", "e0"), expected("e7"))
    bank.unpin("e0")
    with bank.assign(["e0"]):
        bank.replace("e0", red(8))
        assert bank.resident == []
    assert torch.equal(said(model, bank, "e0", "e0"), expected("e8"))


def test_a_slot_holds_nothing_of_the_edit_before():
    model = tiny.build("llama")
    bank = fe.Bank(model, 1, sites=("mlp", "attn"), rank=3, fused=False)
    bank.add("all", [red(1), low_rank(2, rank=3, site="attn"), low_rank(3, rank=2, site="mlp")])
    bank.add("little", low_rank(4, rank=1, site="attn", layers=[1]))
    other = tiny.build("llama")
    fe.patch(other, low_rank(4, rank=1, site="attn", layers=[1]), fused=False)
    assert torch.equal(said(model, bank, "little", "little"), logits(other, ids(2)))


# --- host memory and files ----------------------------------------------------------------------------------------


def test_beyond_the_host_s_bytes_edits_go_to_files_and_come_back(tmp_path):
    each = 4 * 2 * tiny.LAYERS * tiny.WIDTH
    model, bank = small(count=6, host=2 * each, folder=tmp_path / "spill")
    stats = bank.stats()
    assert (stats.on_host, stats.on_disk, stats.host_bytes) == (2, 4, 2 * each)
    files = list((tmp_path / "spill").iterdir())
    assert len(files) == 4
    for n in range(6):
        assert torch.equal(said(model, bank, f"e{n}", f"e{n}"), expected(f"e{n}"))
    assert bank.stats().host_bytes <= 2 * each
    bank.remove("e0")
    bank.replace("e1", red(9))
    assert torch.equal(said(model, bank, "e1", "e1"), expected("e9"))
    assert len(list((tmp_path / "spill").iterdir())) == bank.stats().on_disk
    bank.close()
    assert not list((tmp_path / "spill").iterdir())


def test_a_file_that_was_changed_is_refused(tmp_path):
    model, bank = small(count=3, host=0, folder=tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    before = said(model, bank, "e2", "e2")
    with pytest.raises(RuntimeError, match="was changed: remove that edit and add it again"):
        said(model, bank, "e0")
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(RuntimeError, match="cannot be read"):
        said(model, bank, "e0")
    assert bank.stats().in_use == 0 and len(bank.tables.free) + bank.stats().resident == 2
    assert torch.equal(said(model, bank, "e2", "e2"), before)


def test_a_name_whose_folder_cannot_be_written_is_not_kept(tmp_path, monkeypatch):
    model, bank = small(count=1, host=0, folder=tmp_path)

    def full(self, payload):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        bank.add("e1", red(1))
    with pytest.raises(KeyError, match="holds no edit named 'e1'"):
        bank.assign(["e1", "e1"])
    assert torch.equal(said(model, bank, "e0", "e0"), expected("e0"))


# --- many, and threads --------------------------------------------------------------------------------------------


def test_thousands_of_resident_edits():
    model = tiny.build("llama")
    bank = fe.Bank(model, 4096)
    addresses = [t.data_ptr() for t in bank.tables.buffers()]
    drawn_ = drawn(1, 4096, tiny.WIDTH)
    for n in range(4096):
        bank.add(str(n), fe.Steer(drawn_[n], site="mlp"))
    assert bank.stats()[:3] == (4096, 4096, 4096) and addresses == [t.data_ptr() for t in bank.tables.buffers()]
    names = ["4095", "0", "2048", "77"]
    mixed = said(model, bank, *names)
    few = fe.Bank(tiny.build("llama"), 4)
    for name in names:
        few.add(name, fe.Steer(drawn_[int(name)], site="mlp"))
    assert torch.equal(said(few.model, few, *names), mixed)


def test_threads_add_remove_and_replace_while_forwards_run(tmp_path):
    """Every forward sees whole edits: under each name one of those it has had, and a steady one as it is."""
    model, bank = small(capacity=6, count=2, host=3 * 768, folder=tmp_path)
    steady = {name: expected(name) for name in ("e0", "e1", "e2", "e3")}
    bank.add("turn", red(2))
    wrong, stop = [], threading.Event()

    def watched(work):
        def run(number):
            try:
                while not stop.is_set():
                    work(number)
            except BaseException as error:
                wrong.append(repr(error))
                stop.set()

        return run

    @watched
    def churn(number):
        for name in (f"{number}a", f"{number}b", f"{number}c"):
            bank.add(name, red(number + 40))
        for name in (f"{number}b", f"{number}a", f"{number}c"):
            bank.remove(name)

    @watched
    def turn(number):
        bank.replace("turn", red(3))
        bank.replace("turn", red(2))

    @watched
    def serve(number):
        found = said(model, bank, f"e{number}", "turn")
        if not torch.equal(found[0], steady[f"e{number}"][0]):
            wrong.append("a steady edit changed")
        if not any(torch.equal(found[1], steady[name][1]) for name in ("e2", "e3")):
            wrong.append("a torn edit")

    jobs = [(churn, 0), (churn, 1), (turn, 0), (serve, 0), (serve, 1)]
    threads = [threading.Thread(target=work, args=(number,)) for work, number in jobs]
    for thread in threads:
        thread.start()
    stop.wait(3)
    stop.set()
    for thread in threads:
        thread.join(30)
    assert not wrong
    stats = bank.stats()
    assert stats.in_use == 0 and stats.entries == len(bank.names)
    assert len(bank.tables.free) + stats.resident == bank.capacity and len(set(bank.tables.free)) == len(bank.tables.free)


# --- tables alone -------------------------------------------------------------------------------------------------


def test_tables_need_no_model():
    tables = Tables([("layers.0", "mlp", 8), ("layers.1", "mlp", 8), ("layers.1", "ffn_in", 12)], capacity=3, rank=2)
    form = Form(scale=drawn(1, 8), read=drawn(2, 1, 8), write=drawn(3, 1, 8))
    slot = tables.take()
    tables.write(slot, tables.stage({("layers.1", "mlp"): form}))
    hidden = drawn(4, 5, 8)
    rows = torch.tensor([slot, -1, slot, -1, slot], dtype=torch.int32)
    out = fe.ops.edit(hidden, *tables.tensors("layers.1", "mlp"), slot=rows)
    torch.testing.assert_close(out[::2], form(hidden)[::2])
    assert torch.equal(out[1::2], hidden[1::2])
    assert torch.equal(fe.ops.edit(hidden, *tables.tensors("layers.0", "mlp"), slot=rows), hidden)
    tables.clear(slot)
    assert torch.equal(fe.ops.edit(hidden, *tables.tensors("layers.1", "mlp"), slot=rows), hidden)
    assert [tuple(t.shape) for t in tables.tensors("layers.1", "ffn_in")] == [(3, 12), (3, 12), (3, 2, 12), (3, 2), (3, 2, 12)]
    assert not tables.state_dict() and not list(tables.parameters())


def test_tables_refuse_what_does_not_fit():
    tables = Tables([("layers.0", "mlp", 8)], capacity=1)
    for forms, message in (
        ({("layers.0", "mlp"): Form(bias=torch.ones(9))}, "width 9, but site 'mlp' of layer layers.0 is 8 wide"),
        ({("layers.1", "mlp"): Form(bias=torch.ones(8))}, "layer layers.1, which this bank does not serve"),
        ({("layers.0", "mlp"): Form(read=torch.ones(1, 8), write=torch.ones(1, 8))}, "made for rank 0"),
        ({("layers.0", "mlp"): Form(bias=torch.full((8,), float("nan")))}, "NaN or infinite"),
    ):
        with pytest.raises(ValueError, match=message):
            tables.stage(forms)
    with pytest.raises(ValueError, match="names a place twice"):
        Tables([("layers.0", "mlp", 8)] * 2, capacity=1)
    assert tables.take() == 0 and tables.take() is None


@pytest.mark.parametrize("step", ["open", "write", "close"])
def test_a_full_disk_leaves_no_name_no_slot_and_no_file_behind(step, tmp_path, monkeypatch):
    """What was refused can be added again later under its name; who holds nothing, holds nothing."""
    model, bank = small(capacity=2, count=2, host=0, folder=tmp_path)
    before, files = bank.stats(), sorted(tmp_path.iterdir())

    class Full(io.FileIO):
        def write(self, content):
            if step == "write":
                super().write(content[:100])
                raise OSError(28, "No space left on device")
            return super().write(content)

        def close(self):
            was_open = not self.closed
            super().close()
            if was_open and step == "close":
                raise OSError(28, "No space left on device")

    def opened(path, mode="r", *_):
        if step == "open":
            raise OSError(28, "No space left on device")
        return Full(path, mode.replace("b", ""))

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "open", opened)
        with pytest.raises(OSError, match="No space left"):
            bank.add("e2", red(2))
        assert "e2" not in bank and bank.stats().entries == 2 and bank.stats().host_bytes == 0
        with pytest.raises(OSError, match="No space left"):
            bank.replace("e0", red(5))
    assert bank.stats().in_use == 0 and sorted(tmp_path.iterdir()) == files
    for name in ("e0", "e1"):
        assert torch.equal(said(model, bank, name, name), expected(name))
    bank.add("e2", red(2))
    assert torch.equal(said(model, bank, "e2", "e2"), expected("e2")) and bank.stats().in_use == before.in_use == 0


def test_an_assignment_that_fails_holds_no_slot(tmp_path, monkeypatch):
    _, bank = small(capacity=2, count=3, host=0, folder=tmp_path)
    books = bank._books

    def full(coming=0):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(books, "_trim", full)
        with pytest.raises(OSError, match="No space left"), bank.assign(["e0", None]):
            pass
    assert bank.stats().in_use == 0
    with bank.assign(["e1", "e2"]):
        pass
