"""The playground without a page: replies side by side, dials, colors, directions, export; and its page in a browser."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pages
import pytest
import tiny_models
import torch
from test_cli import invoke
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import fastedit as fe
from bench.playground import CHROMIUM, WAIT, color, export, make, put
from fastedit.examples import HAPPY, SAD, lines
from fastedit.patching.handle import handles
from fastedit.playground.session import Session, best_layers

WORDS = "the a girl boy was happy sad smiled cried laughed wept glad upset and he she they".split()  # noqa: SIM905
POSITIVE = ["the girl was happy and smiled", "he laughed", "they was glad"]
NEGATIVE = ["the girl was sad and cried", "he wept", "they was upset"]
ASK = [{"role": "user", "content": "the girl was"}]


def tokenizer():
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {word: 4 + i for i, word in enumerate(WORDS)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture
def session():
    return Session(tiny_models.build("llama", num_hidden_layers=5), tokenizer())


def last(session, dials, **more):
    return list(session.reply(ASK, ASK, dials, max_new_tokens=8, **more))[-1]


def test_without_an_edit_both_sides_say_the_same_as_generate(session):
    step = last(session, dict)
    ids = torch.tensor([session._prompt(ASK)])
    expected = session.model.generate(ids, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids))
    said = session.tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    assert step.plain == step.edited == said and step.kl == 0 and step.finished


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_a_reply_gives_back_what_many_threads_freed(session):
    """Each of a page's tokens may be another thread's, and glibc keeps for each thread what was freed there."""

    def anonymous():
        return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("RssAnon"))) >> 10  # MB

    def fill(kept):
        parts = [bytearray(64 << 10) for _ in range(256)]  # 16 MB of one thread, from its own heap
        kept.append(parts[-1])  # the last one stays: the heap cannot shrink by itself
        del parts

    kept, steps = [], session.reply(ASK, ASK, dict, max_new_tokens=4)
    next(steps)
    before = anonymous()
    with ThreadPoolExecutor(8) as pool:
        barrier = threading.Barrier(8)
        list(pool.map(lambda _: (barrier.wait(), fill(kept)), range(8)))
        grown = anonymous() - before
        steps.close()
        assert anonymous() - before < grown / 4 and grown > 64


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_dial_changes_one_side_and_a_turn_shows_in_the_next_token(session, temperature):
    session.create("happy", POSITIVE, NEGATIVE)
    before = last(session, dict, temperature=temperature)
    dials = {}
    kls = []
    for number, step in enumerate(session.reply(ASK, ASK, lambda: dials, max_new_tokens=8, temperature=temperature)):
        kls.append(step.kl)
        if number == 3:
            dials["happy"] = 3.0
    assert step.plain == before.plain
    assert kls[:4] == [0] * 4 and kls[4] > 0.1


def test_every_token_is_that_of_the_dial_as_it_stood_just_before_it(session):
    """Against whole sequences through plain hooks, in which each position has the dial that stood when it was read."""
    held = session.create("happy", POSITIVE, NEGATIVE, layers=[1, 2])
    turned, dials = [0.0, 4.0, 4.0, -4.0, 0.0, 2.0], {}
    steps = session.reply(ASK, ASK, lambda: dials, max_new_tokens=len(turned))
    prompt = session._prompt(ASK)
    ids, by_position = list(prompt), []
    for number, dial in enumerate(turned):
        dials["happy"] = dial  # the generator stands still between two tokens
        step = next(steps)
        by_position += [dial] * (len(ids) - len(by_position))
        p, q = (_hooked(session, held, ids, by) for by in ([0.0] * len(ids), by_position))
        assert step.kl == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-3, abs=1e-6)
        assert number == 0 or step.kl > 0
        ids.append(int(q.argmax()))
        assert step.edited == session.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


@torch.no_grad()
def _hooked(session, held, ids, dials):
    """log p of the next token, float64, with dials[k] at position k."""
    amount = torch.tensor(dials)[:, None] * held.statistics["strength"]
    hooks = [
        session.model.model.layers[layer].register_forward_hook(
            lambda m, a, out, add=amount * held.directions[layer]: (
                out + add if isinstance(out, torch.Tensor) else (out[0] + add, *out[1:])
            )
        )
        for layer in held.statistics["layers"]
    ]
    with session.lock:
        session._dial({})
        logits = session.model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    for hook in hooks:
        hook.remove()
    return logits.double().log_softmax(-1)


def test_a_reply_has_a_step_a_token_and_leaves_no_prompt_length_behind(session):
    """color and other forwards of the same thread are no replies."""
    text = "the girl was happy"
    session.create("last", POSITIVE, NEGATIVE, positions="generated")
    before = session.color(text, "last", {"last": 3.0})[2]
    assert len(list(session.reply(ASK, ASK, lambda: {"last": 1.0}, max_new_tokens=4))) <= 4
    assert torch.equal(session.color(text, "last", {"last": 3.0})[2], before)


def test_two_visitors_give_one_name(session):
    errors = []

    def make():
        try:
            session.create("twin", POSITIVE, NEGATIVE)
        except ValueError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=make) for _ in range(2)]
    with session.lock:
        for thread in threads:
            thread.start()
            time.sleep(0.1)
    for thread in threads:
        thread.join()
    assert len(errors) == 1 and "taken" in errors[0]
    assert [held.handle for held in session.edits.values()] == handles(session.model)


def test_the_edited_side_is_generate_under_the_edit(session):
    session.create("happy", POSITIVE, NEGATIVE)
    step = last(session, lambda: {"happy": 2.0})
    session.edits["happy"].handle.strength = 2.0
    ids = torch.tensor([session._prompt(ASK)])
    expected = session.model.generate(ids, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids))
    assert step.edited == session.tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)


def test_two_visitors_keep_their_own_dials(session):
    session.create("happy", POSITIVE, NEGATIVE)
    alone = [last(session, lambda d=d: {"happy": d}) for d in (0.0, 3.0)]
    together = [None, None]

    def visit(index, dial):
        together[index] = last(session, lambda: {"happy": dial})

    threads = [threading.Thread(target=visit, args=pair) for pair in ((0, 0.0), (1, 3.0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_colors_are_cosines_with_the_direction(session):
    held = session.create("happy", POSITIVE, NEGATIVE)
    tokens, layers, values = session.color("the girl was  happy", "happy")
    assert "".join(tokens) == "the girl was  happy" and values.shape == (len(layers), len(tokens))
    ids = session.tokenizer("the girl was  happy", return_tensors="pt")["input_ids"]
    for at in (2, 4):  # the last one, too, before the final norm
        kept = []
        hook = session.model.model.layers[layers[at]].register_forward_hook(lambda m, a, out, kept=kept: kept.append(out))
        session.model(ids)
        hook.remove()
        hidden = kept[0] if isinstance(kept[0], torch.Tensor) else kept[0][0]
        torch.testing.assert_close(values[at], torch.cosine_similarity(hidden[0], held.directions[layers[at]][None], dim=-1))


def test_what_is_exported_loads_and_does_the_same(session, tmp_path):
    session.create("happy", POSITIVE, NEGATIVE)
    step = last(session, lambda: {"happy": 1.5})
    paths = session.export("happy", 1.5, tmp_path)
    assert sorted(p.name for p in paths) == ["happy", "happy.gguf"]
    other = Session(tiny_models.build("llama", num_hidden_layers=5), tokenizer())
    other.model.load_state_dict({k: v for k, v in session.model.state_dict().items() if not k.startswith("fastedit.")})
    handle = fe.load(other.model, tmp_path / "happy")
    assert handle.strength == 1.5
    handle.remove()
    again = Session(other.model, tokenizer(), tmp_path)
    assert list(again.edits) == ["happy"] and last(again, lambda: {"happy": 1.5}).edited == step.edited
    vector = fe.Directions.load_gguf(tmp_path / "happy.gguf")
    with fe.patch(other.model, fe.Steer(vector, layers=list(vector))):
        ids = torch.tensor([session._prompt(ASK)])
        expected = other.model.generate(ids, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids))
    assert session.tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True) == step.edited


def test_best_layers_are_a_third_and_neither_end():
    vectors = {i: torch.ones(2) for i in range(8)}
    directions = fe.Directions(vectors, statistics={i: {"separation": float(i % 5)} for i in range(8)})
    assert best_layers(directions) == [3, 4]


def test_bad_input_is_refused_and_leaves_no_edit(session, tmp_path):
    with pytest.raises(ValueError, match="at least two"):
        session.create("x", "one", NEGATIVE)
    with pytest.raises(ValueError, match="slash"):
        session.create("../x", POSITIVE, NEGATIVE)
    with pytest.raises(KeyError):
        session.color("the girl", "nobody")
    assert not session.edits
    with pytest.raises(ValueError, match="no folder"):
        Session(session.model, session.tokenizer, tmp_path / "none")


def test_layers_and_positions_are_those_asked_for(session, tmp_path):
    session.create("late", POSITIVE, NEGATIVE, layers=[2, 3], positions="generated")
    (edit,) = session.edits["late"].handle.edits
    assert list(edit.layers) == [2, 3] and "positions='generated'" in repr(edit)
    assert "layers 2 to 3" in session.edits["late"].about and "on generated" in session.edits["late"].about
    kls = [step.kl for step in session.reply(ASK, ASK, lambda: {"late": 3.0}, max_new_tokens=4) if step.kl is not None]
    assert kls[0] == 0 and kls[1] > 0.1  # the first token's logits are those of the prompt
    assert [path.name for path in session.export("late", 1.0, tmp_path)] == ["late"]  # llama.cpp knows no positions
    three = {"like": POSITIVE, "unlike": NEGATIVE}
    for wrong in ({"layers": [9]}, {"layers": []}, {"positions": "now"}, {"like": LIKE}, three):
        with pytest.raises(ValueError):
            session.create("wrong", POSITIVE, NEGATIVE, **wrong)
    assert list(session.edits) == ["late"]


LIKE = ["the boy was", "a boy smiled", "the boy and he", "boy", "a boy was"]
UNLIKE = ["the girl was", "a girl smiled", "the girl and she", "girl", "a girl was"]


def test_a_condition_on_the_prompt_opens_for_some_and_holds_for_a_reply_under_way(session):
    session.create("happy", POSITIVE, NEGATIVE, like=LIKE, unlike=UNLIKE)
    (edit,) = session.edits["happy"].handle.edits
    assert edit.gate is not None and "prompts like 5" in session.edits["happy"].about
    moved = {}
    for text in ("the boy and he", "the girl and she"):
        ask = [{"role": "user", "content": text}]
        moved[text] = max(step.kl or 0 for step in session.reply(ask, ask, lambda: {"happy": 3.0}, max_new_tokens=4))
    assert moved["the boy and he"] > 0.1 and moved["the girl and she"] == 0
    ask, dials, kls = [{"role": "user", "content": "the boy and he"}], {"happy": 0.0}, []
    for number, step in enumerate(session.reply(ask, ask, lambda: dials, max_new_tokens=6)):
        kls.append(step.kl)
        if number == 1:  # an edit that is decided on the prompt arrives when the prompt is read
            session.create("second", POSITIVE, NEGATIVE, like=LIKE, unlike=UNLIKE)
            dials["second"] = 3.0
    assert kls[:2] == [0, 0] and max(kls[2:]) > 0.1


def test_a_loaded_edit_and_a_loaded_probe_color(session, tmp_path):
    vector = {layer: torch.randn(32, generator=torch.Generator().manual_seed(layer)) for layer in (1, 3)}
    for name, edit in (("mood", fe.Steer(vector)), ("watch", fe.Probe(vector)), ("tuned", fe.RED(layers=[1]))):
        with fe.patch(session.model, edit) as handle:
            handle.save(tmp_path / name)
    again = Session(session.model, session.tokenizer, tmp_path)
    assert {name: held.dialed for name, held in again.edits.items()} == {"mood": True, "tuned": True, "watch": False}
    for name in ("mood", "watch"):
        _, layers, values = again.color("the girl was", name)
        assert layers == [1, 3] and values.shape == (2, 3)
    torch.testing.assert_close(again.color("the girl was", "mood")[2], again.color("the girl was", "watch")[2])
    with pytest.raises(ValueError, match="no direction"):
        again.color("the girl was", "tuned")


def test_a_model_that_fails_to_load_is_one_line_and_no_page(tmp_path):
    pytest.importorskip("gradio", reason="needs Gradio: pip install gradio")
    (tmp_path / "model").mkdir()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for wrong in ([str(tmp_path / "model")], ["smollm2", "--edits", str(tmp_path / "none")], ["smollm2", "--port", port]):
            said = invoke("playground", *wrong, code=2)
            assert "Traceback" not in said and wrong[-1] in "".join(said.split())


FIRST_VISIT = """
import json, sys, types, urllib.request
from fastedit.playground import page

served = page.serve(types.SimpleNamespace(edits={}), "tiny", port=7997, block=False)
before = set(sys.modules)

def asked(path, sent=None):
    sent = sent and json.dumps(sent).encode()
    request = urllib.request.Request(served.local_url + path, sent, {"Content-Type": "application/json"})
    return urllib.request.urlopen(request)

sizes = {"page": len(asked("").read())}
config = json.load(asked("config"))
first = [d for d in config["dependencies"] if any(event == "load" for _, event in d["targets"])]
for d in first:
    asked("gradio_api/queue/join", {"data": [None] * len(d["inputs"]), "fn_index": d["id"], "session_hash": "visitor"}).read()
with asked("gradio_api/queue/data?session_hash=visitor") as told:
    messages = [json.loads(line[6:]) for line in told if line.startswith(b"data: ")]
done = [m["success"] for m in messages if m["msg"] == "process_completed"]
kinds = [component["type"] for component in config["components"]]
print(json.dumps({"imported": sorted(set(sys.modules) - before), "done": done, "kinds": kinds}), flush=True)
import os
os._exit(0)
"""


def test_a_first_visit_waits_for_no_import_and_no_hidden_tab():
    pytest.importorskip("gradio", reason="needs Gradio: pip install gradio")
    ran = subprocess.run([sys.executable, "-c", FIRST_VISIT], capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stderr[-2000:]
    told = json.loads(ran.stdout.splitlines()[-1])
    assert told["done"] == [True]  # the dials: the only event before a visitor does something
    assert len(told["imported"]) < 40, told["imported"]  # Matplotlib's pyplot alone is more than a hundred
    assert not {"code", "file", "html"} & set(told["kinds"])  # of tabs that nobody has opened


@contextlib.contextmanager
def opened(session, title, port):
    """(browser, address) of a session's page in a real Chromium."""
    pytest.importorskip("gradio", reason="needs Gradio: pip install gradio")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    if binary is None:
        pytest.skip("needs Chromium (Debian: apt install chromium)")
    from fastedit.playground import page

    served = page.serve(session, title, port=port, block=False)
    try:
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=binary, args=CHROMIUM, timeout=WAIT)
            yield browser, served.local_url
            browser.close()
    finally:
        served.close()


def new_tab(browser, url, hosts):
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.set_default_timeout(WAIT)
    tab.on("request", lambda request: hosts.add(request.url.split("/")[2].split(":")[0]))
    tab.goto(url, wait_until="commit")
    tab.wait_for_selector("#message textarea")
    return tab


def send(tab, text, written):
    """Sends a message and waits for `written` in the edited reply."""
    tab.fill("#message textarea", text)
    tab.click("#send")
    tab.wait_for_function("text => document.querySelector('#edited').innerText.includes(text)", arg=written)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_model_that_fails_is_a_message_in_the_browser_and_the_page_goes_on(session, monkeypatch):
    """While it is loaded there is no page yet: test_a_model_that_fails_to_load_is_one_line_and_no_page."""
    with opened(session, "tiny", 7996) as (browser, url):
        tab = new_tab(browser, url, set())
        put(tab, "#length", 8)
        forward = session.model.forward
        monkeypatch.setattr(session.model, "forward", lambda *a, **more: broken())
        tab.fill("#message textarea", ASK[0]["content"])
        tab.click("#send")
        tab.wait_for_function("document.body.innerText.includes('The model failed while it wrote')")
        said = tab.inner_text("body")
        assert "RuntimeError: there is no memory left" in said and "Traceback" not in said and ".py" not in said
        monkeypatch.setattr(session.model, "forward", forward)
        send(tab, ASK[0]["content"], last(session, dict).edited)


def broken():
    raise RuntimeError("there is no memory left")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_page_in_a_browser(session, monkeypatch):
    hosts = set()
    with opened(session, "tiny", 7999) as (browser, url):
        first, second = (new_tab(browser, url, hosts) for _ in range(2))
        make(first, "happy", POSITIVE, NEGATIVE)
        assert list(session.edits) == ["happy"]
        put(first, "#dial-happy", 3)
        for tab in (first, second):
            put(tab, "#length", 8)
        plain, edited = last(session, dict).plain, last(session, lambda: {"happy": 3.0}).edited
        assert plain != edited
        send(first, ASK[0]["content"], edited)
        send(second, ASK[0]["content"], plain)  # this tab's dial is at 0
        assert plain in first.inner_text("#plain") and plain in second.inner_text("#plain")
        # The meter may come after the words.
        second.wait_for_function("document.querySelector('#meter').innerText.includes('0.00 nats now')")

        color(first, "the girl was happy")
        export(first)
        for file in ("happy.zip", "happy.gguf"):  # a name is shown in two parts
            first.wait_for_function(
                "file => document.querySelector('#files').innerText.replace(/\\s/g, '').includes(file)", arg=file
            )

        first.get_by_role("tab", name="Make a direction").click()
        first.fill("#name input, #name textarea", "happy")
        first.click("#make")  # the name is taken: said on the page, and nothing is made
        first.wait_for_function("document.body.innerText.includes('taken')")
        assert list(session.edits) == ["happy"]

        steps, reply = [], session.reply
        monkeypatch.setattr(session, "reply", lambda *given, **more: watched(reply(*given, **more), steps))
        first.click("#clear")
        put(first, "#dial-happy", 0)
        put(first, "#length", 512)
        first.fill("#message textarea", ASK[0]["content"])
        first.click("#send")
        first.wait_for_function("document.querySelector('#edited').innerText.length > 20")
        put(first, "#dial-happy", 4)
        first.wait_for_function("!document.querySelector('#meter').innerText.includes(': 0.00')")
        first.click("#stop")
        assert steps[0] == 0 and steps[-1] > 0.1  # turned while it wrote
    assert hosts <= {"127.0.0.1", "localhost"}, hosts


def watched(steps, kls):
    """The steps, slowly, with their KL noted."""
    for step in steps:
        kls.append(step.kl)
        yield step
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_pictures_of_the_page_with_the_chat_model(chat_model, tmp_path):
    """Writes the pictures of docs/playground.md, into docs/ where FASTEDIT_PICTURES is set."""
    from PIL import Image

    folder = pages.ROOT / "docs" if os.environ.get("FASTEDIT_PICTURES") else tmp_path
    session = Session(*chat_model)
    with opened(session, "SmolLM2-135M-Instruct", 7998) as (browser, url):
        tab = new_tab(browser, url, set())
        make(tab, "happy", lines(HAPPY), lines(SAD))
        put(tab, "#dial-happy", 1.5)
        put(tab, "#length", 48)
        send(tab, "How was your weekend?", last_words(session, "How was your weekend?", 48, 1.5))
        tab.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
        tab.screenshot(path=tmp_path / "page.png", clip={"x": 0, "y": 0, "width": 1280, "height": 780})
        tab.get_by_role("tab", name="Color tokens").click()
        tab.fill("#colored-text textarea", "It was a wonderful day, and then it was a terrible day.")
        tab.click("#color")
        tab.wait_for_selector("#colored .token")
        tab.wait_for_function("document.querySelectorAll('[role=tabpanel] .plot-container img, [role=tabpanel] img').length > 0")
        tab.wait_for_timeout(1000)
        top = tab.evaluate("document.querySelector('[role=tablist]').getBoundingClientRect().top + window.scrollY")
        whole = {"x": 0, "y": top, "width": 1280, "height": tab.evaluate("document.documentElement.scrollHeight") - top}
        tab.screenshot(path=tmp_path / "colors.png", full_page=True, clip=whole)
    for name in ("page", "colors"):
        picture = Image.open(tmp_path / f"{name}.png").convert("RGB").quantize(128, dither=Image.Dither.NONE)
        assert picture.width == 1280 and len(picture.getcolors()) > 16  # something is on it
        picture.save(folder / f"playground-{name}.png", optimize=True)


def last_words(session, text, length, dial):
    ask = [{"role": "user", "content": text}]
    return list(session.reply(ask, ask, lambda: {"happy": dial}, max_new_tokens=length))[-1].edited.split("\n")[0][-20:]
