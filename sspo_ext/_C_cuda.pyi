# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels, csrc/cuda/binding.cpp. The module trusts its arguments; `sspo_ext.backends.cuda` checks tensors.

An address is `tensor.data_ptr()`, 0 for None. `sizes` of logits are (B, T, V). Strides are those of the first two
dimensions, in elements; the last dimension is contiguous. dtype codes: 0 float32, 1 bfloat16, 2 float16. A logit x
becomes z = a * x if c == 0, else c * tanh(a * x). Outputs are written in place, on the CUDA stream with this handle.
"""

from collections.abc import Sequence

_Sizes = Sequence[int]  # three
_Strides = Sequence[int]  # two

max_split_rows: int
"""From this many rows on, no row is split between blocks."""
architectures: str
"""What the module was built for, "sm_80;sm_90;compute_90" for example."""

formulas: str  # the hash of the formulas that the module was built from

def token_logp_fwd(
    logits: int,
    dtype: int,
    sizes: _Sizes,
    strides: _Strides,
    rows: int,
    labels: int,
    N: int,
    a: float,
    c: float,
    logp: int,
    lse: int,
    splits: int,
    partials: int,
    arrived: int,
    device: int,
    stream: int,
    /,
) -> None:
    """`partials`: (N, splits, 2) float32 scratch memory. `arrived`: N zeros, which are zero again afterwards. Both are
    not read with one split."""

def token_logp_bwd(
    logits: int,
    dtype: int,
    sizes: _Sizes,
    strides: _Strides,
    row_of: int,
    labels: int,
    lse: int,
    coef: int,
    upstream: int,
    N: int,
    a: float,
    c: float,
    out: int,
    out_strides: _Strides,
    device: int,
    stream: int,
    /,
) -> None: ...
def step_loss_fwd(
    sizes: _Sizes,
    inputs: Sequence[int],
    formula: int,
    options: Sequence[float],
    label: float,
    out: Sequence[int],
    arrived: int,
    device: int,
    stream: int,
    /,
) -> None:
    """`sizes`: N, S, P. `inputs`: the addresses of logp, weights, step_offsets, ref, pair_index, adj_offsets,
    adj_pairs, pair_weights, pair_margins, pair_labels and scale. `out`: those of loss, sums, pair_loss and coef.
    `arrived`: one zero, which is zero again afterwards."""

def row_splits(rows: int, V: int, dtype: int, /) -> int:
    """How many blocks share a row."""
