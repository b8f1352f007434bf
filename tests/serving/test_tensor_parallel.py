"""Two workers in processes of their own, each with half of the heads: both edit the whole rows, and say the same."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("vllm", reason="needs vllm: `make serving-test` sets it up")

import serving_support as support

SCRIPT = """
import json, sys
import serving_support as support

if __name__ == "__main__":
    asked, settings = [tuple(one) for one in json.loads(sys.argv[2])], json.loads(sys.argv[3])
    llm = support.start(sys.argv[1] + "/model", sys.argv[1] + "/edits", tensor_parallel_size=2, **settings)
    print("ANSWERS" + json.dumps(support.tokens(llm, asked)))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("family", "settings"), [("llama", {"max_num_batched_tokens": 24}), ("gemma3", {})])
def test_two_workers(tmp_path, family, settings):
    model, edits, prompts = support.save_model(family, tmp_path / "model"), support.edits(), support.prompts(2)
    support.save_edits(model, tmp_path / "edits")
    expected = [answer for name in (None, *edits) for answer in support.answers(model, edits.get(name), prompts)]
    (tmp_path / "two.py").write_text(SCRIPT)
    asked = [(prompt, name, None) for name in (None, *edits) for prompt in prompts]
    tests = os.path.dirname(support.__file__)
    env = os.environ | {"PYTHONPATH": tests, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "two.py"), str(tmp_path), json.dumps(asked), json.dumps(settings)]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    found = [line for line in ran.stdout.splitlines() if line.startswith("ANSWERS")]
    assert found, ran.stderr[-3000:]
    assert json.loads(found[0].removeprefix("ANSWERS")) == expected
    assert len(set(map(tuple, expected))) > len(edits), "the edits change nothing: nothing was tested"
