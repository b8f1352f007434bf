"""Changes of a model beside forwards of other threads: refused while one is under way, and one that begins meanwhile waits."""

import functools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny_models as tiny
import torch
from standing_still import STEER, VECTOR, Around, Within

import fastedit as fe
from fastedit.patching import explain, under_way
from fastedit.patching.handle import handles
from tools.argued.models import difference, state
from tools.readers import WIDTH, model
from tools.soak import IDS, _logits

pytestmark = pytest.mark.skipif(under_way._native is None, reason="without the native module no call is seen")


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(under_way, "PATIENCE", 0.05)
    monkeypatch.setattr(under_way, "AT_EXIT", 0.05)


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


class Called(Around):
    def __call__(self, ids):
        self.first()
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


BETWEEN = {
    "generate": lambda llama, stop: llama.generate(
        IDS, max_new_tokens=3, do_sample=False, pad_token_id=0, logits_processor=[lambda _, scores: (stop(), scores)[1]]
    ),
    "forward by hand": lambda llama, stop: Around(llama, stop).forward(IDS),
    "a module around it": lambda llama, stop: Around(llama, stop)(IDS),
    "__call__ of its own": lambda llama, stop: Called(llama, stop)(IDS),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_a_call_is_seen_where_none_of_the_models_modules_runs(name):
    llama = model()
    handle = fe.patch(llama, STEER)
    said = "under way in the thread 'a reader'"
    with Within(llama, functools.partial(BETWEEN[name], llama), elsewhere=True), pytest.raises(RuntimeError, match=said):
        handle.remove()
    handle.remove()


def test_a_change_waits_for_a_forward_that_ends(monkeypatch):
    monkeypatch.setattr(under_way, "PATIENCE", 60)
    llama = model()
    before = _logits(llama)
    with Within(llama) as reader:
        threading.Timer(0.2, reader.go.set).start()
        handle = fe.patch(llama, STEER)
    assert torch.equal(reader.found[0].logits, before) and not torch.equal(_logits(llama), before)
    handle.remove()


def test_a_change_waits_for_the_whole_of_a_generate_and_later_calls_wait_for_the_change(monkeypatch):
    """Forwards within the call that was there first go on; a call that begins meanwhile stands still."""
    monkeypatch.setattr(under_way, "PATIENCE", 60)
    llama, later = model(), []
    handle = fe.patch(llama, fe.Steer(VECTOR, positions="generated"))  # its forwards look
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    before = llama.generate(IDS, **options)
    with Within(llama, lambda: llama.generate(IDS, **options)) as reader:
        removing = threading.Thread(target=handle.remove)
        removing.start()
        while not isinstance(llama.fastedit.watch, under_way.Held) or llama.fastedit.watch.open:
            time.sleep(0.001)
        second = threading.Thread(target=lambda: later.append(_logits(llama)))
        second.start()
        second.join(0.2)
        assert second.is_alive() and removing.is_alive()
        reader.go.set()
        removing.join()
        second.join()
    assert torch.equal(reader.found[0], before) and torch.equal(later[0], _logits(llama)) and not handles(llama)


def test_a_with_that_may_not_end_says_so_and_hides_no_error(monkeypatch):
    llama = model()
    handle = fe.patch(llama, STEER)
    said = "still in force: remove changes a model"
    with pytest.warns(UserWarning, match=said), pytest.raises(KeyError, match="own"), handle:
        reader = Within(llama).__enter__()
        raise KeyError("the user's own")
    assert not handle.removed
    with pytest.raises(RuntimeError, match="remove changes a model"), handle:
        pass
    reader.__exit__()
    monkeypatch.setattr(under_way, "AT_EXIT", 60)
    before = _logits(llama)
    with handle, Within(llama) as reader:
        threading.Timer(0.2, reader.go.set).start()
    assert handle.removed and not torch.equal(_logits(llama), before)


def test_calibrate_beside_a_server_leaves_no_edit(monkeypatch):
    monkeypatch.setattr(under_way, "PATIENCE", 60)
    monkeypatch.setattr(under_way, "AT_EXIT", 60)
    llama, stop = model(), threading.Event()
    before = _logits(llama)

    def serve():
        while not stop.wait(0.002):
            _logits(llama)

    server = threading.Thread(target=serve)
    server.start()
    try:
        for _ in range(3):
            assert fe.calibrate(llama, fe.Steer(VECTOR), [[1, 2, 3]], target_kl=1e-4).strength > 0
    finally:
        stop.set()
        server.join()
    assert not handles(llama) and torch.equal(_logits(llama), before)


def test_a_second_stack_is_looked_at_again(monkeypatch):
    t5 = tiny.build("t5").eval()
    vector = torch.linspace(-5, 5, t5.config.d_model)
    with torch.no_grad():
        encoded = t5.encoder(input_ids=torch.tensor([[3, 4, 5]]))

    def call():
        with torch.no_grad():
            return t5(encoder_outputs=encoded, decoder_input_ids=torch.tensor([[3, 4]])).logits

    fe.patch(t5, fe.Steer(vector, site="mlp", layers=["encoder.0"]))
    before, found, reached, go = call(), [], threading.Event(), threading.Event()

    def stand(*_):
        reached.set()
        go.wait(60)

    hook = t5.decoder.block[0].register_forward_hook(stand)
    thread = threading.Thread(target=lambda: found.append(call()))
    settle = under_way.settle

    def too_early(*given):
        settle(*given)
        thread.start()
        assert reached.wait(60)

    monkeypatch.setattr(under_way, "settle", too_early)
    with pytest.raises(RuntimeError, match="under way"):
        fe.patch(t5, fe.Steer(vector, site="mlp", layers=["decoder.0", "decoder.1"]))
    go.set()
    thread.join()
    hook.remove()
    assert torch.equal(found[0], before) and torch.equal(call(), before)


def test_a_compiled_forward_that_begins_during_a_change():
    llama, found = model(), []
    handle = fe.patch(llama, STEER)
    compiled = torch.compile(llama, backend="eager")
    with torch.no_grad():
        before = compiled(IDS).logits

        def run():
            with torch.no_grad():
                found.append(compiled(IDS).logits)

        thread = threading.Thread(target=run)
        with handle._root.changing(llama, "a test"):
            thread.start()
            thread.join(0.3)
        thread.join()
        assert torch.equal(found[0], before)


def test_a_module_that_another_thread_rebuilds_is_in_nobodys_way():
    class Rebuilt(torch.nn.Module):
        def forward(self, stop):
            while not stop.is_set():
                for name in [f"a{n}" for n in range(2000)]:
                    self.add_module(name, torch.nn.Identity())
                self._modules.clear()

    llama, stop = model(), threading.Event()
    thread = threading.Thread(target=Rebuilt(), args=(stop,))
    thread.start()
    try:
        for _ in range(5):
            fe.patch(llama, STEER).remove()
    finally:
        stop.set()
        thread.join()


def test_explain_of_a_model_whose_forward_uses_threads_is_refused(monkeypatch):
    monkeypatch.setattr(explain, "WORKERS", 0.2)

    class Pooled(Around):
        def forward(self, input_ids):
            ids = input_ids
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(self.inner, ids).result()

    pooled = Pooled(model())
    handle = fe.patch(pooled, STEER)
    with torch.no_grad():
        before = pooled(IDS).logits
        with pytest.raises(RuntimeError, match="explain cannot serve the model"):
            handle.explain(IDS)
        assert torch.equal(pooled(IDS).logits, before)


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
    llama, inner = model(), []
    before = state(llama)
    settle = under_way.settle

    def too_early(*given):
        settle(*given)
        inner.append(Within(llama).__enter__())

    monkeypatch.setattr(under_way, "settle", too_early)
    try:
        with pytest.raises(RuntimeError, match="under way"):
            fe.patch(llama, STEER)
    finally:
        inner[0].__exit__()
    assert difference(before, state(llama)) is None and "fastedit" not in llama._modules
    assert len(inner) == 1 and torch.equal(inner[0].found[0].logits, _logits(llama))


def test_looks_at_running_threads_do_not_crash():
    """Reading sys._current_frames()'s f_locals did, in less than a second of this."""
    models, stop, seen = [model() for _ in range(6)], threading.Event(), 0

    def serve(llama):
        while not stop.is_set():
            _logits(llama)

    threads = [threading.Thread(target=serve, args=(llama,)) for llama in models]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 2
    while time.monotonic() < end:
        seen += len(under_way.calling(models[0]))
    stop.set()
    for thread in threads:
        thread.join()
    assert seen and not under_way.calling(models[0])


def test_a_look_leaves_a_forward_its_own_locals():
    found = []

    class Own(Around):
        def forward(self, ids):
            mine = locals()
            self.first()
            found.append(mine["ids"] is ids)
            return self.inner(ids)

    llama = model()
    handle = fe.patch(llama, STEER)
    with Within(llama, lambda stop: Own(llama, stop)(IDS), elsewhere=True), pytest.raises(RuntimeError, match="under way"):
        handle.remove()
    assert found == [True]
    handle.remove()
