# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels run on the OpenMP threads that torch has started.

Shown to fail before: a team of as many threads as blocks, which ends the others (test_no_thread_ends); a forked child
that waits for its parent's threads (test_a_forked_child_ends).
"""

import subprocess
import sys

import pytest

from sspo_ext.backends import cpu

pytestmark = [
    pytest.mark.skipif(cpu._C is None, reason="sspo_ext._C is not built"),
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]
SETUP = """
import os, torch
torch.set_num_threads(4)
from sspo_ext.backends import cpu
x = torch.randn(1, 300, 5000)
rows, labels = torch.arange(300), torch.zeros(300, dtype=torch.int64)
square = torch.randn(600, 600)
square @ square
cpu.token_logp_fwd(x, rows, labels, 1.0, 0.0)
"""


def run(script):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SETUP + script], capture_output=True, text=True, timeout=60
    )


def test_no_thread_ends():
    """libgomp ends the threads that a smaller team leaves out, and torch's next operation starts them again."""
    done = run(
        "before = set(os.listdir('/proc/self/task'))\n"
        "for _ in range(3):\n"
        "    cpu.token_logp_fwd(x, rows[:100], labels[:100], 1.0, 0.0)\n"  # fewer blocks than threads
        "    square @ square\n"
        "assert before == set(os.listdir('/proc/self/task'))\n"
    )
    assert done.returncode == 0, done.stderr


def test_a_forked_child_ends():
    done = run(
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    cpu.token_logp_fwd(x, rows, labels, 1.0, 0.0)\n"
        "    os._exit(7)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7\n"
    )
    assert done.returncode == 0, done.stderr
