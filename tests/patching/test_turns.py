"""Changes of one model take turns: with each other, with dials, copies, forks and backwards."""

import copy
import os
import signal
import threading
import time

import pytest
import tiny_models as tiny
import torch
from standing_still import STEER, Around, Within

import fastedit as fe
from fastedit.patching import under_way
from fastedit.patching.handle import handles
from tools.argued.models import difference, state
from tools.readers import model
from tools.soak import IDS, _logits


def at_once(llama, *acts):
    """The errors of acts in threads that have all begun, one after the other, before the first may go on."""
    found = []

    def run(act):
        try:
            act()
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=run, args=(act,)) for act in acts]
    with llama.fastedit.turn, llama.fastedit.dials:
        for thread in threads:
            thread.start()
            time.sleep(0.1)
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ("merge", "merge", "MergeError: this handle is merged already"),
        ("remove", "remove", None),
        ("merge", "load_tensors", "MergeError: the edits are merged"),
        ("remove", "load_tensors", "RuntimeError: this handle was removed"),
        ("remove", "merge", "RuntimeError: this handle was removed"),
    ],
)
def test_two_changes_of_one_handle_take_turns(first, second, said):
    llama = model()
    handle = fe.patch(llama, STEER)
    acts = {
        "merge": handle.merge, "remove": handle.remove,
        "load_tensors": lambda: handle.load_tensors({name: 0 * t for name, t in handle.named_tensors().items()}),
    }  # fmt: skip
    found = at_once(llama, acts[first], acts[second])
    assert found == [] if said is None else found[0].startswith(said) and len(found) == 1, found


def test_a_dial_beside_a_merge_is_in_the_weights_or_refused():
    llama = model()
    unedited = _logits(llama)
    handle = fe.patch(llama, STEER)
    found = at_once(llama, handle.merge, lambda: setattr(handle, "strength", 0.0))
    assert handle.merged and torch.allclose(_logits(llama), unedited, atol=1e-5) == (handle.strength == 0.0)
    assert bool(found) == (handle.strength == 1.0) and all("MergeError: the edits are merged" in one for one in found)


def test_a_bank_is_closed_twice_at_once():
    llama = model()
    bank = fe.Bank(llama, 2)
    found = at_once(llama, bank.close, bank.close)
    assert found == [] and bank.closed


def test_a_dial_within_a_fold_is_seen_by_the_next_forward(monkeypatch):
    """Two edits of one site are folded. The tensors that a forward reads are never written again."""
    llama, want = model(), []
    handle = fe.patch(llama, [fe.ScaleBias(site="mlp"), STEER])
    for strength in (0.25, 1.5):
        handle.strength = strength
        want.append(_logits(llama))
    stage = next(iter(handle._root.sites.values())).stages[0]
    read = stage.folded
    kept = [None if t is None else t.clone() for t in read]
    handle.strength = 0.25
    assert torch.equal(_logits(llama), want[0])
    assert all(t is None or torch.equal(t, k) for t, k in zip(read, kept, strict=True))
    fold = type(stage).fold

    def dialled_meanwhile(self, *given):
        folded = fold(self, *given)
        handle.strength = 0.25
        return folded

    handle.strength = 1.5
    with monkeypatch.context() as patch:
        patch.setattr(type(stage), "fold", dialled_meanwhile)
        _logits(llama)
    assert torch.equal(_logits(llama), want[0])


def test_a_copy_made_during_a_change_is_protected():
    llama = model()
    handle = fe.patch(llama, STEER)
    with handle._root.changing(llama, "a test"):
        twin = copy.deepcopy(llama)
    (other,) = handles(twin)
    with Within(twin), pytest.raises(RuntimeError, match="under way"):
        other.remove()
    assert torch.equal(torch.compile(twin, backend="eager")(IDS).logits, twin(IDS).logits)
    other.remove()


def test_a_fork_by_who_changes_the_model_goes_on():
    llama = model()
    handle = fe.patch(llama, STEER)
    child = None
    try:
        with handle._root.changing(llama, "a test"):
            child = os.fork()
        if child == 0:
            signal.alarm(30)
            handle.remove()
            os._exit(0)
    finally:
        if child == 0:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_fork_during_a_change_does_not_hang():
    llama = model()
    handle = fe.patch(llama, STEER)
    holding, go = threading.Event(), threading.Event()

    def hold():
        with under_way.MAKING, handle._root.turn:
            holding.set()
            assert go.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert holding.wait(60)
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        try:
            handle.strength = 0.5
            fe.patch(llama, STEER).remove()
            os._exit(0)
        finally:
            os._exit(1)
    go.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_does_not_compute_again_with_other_tensors(reentrant):
    llama = model().train()
    llama.gradient_checkpointing_enable({"use_reentrant": reentrant})
    llama.enable_input_require_grads()
    handle = fe.patch(llama, fe.RED())
    loss = llama(IDS, labels=IDS).loss
    handle.load_tensors({name: tensor + 1 for name, tensor in handle.named_tensors().items()})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_two_threads_patch_one_model():
    llama, handles, start = model(), [], threading.Barrier(2)

    def work():
        start.wait()
        handles.append(fe.patch(llama, STEER))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {handle._root for handle in handles} == {llama.fastedit} and len({handle.name for handle in handles}) == 2
    with_both = _logits(llama)
    for handle in handles:
        handle.remove()
    fe.patch(llama, [STEER, STEER])
    assert torch.allclose(with_both, _logits(llama), atol=1e-6)


def test_a_load_that_fails_under_its_own_change_leaves_nothing(tmp_path):
    llama = tiny.build("llama")
    with fe.patch(llama, fe.RED()) as handle:
        handle.save(tmp_path)
    (tmp_path / "edit.safetensors").write_bytes(b"")
    before = state(llama)
    with pytest.raises(fe.EditFileError):
        fe.load(llama, tmp_path)
    assert difference(before, state(llama)) is None


@pytest.mark.parametrize("change", ["merge", "unmerge", "load_tensors"])
def test_a_backward_does_not_take_what_a_change_after_its_forward_has_put_there(change):
    llama = model()
    handle = fe.patch(llama, fe.RED() if change == "load_tensors" else STEER)
    if change == "unmerge":
        handle.merge()
    loss = llama(IDS, labels=IDS).loss
    if change == "load_tensors":
        handle.load_tensors({name: tensor + 1 for name, tensor in handle.named_tensors().items()})
    else:
        getattr(handle, change)()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_dial_is_turned_while_a_change_waits(monkeypatch):
    """What turns it may be the call that the change waits for."""
    monkeypatch.setattr(under_way, "PATIENCE", 60)
    llama = model()
    handle = fe.patch(llama, STEER)

    def call(stop):
        def first():
            stop()
            handle.strength = 0.5

        return Around(llama, first)(IDS)

    with Within(llama, call, elsewhere=True) as reader:
        removing = threading.Thread(target=handle.remove)
        removing.start()
        while not isinstance(llama.fastedit.watch, under_way.Held) or llama.fastedit.watch.open:
            time.sleep(0.001)
        reader.go.set()
        removing.join(30)
        assert not removing.is_alive() and handle.removed
    assert not isinstance(reader.found[0], BaseException) and handle.strength == 0.5
