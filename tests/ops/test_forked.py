"""A process that forks after native threads were started: its children answer, on one thread, and it is said once."""

import subprocess
import sys

SCRIPT = """
import logging, multiprocessing, sys
import torch
import fastedit
from fastedit import ops

logging.basicConfig(stream=sys.stderr)
torch.set_num_threads(4)
hidden, scale = torch.randn(4096, 256), torch.randn(256)

def work(number):
    return ops.edit(hidden, scale=scale), torch.get_num_threads()

expected = work(0)[0]
for _ in range(2):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for found, threads in pool.map_async(work, range(4)).get(60):
            assert torch.equal(found, expected) and threads == 1, threads
assert torch.get_num_threads() == 4
"""


def test_a_pool_after_a_native_call_answers():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("its children run on one thread each") == 1
