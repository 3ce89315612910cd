# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter, quicker and nearer to the hardware. Patches of the whole process, for tests/conftest.py."""

import dataclasses

import numpy as np
import torch
import triton.language as tl
from triton.language import semantic
from triton.runtime import interpreter


def patch() -> None:
    _quicken()
    _keep_scalar_masks()
    _round_to_nearest()
    _fuse_multiply_add()
    _check_hints()


def _quicken():
    """Halves its time. It patches triton.language again at every call of a device function, and works out for every
    integer whether it overflows without using the answer."""
    if not hasattr(interpreter, "_patch_lang") or not hasattr(interpreter.interpreter_builder, "options"):
        return  # another version, which is slower only
    patch_lang, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched = set()

    def patch_once(fn):
        languages = frozenset(id(value) for value in fn.__globals__.values() if value in (tl, tl.core))
        if languages not in patched:
            patched.add(languages)
            return patch_lang(fn)

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
    if not hasattr(semantic, "_store_legacy"):
        return  # another version
    store = semantic._store_legacy

    def store_unless_masked(ptr, val, mask, *options):
        if mask is None or mask.handle.data.any():
            return store(ptr, val, mask, *options)

    semantic._store_legacy = store_unless_masked


def _round_to_nearest():
    """The interpreter truncates float32 to bfloat16, where the hardware (cvt.rn) rounds to nearest even."""
    cast_impl = interpreter.InterpreterBuilder.cast_impl

    def cast(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.uint16).numpy()
            return interpreter.TensorHandle(rounded, tl.bfloat16)
        return cast_impl(self, src, dst_type)

    interpreter.InterpreterBuilder.cast_impl = cast


def _fuse_multiply_add():
    """Before Triton had one, its interpreter rounded twice, which kernels that keep what a rounding lost cannot bear.
    The product is exact in float64; that the sum is rounded there before it is float32 hardly ever shows."""

    def fma(self, x, y, z):
        wide = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data
        return interpreter.TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)

    if not hasattr(interpreter._interpreter, "fma_fp32"):
        interpreter.InterpreterBuilder.create_fma = fma


def _check_hints():
    """`tl.multiple_of` is a promise that the interpreter ignores; on a GPU a broken one is a misaligned access."""
    patch_core = interpreter._patch_lang_core

    def multiple_of(value, divisor):
        address = np.asarray(value.handle.data).astype(np.int64)
        assert (address % divisor == 0).all(), f"not a multiple of {divisor}: {address}"
        return value

    def patch_with_hints(lang, *scope):  # Triton 3.2 has no scopes: what it patches stays
        patch_core(lang, *scope)
        if scope:
            scope[0].set_attr(lang, "multiple_of", multiple_of)
        else:
            lang.multiple_of = multiple_of

    interpreter._patch_lang_core = patch_with_hints
