# SPDX-License-Identifier: Apache-2.0
"""Before sspo_ext is imported: without a GPU, Triton kernels are interpreted (Triton asks when kernels are defined)."""

import importlib.util
import os
import sys
from pathlib import Path

CORES = os.cpu_count() or 1
# Before torch is imported, and for the processes that tests start: each worker has its share of the cores.
if (workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))) > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, CORES // workers)))

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.pop("SSPO_BACKEND", None)  # a developer's shell must not choose what the tests test
TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS))  # for helpers/
sys.path.append(str(TESTS.parent))  # for benchmarks/ and tools/; last: the installed package is what is tested

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    from helpers import interpreter

    interpreter.patch()


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Files in parallel by pytest-xdist, where it is installed: one worker a core and 8 at most, if `-n` does not say.

    One file alone runs in this process, and so does what writes docs/parity.json.
    """
    option = config.option
    if getattr(option, "numprocesses", 0) is not None or "PYTEST_XDIST_WORKER" in os.environ:
        return
    one_file = len(config.args) == 1 and not Path(config.args[0]).is_dir()
    if not (one_file or option.usepdb or option.collectonly or os.environ.get("SSPO_WRITE_PARITY")):
        option.numprocesses, option.dist = min(CORES, 8), "loadfile"


def pytest_generate_tests(metafunc):
    """`backend`: every fused backend that can run here. The reference is not among them: it is what they are held to.

    The Triton interpreter is a thousand times slower than a kernel, so on the CPU only tests marked `interpreted` use
    it.
    """
    if "backend" in metafunc.fixturenames:
        from helpers.batch import fused_backends

        names = fused_backends()
        if metafunc.definition.get_closest_marker("interpreted") is None:
            names = [n for n in names if n != "triton"]
        marks = [] if names else [pytest.mark.skip(reason="no fused backend can run here")]
        metafunc.parametrize("backend", [pytest.param(name, marks=marks) for name in names or ["none"]])


def pytest_configure(config):
    config.addinivalue_line("markers", "interpreted: also runs on interpreted Triton kernels")


@pytest.fixture(autouse=True)
def _precision_of_its_own(monkeypatch):
    """By this variable, TrainingArguments(bf16=True) of transformers 4 makes the later trainers of a process bf16."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


@pytest.fixture
def batch():
    from helpers.batch import random_batch

    return random_batch(seed=0)
