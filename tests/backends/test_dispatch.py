# SPDX-License-Identifier: Apache-2.0
"""Which backend runs: argument > SSPO_BACKEND > the table; a reason for everything that cannot.

Mutations of sspo_ext/backends/__init__.py, each caught by the test named (on a copy of the package):
  backend ignored                             test_the_call_runs_what_was_selected
  variable beats the argument                 test_the_variable_beats_the_table_and_the_argument_beats_the_variable
  an unusable explicit backend falls through  test_an_explicit_backend_that_cannot_run_raises_with_the_reason
  auto takes the slowest                      test_auto_takes_the_first_usable_of_the_table
  auto interprets Triton                      test_auto_takes_the_first_usable_of_the_table
"""

import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from helpers.batch import fused_backends, random_batch

import sspo_ext
from sspo_ext import backends
from sspo_ext.losses.logps import step_logps
from sspo_ext.losses.pref import step_pref_loss

F32 = torch.float32


@pytest.fixture
def fakes(monkeypatch):
    """Stand-ins for the three backends, with the reasons a test asks for; records which one a call would load."""
    reasons = {"cpu": None, "triton": "no GPU", "cuda": "no GPU", "reference": None}

    def load(name):
        return types.SimpleNamespace(why_not=lambda device, dtype: reasons[name])

    monkeypatch.setattr(backends, "load", load)
    monkeypatch.delenv("SSPO_BACKEND", raising=False)
    return reasons


def test_auto_takes_the_first_usable_of_the_table(fakes):
    assert backends.select("auto", "cpu", F32) == "cpu"
    fakes["cpu"] = "not built"
    assert backends.select("auto", "cpu", F32) == "reference"
    assert backends.select("auto", "cuda", F32) == "reference"
    fakes["cuda"] = None
    assert backends.select("auto", "cuda", F32) == "cuda"
    fakes["triton"] = None
    assert backends.select("auto", "cuda", F32) == "triton"
    assert backends.select("auto", "cpu", F32) == "reference", "never interpreted Triton by accident"
    assert backends.select("auto", "mps", F32) == "reference", "a device that nobody has heard of"


def test_the_variable_beats_the_table_and_the_argument_beats_the_variable(fakes, monkeypatch):
    monkeypatch.setenv("SSPO_BACKEND", "reference")
    assert backends.select("auto", "cpu", F32) == "reference"
    assert backends.select("cpu", "cpu", F32) == "cpu"
    monkeypatch.setenv("SSPO_BACKEND", "auto")
    assert backends.select("auto", "cpu", F32) == "cpu"
    monkeypatch.setenv("SSPO_BACKEND", "")
    assert backends.select("auto", "cpu", F32) == "cpu"


def test_an_explicit_backend_that_cannot_run_raises_with_the_reason(fakes, monkeypatch):
    with pytest.raises(ValueError, match="backend: 'triton' cannot run on cpu float32: no GPU"):
        backends.select("triton", "cpu", F32)
    monkeypatch.setenv("SSPO_BACKEND", "triton")
    with pytest.raises(ValueError, match="SSPO_BACKEND: 'triton' cannot run on cpu float32: no GPU"):
        backends.select("auto", "cpu", F32)


def test_unknown_names(fakes, monkeypatch):
    for bad in ("gpu", "CPU", None, 3):
        with pytest.raises(
            ValueError, match="backend: expected 'auto' or one of 'cpu', 'triton', 'cuda', 'reference', got"
        ):
            backends.select(bad, "cpu", F32)
    monkeypatch.setenv("SSPO_BACKEND", "fast")
    with pytest.raises(ValueError, match="SSPO_BACKEND: expected 'auto' or one of .*got 'fast'"):
        backends.select("auto", "cpu", F32)


def test_reference_takes_everything():
    for device in ("cpu", "cuda", "mps", "meta"):
        for dtype in (torch.float64, F32, torch.bfloat16, torch.float16):
            assert backends.why_not("reference", device, dtype) is None


def test_reasons_of_the_real_ones():
    assert "cuda" in backends.why_not("cpu", "cuda", F32)
    assert backends.why_not("cpu", "cpu", torch.int64) is not None
    assert "float64" in backends.why_not("triton", "cuda", torch.float64)
    for name in fused_backends():
        assert backends.why_not(name, "cpu", F32) is None


def test_a_broken_module_keeps_its_message_and_auto_runs_without_it():
    """An install without a compiler, or with a broken library: `auto` works, an explicit request says why it cannot."""
    code = """
import sys
sys.modules["sspo_ext._C"] = None  # import raises ImportError
import torch
import sspo_ext
from sspo_ext import backends, step_logps, StepLayout
assert backends.select("auto", "cpu", torch.float32) == "reference"
ids = torch.tensor([[-1, 0, 0]])
layout = StepLayout.from_step_ids(ids.clamp(min=0), ids)
step_logps(torch.zeros(1, 3, 4), layout)
for call in (lambda: backends.select("cpu", "cpu", torch.float32),
             lambda: step_logps(torch.zeros(1, 3, 4), layout, inplace_backward=True)):
    try:
        call()
    except ValueError as error:
        print(error)
"""
    root = Path(sspo_ext.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    explicit, inplace = done.stdout.strip().splitlines()
    assert (
        "sspo_ext._C" in explicit
        and "SSPO_BUILD_CPP" in explicit
        and explicit.startswith("backend: 'cpu' cannot run on cpu float32")
    )
    assert inplace.startswith("inplace_backward") and "sspo_ext._C" in inplace, "it says why the others could not"


def test_the_call_runs_what_was_selected(monkeypatch):
    """Through the public functions: the ops are handed the selected name."""
    batch = random_batch(0)
    loaded = []
    real = backends.load
    monkeypatch.setattr(backends, "load", lambda name: loaded.append(name) or real(name))
    for name in fused_backends():
        loaded.clear()
        step_pref_loss(batch.logits, batch.layout, backend=name)
        assert set(loaded) == {name}
        loaded.clear()
        monkeypatch.setenv("SSPO_BACKEND", name)
        step_logps(batch.logits, batch.layout)
        assert set(loaded) == {name}
        monkeypatch.delenv("SSPO_BACKEND")
