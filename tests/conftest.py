"""Before sspo_ext is imported: without a GPU, Triton kernels are interpreted (Triton asks when kernels are defined)."""

import dataclasses
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.pop("SSPO_BACKEND", None)  # a developer's shell must not choose what the tests test
TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS))  # for helpers/
sys.path.append(str(TESTS.parent))  # for benchmarks/ and tools/; last: the installed package is what is tested


def _quicken_triton_interpreter():
    """Half of its time: it patches triton.language again at every call of a device function, and works out for every
    integer whether it overflows without a look at the answer."""
    import triton.language as tl
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_patch_lang") or not hasattr(interpreter.interpreter_builder, "options"):
        return  # another version, which is slower only
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched = set()

    def patch_once(fn):
        languages = frozenset(id(value) for value in fn.__globals__.values() if value in (tl, tl.core))
        if languages not in patched:
            patched.add(languages)
            return patch(fn)

    def launch_kernel(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_kernel
    builder = interpreter.interpreter_builder
    if hasattr(builder.options, "sanitize_overflow"):
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)


def _keep_scalar_masks():
    """Triton 3.2 asks `not mask` before a store, and its interpreter answers with the one value of a scalar mask: a
    store that is masked out would be made without the mask."""
    from triton.language import semantic

    if not hasattr(semantic, "_store_legacy"):
        return  # another version
    store = semantic._store_legacy

    def store_unless_masked(ptr, val, mask, *options):
        if mask is None or mask.handle.data.any():
            return store(ptr, val, mask, *options)

    semantic._store_legacy = store_unless_masked


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    _quicken_triton_interpreter()
    _keep_scalar_masks()


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
