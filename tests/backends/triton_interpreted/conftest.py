"""Runs only under TRITON_INTERPRET=1, in the process that tests/backends/test_triton_kernels.py starts."""

import os

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

assert os.environ.get("TRITON_INTERPRET") == "1", "run tests/backends/test_triton_kernels.py"


def _cast_rounding_to_nearest(cast_impl):
    """The interpreter truncates float32 to bfloat16, where the hardware (cvt.rn) rounds to nearest even."""

    def cast(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.uint16).numpy()
            return interpreter.TensorHandle(rounded, tl.bfloat16)
        return cast_impl(self, src, dst_type)

    return cast


interpreter.InterpreterBuilder.cast_impl = _cast_rounding_to_nearest(interpreter.InterpreterBuilder.cast_impl)


def _fma(self, x, y, z):
    """Before Triton had one, its interpreter rounded twice, which kernels that keep what a rounding lost cannot bear.
    The product is exact in float64; that the sum is rounded there before it is float32 hardly ever shows."""
    wide = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data
    return interpreter.TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)


if not hasattr(interpreter._interpreter, "fma_fp32"):
    interpreter.InterpreterBuilder.create_fma = _fma


def _checking_hints():
    """`tl.multiple_of` is a promise that the interpreter ignores; on a GPU a broken one is a misaligned access."""
    patch_core = interpreter._patch_lang_core

    def multiple_of(value, divisor):
        address = np.asarray(value.handle.data).astype(np.int64)
        assert (address % divisor == 0).all(), f"not a multiple of {divisor}: {address}"
        return value

    def patch(lang, *scope):  # Triton 3.2 has no scopes: what it patches stays
        patch_core(lang, *scope)
        if scope:
            scope[0].set_attr(lang, "multiple_of", multiple_of)
        else:
            lang.multiple_of = multiple_of

    interpreter._patch_lang_core = patch


_checking_hints()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
