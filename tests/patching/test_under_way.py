"""Changes of a model beside forwards of other threads: refused while one is under way, and one that begins meanwhile waits."""

import threading

import pytest
import tiny_models as tiny
import torch

import fastedit as fe
from tools.argued.models import difference, state
from tools.readers import WIDTH, model
from tools.soak import IDS, _logits

VECTOR = torch.linspace(-1, 1, WIDTH)
STEER = fe.Steer(VECTOR, site="mlp")


class Within:
    """A thread that stands still within layer 1 of a call of a model, until it is let go."""

    def __init__(self, llama, call=None):
        self.reached, self.go, self.found = threading.Event(), threading.Event(), []
        self.hook = llama.model.layers[1].self_attn.register_forward_hook(torch.compiler.disable(self.stop))
        call = (lambda: llama(IDS)) if call is None else call
        self.thread = threading.Thread(target=self.run, args=(call,), name="a reader")

    def stop(self, *_):
        self.reached.set()
        assert self.go.wait(300)

    @torch.no_grad()
    def run(self, call):
        try:
            self.found.append(call())
        except BaseException as error:
            self.found.append(error)
            self.reached.set()

    def __enter__(self):
        self.thread.start()
        assert self.reached.wait(300) and not self.found, self.found
        return self

    def __exit__(self, *_):
        self.go.set()
        self.thread.join()
        self.hook.remove()


def changes(llama, folder):
    """{what is said of it: (prepares and returns what the change takes, the change)}"""

    def doubled(handle):
        handle.load_tensors({name: 2 * tensor for name, tensor in handle.named_tensors().items()})

    def merged():
        handle = fe.patch(llama, STEER)
        handle.merge()
        return handle

    return {
        "patch": (lambda: None, lambda _: fe.patch(llama, STEER)),
        "load": (lambda: None, lambda _: fe.load(llama, folder)),
        "load_tensors": (lambda: fe.patch(llama, STEER), doubled),
        "merge": (lambda: fe.patch(llama, STEER), lambda h: h.merge()),
        "unmerge": (merged, lambda h: h.unmerge()),
        "remove": (lambda: fe.patch(llama, STEER), lambda h: h.remove()),
        "a new Bank": (lambda: None, lambda _: fe.Bank(llama, 2)),
        "close": (lambda: fe.Bank(llama, 2), lambda bank: bank.close()),
        "explain": (lambda: fe.patch(llama, STEER), lambda h: h.explain(IDS)),
    }  # fmt: skip


@pytest.mark.parametrize("name", changes(None, None))
def test_a_change_beside_a_forward_is_refused_and_made_after_it(name, tmp_path):
    llama = model()
    with fe.patch(llama, STEER) as handle:
        handle.save(tmp_path)
    prepare, change = changes(llama, tmp_path)[name]
    given = prepare()
    unharmed = _logits(llama)
    with Within(llama) as reader:
        before = state(llama)
        with pytest.raises(RuntimeError, match=f"{name} changes a model .* is under way in the thread 'a reader'"):
            change(given)
        assert difference(before, state(llama)) is None
    assert torch.equal(reader.found[0].logits, unharmed)
    change(given)
    _logits(llama)
    if name in ("patch", "load", "load_tensors", "remove"):
        assert not torch.equal(_logits(llama), unharmed)


class Around(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, ids):
        return self.inner(ids)


CALLS = {
    "generate": lambda llama: llama.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0),
    "forward": lambda llama: llama.forward(IDS),
    "an inner module": lambda llama: llama.model.layers[1](torch.ones(1, 4, WIDTH), position_embeddings=ROTARY),
    "a module around it": lambda llama: Around(llama)(IDS),
    "compiled": lambda llama: torch.compile(llama, backend="eager")(IDS),
}
ROTARY = (torch.ones(1, 4, 8), torch.zeros(1, 4, 8))


@pytest.mark.parametrize("name", CALLS)
def test_every_way_of_calling_is_seen(name):
    llama = model()
    handle = fe.patch(llama, STEER)
    said = "under way in the thread 'a reader'"
    with Within(llama, lambda: CALLS[name](llama)) as reader, pytest.raises(RuntimeError, match=said):
        handle.remove()
    assert not isinstance(reader.found[0], BaseException), reader.found
    handle.remove()


def test_another_model_and_a_dial_need_no_waiting():
    llama, other = model(), model()
    handle = fe.patch(llama, STEER)
    with Within(llama):
        fe.patch(other, STEER).remove()
        handle.strength = 0.5
    handle.remove()


def test_a_forward_that_begins_during_a_change_waits_for_it():
    llama = model()
    first = fe.patch(llama, fe.Steer(VECTOR, positions="generated"))
    before, found = _logits(llama), []
    with fe.patch(llama, STEER):
        after = _logits(llama)
    ran = []
    hook = llama.model.layers[0].register_forward_hook(lambda *_: ran.append(1))
    thread = threading.Thread(target=lambda: found.append(_logits(llama)))
    with first._root.changing(llama, "a test"):
        thread.start()
        thread.join(0.3)
        assert thread.is_alive() and not ran
        fe.patch(llama, STEER)
    thread.join()
    hook.remove()
    assert torch.equal(found[0], after) and not torch.equal(before, after)


def test_a_forward_that_waits_for_the_last_edit_to_go_is_the_models_own():
    llama, found = model(), []
    before = _logits(llama)
    handle = fe.patch(llama, [STEER, fe.Steer(VECTOR, positions="prompt")])
    thread = threading.Thread(target=lambda: found.append(_logits(llama)))
    with handle._root.changing(llama, "a test"):
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        handle.remove()
    thread.join()
    assert torch.equal(found[0], before)


def test_a_forward_that_begins_before_the_first_patch_is_in_force(monkeypatch):
    """Between the look at other threads and the swap: looked for again, and all is undone."""
    from fastedit.patching import under_way

    llama, inner = model(), []
    before = state(llama)
    refuse = under_way.refuse

    def too_early(patched, what):
        refuse(patched, what)
        inner.append(Within(llama).__enter__())

    monkeypatch.setattr(under_way, "refuse", too_early)
    try:
        with pytest.raises(RuntimeError, match="under way"):
            fe.patch(llama, STEER)
    finally:
        inner[0].__exit__()
    assert difference(before, state(llama)) is None and "fastedit" not in llama._modules
    assert len(inner) == 1 and torch.equal(inner[0].found[0].logits, _logits(llama))


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
