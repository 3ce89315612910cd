# SPDX-License-Identifier: Apache-2.0
"""The kernels of csrc/cuda on torch tensors: the three launches of the logits route, without a compiler at run time.

This file can be imported without a GPU and without the compiled module; `why_not` says what is missing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formulas.registry import formula_id
from .addresses import address, in_private_pool, stale_module
from .arguments import StepLossArguments

try:
    import sspo_ext._C_cuda as _C_cuda  # pyright: ignore[reportMissingModuleSource]  # built on request

    _import_error = stale_module(_C_cuda)
    if _import_error is not None:
        _C_cuda = None
except ImportError as error:  # kept: `sspo-ext info` and an explicit request show it
    _C_cuda = None
    _import_error = str(error)

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_DEVICE_TYPE = "cuda"  # "cpu" in tests, which replace the module by an emulation


def _kernels():
    """The compiled module, which `why_not` has found."""
    assert _C_cuda is not None
    return _C_cuda


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why these kernels cannot run, or None."""
    if device.type != _DEVICE_TYPE:
        return f"it runs on NVIDIA GPUs only, not on {device.type}"
    if dtype not in _DTYPE_CODES:
        return f"it takes {', '.join(str(d).removeprefix('torch.') for d in _DTYPE_CODES)}"
    if torch.version.hip:
        return "its kernels are CUDA C++, and this torch is built for ROCm"
    if _C_cuda is None:
        return (
            f"the module sspo_ext._C_cuda could not be imported ({_import_error}); it is built where it is "
            "asked for and nvcc is found: install again with SSPO_BUILD_CUDA=1"
        )
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device)
        if not _runs_on(*capability):
            return (
                f"sspo_ext._C_cuda is built for {_C_cuda.architectures}, and this GPU is "
                f"sm_{capability[0]}{capability[1]}; install again with TORCH_CUDA_ARCH_LIST naming it"
            )
    return None


def _runs_on(major: int, minor: int) -> bool:
    """Machine code runs on later minor versions of its own major version, PTX on everything later."""
    for name in _kernels().architectures.split(";"):
        kind, number = name.split("_")
        has_major, has_minor = divmod(int(number), 10)
        if (has_major, has_minor) <= (major, minor) and (kind == "compute" or has_major == major):
            return True
    return False


def info() -> dict[str, str]:
    """What the module was built for; empty without the module."""
    return {} if _C_cuda is None else {"architectures": _C_cuda.architectures}


def _logits_view(logits: Tensor) -> tuple[int, int, tuple[int, int, int], tuple[int, int]]:
    """Address, dtype code, sizes and the first two strides."""
    if logits.device.type != _DEVICE_TYPE or logits.ndim != 3 or (logits.shape[-1] > 1 and logits.stride(-1) != 1):
        raise TypeError(f"expected (B, T, V) GPU logits with a contiguous last dimension, got {tuple(logits.shape)}")
    B, T, V = logits.shape
    return logits.data_ptr(), _DTYPE_CODES[logits.dtype], (B, T, V), (logits.stride(0), logits.stride(1))


def _stream(device: torch.device) -> tuple[int, int]:
    """Index of the device, and torch's current stream on it."""
    return device.index, torch.cuda.current_stream(device).cuda_stream


_counters: dict[tuple[int, int], Tensor] = {}


def _arrival_counters(device: torch.device) -> Tensor:
    """Zeros in which the kernels count blocks; a kernel leaves them zero.

    One set a stream is enough, because launches on one stream do not overlap.
    """
    number = _kernels().max_split_rows
    if _DEVICE_TYPE == "cuda" and torch.cuda.is_current_stream_capturing():
        # this memory belongs to the graph, which zeroes it in each replay; eager calls must not keep it
        return torch.zeros(number, dtype=torch.int32, device=device)
    key = _stream(device)
    counters = _counters.get(key)
    if counters is None:
        counters = torch.zeros(number, dtype=torch.int32, device=device)
        if _DEVICE_TYPE == "cpu" or not in_private_pool(counters):
            _counters[key] = counters
    return counters


def token_logp_fwd(
    logits: Tensor,  # (B, T, V) float32, bfloat16 or float16; last dimension contiguous, any strides before it
    rows: Tensor,  # (N,) int64: position b * T + t of row n
    labels: Tensor,  # (N,) int64
    a: float,
    c: float,
) -> tuple[Tensor, Tensor]:  # logp (N,) float32, lse (N,) float64
    """log_softmax(z)[row, label] and logsumexp(z)[row], z = a * x or c * tanh(a * x). Each logit is read once.

    For label -1, one of another vocabulary shard, logp is -lse. A row or any other label out of range gives NaN.
    """
    N, device, V = rows.numel(), logits.device, logits.shape[-1]
    logp = torch.empty(N, dtype=torch.float32, device=device)
    lse = torch.empty(N, dtype=torch.float64, device=device)
    view = _logits_view(logits)
    splits = _kernels().row_splits(N, V, view[1])
    partials = torch.empty(N * splits * 2, dtype=torch.float32, device=device) if splits > 1 else None
    arrived = _arrival_counters(device) if splits > 1 else None
    _kernels().token_logp_fwd(
        *view, address(rows, torch.int64, N, device), address(labels, torch.int64, N, device), N, a, c,
        logp.data_ptr(), lse.data_ptr(), splits, 0 if partials is None else partials.data_ptr(),
        0 if arrived is None else arrived.data_ptr(), *_stream(device),
    )  # fmt: skip
    return logp, lse


def token_logp_bwd(
    logits: Tensor,  # (B, T, V) as above
    row_of: Tensor,  # (B * T,) int32: row of a position, -1 where nothing is scored
    labels: Tensor,  # (N,) int64
    lse: Tensor,  # (N,) float64
    coef: Tensor,  # (N,) float32: dL/dlogp
    upstream: Tensor | None,  # () multiplies coef, read on the device
    a: float,
    c: float,
    out: Tensor,  # (B, T, V) of logits' dtype: a new buffer, or the logits themselves
) -> None:
    """out[i, v] = upstream * coef * (onehot - softmax(z))[v] * dz/dx.

    Rows without a gradient are written as zeros and not read.
    """
    N, device = labels.numel(), logits.device
    if upstream is not None:
        upstream = upstream.to(torch.float32)
    data, code, sizes, strides = _logits_view(logits)
    out_data, out_code, out_sizes, out_strides = _logits_view(out)
    if (out_code, out_sizes, out.device) != (code, sizes, device):
        raise TypeError(
            f"out: expected {sizes} {logits.dtype} on {device}, got {out_sizes} {out.dtype} on {out.device}"
        )
    if out_data == data and out_strides != strides and out.numel():
        raise ValueError("out: overlaps logits with other strides")
    _kernels().token_logp_bwd(
        data, code, sizes, strides, address(row_of, torch.int32, sizes[0] * sizes[1], device),
        address(labels, torch.int64, N, device), address(lse, torch.float64, N, device),
        address(coef, torch.float32, N, device), address(upstream, torch.float32, 1, device), N, a, c,
        out_data, out_strides, *_stream(device),
    )  # fmt: skip


def step_loss_fwd(given: StepLossArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """S_k = sum of w * logp over step k, f_p = formula(S - ref of the pair's steps), loss = scale * sum_p weight_p f_p.

    Returns loss (), sums (S,), pair losses (P,) and coef (N,) = d loss/d logp, all float32. Sums run in a fixed order,
    in double. A pair with an empty step gives 0 and no gradient.
    """
    logps, weights, step_offsets, ref, pair_index, adj_offsets, adj_pairs, *per_pair = given[:10]
    N, S, P, device = logps.numel(), step_offsets.numel() - 1, pair_index.shape[0], logps.device
    loss, sums, pair_losses, coef = out = tuple(
        torch.empty(shape, dtype=torch.float32, device=device) for shape in ((), (S,), (P,), (N,))
    )
    if S == 0:  # no block would write the loss
        return loss.zero_(), sums, pair_losses, coef

    def floats(tensor: Tensor | None, numel: int) -> int:
        return address(tensor, torch.float32, numel, device)

    def ints(tensor: Tensor, numel: int) -> int:
        return address(tensor, torch.int32, numel, device)

    addresses = [
        floats(logps, N), floats(weights, N), ints(step_offsets, S + 1), floats(ref, S), ints(pair_index, 2 * P),
        ints(adj_offsets, S + 1), ints(adj_pairs, 2 * P), *(floats(values, P) for values in per_pair),
        floats(given.scale, 1),
    ]  # fmt: skip
    _kernels().step_loss_fwd(
        (N, S, P), addresses, formula_id(given.formula), list(given.options), given.label,
        [t.data_ptr() for t in out], _arrival_counters(device).data_ptr(), *_stream(device),
    )  # fmt: skip
    return loss, sums, pair_losses, coef
