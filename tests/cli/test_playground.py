"""The playground without a page: replies side by side, dials, colors, directions, export; and its page in a browser."""

import shutil
import threading

import pytest
import tiny_models
import torch
from test_cli import invoke  # noqa: F401
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import fastedit as fe
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


@pytest.mark.slow
def test_the_page_in_a_browser(session):
    pytest.importorskip("gradio", reason="needs Gradio: pip install gradio")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    if binary is None:
        pytest.skip("needs Chromium (Debian: apt install chromium)")
    from fastedit.playground import page as pages

    served = pages.serve(session, "tiny", port=7999, block=False)
    try:
        with playwright.sync_playwright() as driver:
            quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
                     "--disable-sync", "--no-first-run", "--disable-quic"]  # fmt: skip
            browser = driver.chromium.launch(executable_path=binary, args=quiet)
            visit(browser, served.local_url, session)
            browser.close()
    finally:
        served.close()


def visit(browser, url, session):
    hosts = set()
    tabs = [browser.new_page() for _ in range(2)]
    for tab in tabs:
        tab.on("request", lambda request: hosts.add(request.url.split("/")[2]))
        tab.goto(url)
        tab.wait_for_selector("#message textarea", timeout=60_000)
    first, second = tabs
    first.fill("#positive textarea", "\n".join(POSITIVE))
    first.fill("#negative textarea", "\n".join(NEGATIVE))
    first.fill("#name input, #name textarea", "happy")
    first.click("#make")
    first.wait_for_selector("#dial-happy", timeout=60_000)
    assert list(session.edits) == ["happy"]
    dial = first.locator("#dial-happy input[type=number]")
    dial.fill("3")
    dial.press("Enter")
    said = {}
    for tab in tabs:
        tab.locator("#length input[type=number]").fill("8")
        tab.locator("#length input[type=number]").press("Enter")
        tab.fill("#message textarea", ASK[0]["content"])
        tab.click("#send")
    for name, tab in (("dialed", first), ("untouched", second)):
        tab.wait_for_function("document.querySelector('#edited').innerText.length > 40", timeout=60_000)
        tab.wait_for_timeout(1500)
        said[name] = (tab.inner_text("#plain"), tab.inner_text("#edited"))
    expected = last(session, lambda: {"happy": 3.0})
    assert expected.plain != expected.edited
    assert expected.plain in said["dialed"][0] and expected.edited in said["dialed"][1]
    assert expected.plain in said["untouched"][1]
    first.get_by_role("tab", name="Color tokens").click()
    first.fill("#colored-text textarea", "the girl was happy")
    first.click("#color")
    first.wait_for_selector("#colored .token", timeout=30_000)
    first.get_by_role("tab", name="Export").click()
    first.click("#export")
    first.wait_for_function("document.querySelector('#files').innerText.includes('happy.gguf')", timeout=30_000)
    assert {host.split(":")[0] for host in hosts} <= {"127.0.0.1", "localhost"}, hosts
