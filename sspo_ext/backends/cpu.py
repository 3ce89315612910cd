# SPDX-License-Identifier: Apache-2.0
"""The kernels of csrc/cpu on torch tensors: plain tensors in and out, no autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formulas.registry import formula_id
from .addresses import accumulator, address, stale_module
from .arguments import StepLossArguments

try:
    import sspo_ext._C as _C

    _import_error = stale_module(_C)
    if _import_error is not None:
        _C = None
except ImportError as error:  # kept: `sspo-ext info` and an explicit request show it
    _C = None
    _import_error = str(error)


def _kernels():
    """The compiled module, which `why_not` has found."""
    assert _C is not None
    return _C


_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why these kernels cannot run, or None."""
    if device.type != "cpu":
        return f"it runs on the CPU only, not on {device.type}"
    if dtype not in _DTYPE_CODES:
        return f"it takes {', '.join(str(d).removeprefix('torch.') for d in _DTYPE_CODES)}"
    if _C is None:
        return f"sspo_ext._C could not be imported ({_import_error}); install again without SSPO_BUILD_CPP=0"
    return None


def info() -> dict[str, str]:
    """Instruction set -> "in use", "available" or why it cannot run here."""
    if _C is None:
        return {}
    return {name: reason or ("in use" if name == _C.isa() else "available") for name, reason in _C.isas().items()}


def _logits_view(logits: Tensor) -> tuple[int, int, tuple[int, int, int], tuple[int, int]]:
    """Address, dtype code, sizes and the first two strides."""
    if logits.device.type != "cpu" or logits.ndim != 3 or (logits.shape[-1] > 1 and logits.stride(-1) != 1):
        raise TypeError(f"expected (B, T, V) CPU logits with a contiguous last dimension, got {tuple(logits.shape)}")
    B, T, V = logits.shape
    return logits.data_ptr(), _DTYPE_CODES[logits.dtype], (B, T, V), (logits.stride(0), logits.stride(1))


def _out_view(out: Tensor, logits: Tensor) -> tuple[int, tuple[int, int]]:
    """Address and strides of a buffer for the gradient of the logits: a new one, or the logits themselves."""
    data, code, sizes, strides = _logits_view(logits)
    out_data, out_code, out_sizes, out_strides = _logits_view(out)
    if (out_code, out_sizes) != (code, sizes):
        raise TypeError(f"out: expected {sizes} {logits.dtype}, got {out_sizes} {out.dtype}")
    if out_data == data and out_strides != strides and out.numel():
        raise ValueError("out: overlaps logits with other strides")
    return out_data, out_strides


def token_logp_fwd(
    logits: Tensor,  # (B, T, V) float, last dimension contiguous
    rows: Tensor,  # (N,) int64: position b * T + t of row n
    labels: Tensor,  # (N,) int64; -1: the label is in another shard of the vocabulary
    a: float,
    c: float,
) -> tuple[Tensor, Tensor]:  # logp (N,) float32 (float64 for float64 logits), lse (N,) float64
    """log_softmax(z)[row, label] and logsumexp(z)[row], z = a * x or c * tanh(a * x). Each logit is read once.

    For label -1 logp is -lse. A row or any other label out of range gives NaN.
    """
    N = rows.numel()
    logp = torch.empty(N, dtype=accumulator(logits.dtype), device="cpu")
    lse = torch.empty(N, dtype=torch.float64, device="cpu")
    _kernels().token_logp_fwd(
        *_logits_view(logits), address(rows, torch.int64, N), address(labels, torch.int64, N), N, a, c,
        logp.data_ptr(), lse.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return logp, lse


def token_logp_bwd(
    logits: Tensor,  # (B, T, V) float, last dimension contiguous
    row_of: Tensor,  # (B * T,) int32: row of a position, -1 where nothing is scored
    labels: Tensor,  # (N,) int64; -1: no one-hot term
    lse: Tensor,  # (N,) float64
    coef: Tensor,  # (N,) dL/dlogp, float32 (float64 for float64 logits)
    upstream: Tensor | None,  # () multiplies coef
    a: float,
    c: float,
    out: Tensor,  # (B, T, V) of logits' dtype: a new buffer, or the logits themselves
) -> None:
    """out[i, v] = upstream * coef * (onehot - softmax(z))[v] * dz/dx.

    Rows without a gradient are written as zeros and not read. A row with a coef or lse that is not finite is NaN.
    """
    N, dtype = labels.numel(), accumulator(logits.dtype)
    if upstream is not None:
        upstream = upstream.to(dtype)
    _kernels().token_logp_bwd(
        *_logits_view(logits), address(row_of, torch.int32, logits.shape[0] * logits.shape[1]),
        address(labels, torch.int64, N), address(lse, torch.float64, N), address(coef, dtype, N),
        address(upstream, dtype, 1), N, a, c, *_out_view(out, logits), torch.get_num_threads(),
    )  # fmt: skip


def _reference_view(logits: Tensor, ref: Tensor | None) -> tuple[int, tuple[int, int]]:
    """Address and strides of the reference's logits; zeros without one."""
    if ref is None:
        return 0, (0, 0)
    data, code, sizes, strides = _logits_view(ref)
    if (code, sizes) != (_DTYPE_CODES[logits.dtype], tuple(logits.shape)):
        raise TypeError(f"ref: expected {tuple(logits.shape)} {logits.dtype}, got {sizes} {ref.dtype}")
    return data, strides


def row_reductions_fwd(
    logits: Tensor,  # (B, T, V) float, last dimension contiguous
    rows: Tensor,  # (N,) int64
    labels: Tensor,  # (N,) int64
    ref: Tensor | None,  # the reference's logits: dtype and shape of the logits, mapped as they are, any strides
    a: float,
    c: float,
    wants_entropy: bool = True,
    wants_sum_p2: bool = True,
) -> tuple[Tensor, ...]:
    """logp, lse, entropy, sum of p^2, KL(ref || p) and the reference's lse. Each logit is read once.

    (N,) each; logp and lse as of `token_logp_fwd`, the last float64 too. What is not asked for is empty, and so are the
    last two without a reference.
    """
    N, dtype, M = rows.numel(), accumulator(logits.dtype), 0 if ref is None else rows.numel()
    sizes = (N, N * wants_entropy, N * wants_sum_p2, M)
    logp, entropy, sum_p2, kl = (torch.empty(n, dtype=dtype, device="cpu") for n in sizes)
    lse, ref_lse = (torch.empty(n, dtype=torch.float64, device="cpu") for n in (N, M))
    out = (logp, lse, entropy, sum_p2, kl, ref_lse)
    _kernels().row_reductions_fwd(
        *_logits_view(logits), *_reference_view(logits, ref), address(rows, torch.int64, N),
        address(labels, torch.int64, N), N, a, c, [t.data_ptr() for t in out], torch.get_num_threads(),
    )  # fmt: skip
    return out


def row_reductions_bwd(
    logits: Tensor,  # (B, T, V) float, last dimension contiguous
    row_of: Tensor,  # (B * T,) int32
    labels: Tensor,  # (N,) int64
    lse: Tensor,  # (N,) float64
    ref: Tensor | None,
    ref_lse: Tensor,  # (N,) float64; not read without a reference
    coefs: Tensor,  # (N, 5) of logp's dtype: g, constant, log_p, square, kappa
    a: float,
    c: float,
    out: Tensor,  # (B, T, V) of logits' dtype: a new buffer, or the logits themselves
) -> None:
    """out[i, v] = (g (onehot - p)[v] + p[v] (constant + log_p log p[v] + square p[v]) - kappa q[v]) * dz/dx.

    p and q are the softmax of logits and reference. Rows without a gradient are written as zeros and not read. A row
    with a coefficient or lse that is not finite is NaN.
    """
    N = labels.numel()
    _kernels().row_reductions_bwd(
        *_logits_view(logits), *_reference_view(logits, ref),
        address(row_of, torch.int32, logits.shape[0] * logits.shape[1]), address(labels, torch.int64, N),
        address(lse, torch.float64, N), 0 if ref is None else address(ref_lse, torch.float64, N),
        address(coefs, accumulator(logits.dtype), 5 * N), N, a, c, *_out_view(out, logits), torch.get_num_threads(),
    )  # fmt: skip


def step_loss_fwd(given: StepLossArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """S_k = sum of w * logp over step k, f_p = formula(S - ref of the pair's steps), loss = scale * sum_p weight_p f_p.

    Returns loss (), sums (S,), pair losses (P,) and coef (N,) = d loss/d logp, float32 or float64 as the log-probs are.
    Sums run in row and pair order, in double. A pair with an empty step gives 0 and no gradient.
    """
    logps, weights, step_offsets, ref, pair_index, adj_offsets, adj_pairs, *per_pair = given[:10]
    N, S, P, dtype = logps.numel(), step_offsets.numel() - 1, pair_index.shape[0], logps.dtype
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"logps: expected torch.float32 or torch.float64, got {dtype}")
    loss, sums, pair_losses, coef = (torch.empty(shape, dtype=dtype, device="cpu") for shape in ((), S, P, N))
    addresses = [
        address(logps, dtype, N), address(weights, dtype, N), address(step_offsets, torch.int32, S + 1),
        address(ref, dtype, S), address(pair_index, torch.int32, 2 * P), address(adj_offsets, torch.int32, S + 1),
        address(adj_pairs, torch.int32, 2 * P), *(address(values, dtype, P) for values in per_pair),
        address(given.scale, dtype, 1),
    ]  # fmt: skip
    _kernels().step_loss_fwd(
        dtype == torch.float64, (N, S, P), addresses, formula_id(given.formula), list(given.options), given.label,
        [t.data_ptr() for t in (loss, sums, pair_losses, coef)],
    )  # fmt: skip
    return loss, sums, pair_losses, coef


def product_why_not() -> str | None:
    """The reason why `add_product` cannot run here, or None."""
    return (_C.product_why_not() or None) if _C is not None else "sspo_ext._C could not be imported"


def add_product(
    total: Tensor,  # (V, H) float32; written where `first`
    gradient: Tensor,  # (n, V) bfloat16
    hidden: Tensor,  # (n, H) bfloat16
    first: bool,
) -> None:
    """Total += gradient^T @ hidden in float32, by the CPU's bfloat16 instructions. Rows are contiguous, strides any.

    Each element is summed over n in one order: the same bits at any number of threads.
    """
    n, V, H = *gradient.shape, hidden.shape[1]
    for name, t, shape, dtype in (
        ("total", total, (V, H), torch.float32),
        ("gradient", gradient, (n, V), torch.bfloat16),
        ("hidden", hidden, (n, H), torch.bfloat16),
    ):
        if t.shape != shape or t.dtype != dtype or not t.is_cpu or (t.shape[1] > 1 and t.stride(1) != 1):
            raise TypeError(f"{name}: expected {shape} {dtype} with contiguous rows on the CPU, got {tuple(t.shape)} "
                            f"{t.dtype} on {t.device}")  # fmt: skip
    _kernels().add_product(
        total.data_ptr(), gradient.data_ptr(), hidden.data_ptr(),
        (total.stride(0), gradient.stride(0), hidden.stride(0)), (n, V, H), first, torch.get_num_threads(),
    )  # fmt: skip


_LARGE_BYTES = 32 << 20


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """torch.empty; a large tensor gets large pages where the system has them, because each fresh page costs a fault."""
    out = torch.empty(shape, dtype=dtype, device="cpu")
    if out.numel() * out.itemsize >= _LARGE_BYTES:
        _kernels().prepare_large_output(out.data_ptr(), out.numel() * out.itemsize)
    return out
