"""The HTTP server that `fastedit serve` starts: processes of its own, the OpenAI API's `vllm_xargs`."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("vllm", reason="needs vllm: `make serving-test` sets it up")

import serving_support as support

pytestmark = pytest.mark.timeout(1800)  # four processes start, on a busy machine one after the other
PROMPTS = support.prompts(2)
FUZZED = 100
ARGUMENTS = ["--dtype", "float32", "--max-model-len", "128", "--enforce-eager", "--max-num-seqs", "16", "--block-size", "32"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(url, model, folder of edits)"""
    base = tmp_path_factory.mktemp("server")
    model = support.save_model("llama", base / "model")
    support.save_edits(model, base / "edits")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from fastedit.cli import app; app()", "serve", str(base / "model")]
    command += ["--edits", str(base / "edits"), "--rank", "4", "--max-change", "1e300"]
    command += ["--port", str(port), "--host", "127.0.0.1", *ARGUMENTS]
    command += ["--served-model-name", "tiny"]
    env = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with open(base / "log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
    try:
        _wait(server, f"http://127.0.0.1:{port}/health", base / "log")
        yield f"http://127.0.0.1:{port}/v1/completions", model, base / "edits"
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def _wait(server, url, log):
    until = time.monotonic() + 1500
    while server.poll() is None and time.monotonic() < until:
        try:
            urllib.request.urlopen(url, timeout=20)
            return
        except OSError:
            time.sleep(0.5)
    pytest.fail("the server did not start:\n" + log.read_text()[-4000:])


def post(url, prompt, xargs=None, **further):
    """(status, the answer)"""
    asked = {"model": "tiny", "prompt": prompt, "max_tokens": support.TOKENS, "temperature": 0, "ignore_eos": True}
    asked |= {"return_token_ids": True} | ({} if xargs is None else {"vllm_xargs": xargs})
    asked |= further
    text = json.dumps(asked, default=repr)  # what JSON has no word for, as text; NaN as Python writes it
    request = urllib.request.Request(url, text.encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def token_ids(answer):
    assert answer[0] == 200, answer
    return answer[1]["choices"][0]["token_ids"]


def test_mixed_requests(world):
    url, model, _ = world
    edits = support.edits()
    cases = [(None, None), *((name, strength) for name in edits for strength in (1.0, 0.5))]
    jobs = [(p, name, strength) for name, strength in cases for p in range(2)]
    with ThreadPoolExecutor(16) as pool:
        xargs = [None if name is None else {"fastedit": name, "fastedit_strength": s} for _, name, s in jobs]
        found = list(pool.map(lambda job, x: post(url, PROMPTS[job[0]], x), jobs, xargs))
    answers = {case: support.answers(model, edits.get(case[0]), PROMPTS, case[1] or 1.0) for case in cases}
    assert [token_ids(f) for f in found] == [answers[name, strength][p] for p, name, strength in jobs]


def test_a_list_in_xargs_is_a_stack(world):
    url, model, _ = world
    edits = support.edits()
    expected = support.answers(model, edits["red"] + edits["steer"], PROMPTS)
    found = [token_ids(post(url, p, {"fastedit": ["red", "steer"], "fastedit_strength": [1.0, 1.0]})) for p in PROMPTS]
    assert found == expected


def test_unknown_is_a_bad_request(world):
    url, model, _ = world
    status, answer = post(url, PROMPTS[0], {"fastedit": "nobody"})
    assert status == 400 and "there is no edit 'nobody'" in json.dumps(answer)
    assert "red" not in json.dumps(answer), "other tenants' names are not said"
    status, answer = post(url, PROMPTS[0], {"fastedit": "red", "fastedit_strength": "much"})
    assert status == 400 and "finite number" in json.dumps(answer)
    assert token_ids(post(url, PROMPTS[0])) == support.answers(model, None, PROMPTS)[0]


def test_added_and_removed_while_serving(world):
    url, model, folder = world
    stack = support.edits(seed=70)["red"]
    assert post(url, PROMPTS[0], {"fastedit": "new"})[0] == 400
    support.save_edit(model, folder / "new", stack)
    assert token_ids(post(url, PROMPTS[0], {"fastedit": "new"})) == support.answers(model, stack, PROMPTS)[0]
    shutil.rmtree(folder / "new")
    assert post(url, PROMPTS[0], {"fastedit": "new"})[0] == 400


@pytest.mark.parametrize(
    ("further", "said"),
    [
        ({"vllm_xargs": {"fastedi": "red"}}, "unknown argument 'fastedi'"), ({"fastedit": "red"}, "put it into vllm_xargs"),
        ({"vllm_xargs": {"fastedit": "red"}, "use_beam_search": True, "n": 2}, "no edit is served with it"),
        ({"vllm_xargs": {"fastedit": ["red"] * 4000}}, "a list of 4000, expected at most 16"),
        ({"vllm_xargs": {"fastedit": "red", "fastedit_plan": "x"}}, "unknown argument 'fastedit_plan'"),
    ],
)  # fmt: skip
def test_what_would_be_answered_unedited_is_a_bad_request(world, further, said):
    status, answer = post(world[0], PROMPTS[0], **further)
    assert status == 400 and said in json.dumps(answer)


@pytest.mark.parametrize("strength", [3e38, 1e39, [1.0, 1e39], [1e39, 1e39]])
def test_a_strength_that_overflows_ends_its_request_by_name(world, strength):
    url, model, _ = world
    name = ["red", "steer"] if isinstance(strength, list) else "steer"
    status, answer = post(url, PROMPTS[0], {"fastedit": name, "fastedit_strength": strength})
    said = ("edit 'steer'", "NaN or infinite") if strength == 3e38 else ("fastedit_strength is 1e+39", "which float32 holds")
    assert status == 400 and all(part in json.dumps(answer) for part in said), answer
    assert token_ids(post(url, PROMPTS[0])) == support.answers(model, None, PROMPTS)[0]


def test_refusals_do_not_say_where_things_lie(world):
    url, _, folder = world
    (folder / "broken").mkdir()
    (folder / "broken" / "edit.json").write_text("{")
    status, answer = post(url, PROMPTS[0], {"fastedit": "broken"})
    assert status == 400 and "edit 'broken' cannot be served: edit.json is not valid JSON" in json.dumps(answer)
    assert str(folder) not in json.dumps(answer)


def test_requests_of_any_content_are_answered_or_bad_requests(world):
    """As tests/serving/test_soak.py has them, in JSON; the neighbours' answers are right, and the server stays."""
    url, model, _ = world
    draw, edits, jobs = random.Random(0), support.edits(), []
    for number in range(FUZZED):
        plain = number % 4 == 0
        given = draw.choice((None, {"fastedit": "red"})) if plain else support.any_content(draw, "red", "steer")
        jobs.append((plain, draw.randrange(2), given))
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda job: post(url, PROMPTS[job[1]], job[2]), jobs))
    sound = {name: support.answers(model, edits.get(name), PROMPTS) for name in (None, "red")}
    for (plain, prompt, given), answer in zip(jobs, answers, strict=True):
        if plain:
            assert token_ids(answer) == sound[None if given is None else "red"][prompt], given
        else:
            assert answer[0] in (200, 400), (given, answer)
    refused = [answer for answer in answers if answer[0] == 400]
    assert len(refused) > FUZZED / 3 and token_ids(post(url, PROMPTS[0])) == sound[None][0]
