# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels, csrc/cpu/binding.cpp. The module trusts its arguments; `sspo_ext.backends.cpu` checks tensors.

An address is `tensor.data_ptr()`, 0 for None. `sizes` of logits are (B, T, V). Strides are those of the first two
dimensions, in elements; the last dimension is contiguous. dtype codes: 0 float32, 1 bfloat16, 2 float16, 3 float64.
A logit x becomes z = a * x if c == 0, else c * tanh(a * x). Outputs are written in place.
"""

from collections.abc import Sequence

_Sizes = Sequence[int]  # three
_Strides = Sequence[int]  # two

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
    threads: int,
    /,
) -> None: ...
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
    threads: int,
    /,
) -> None: ...
def row_reductions_fwd(
    logits: int,
    dtype: int,
    sizes: _Sizes,
    strides: _Strides,
    ref: int,
    ref_strides: _Strides,
    rows: int,
    labels: int,
    N: int,
    a: float,
    c: float,
    out: Sequence[int],
    threads: int,
    /,
) -> None:
    """`out`: the addresses of logp, lse, entropy, sum_p2, kl and ref_lse."""

def row_reductions_bwd(
    logits: int,
    dtype: int,
    sizes: _Sizes,
    strides: _Strides,
    ref: int,
    ref_strides: _Strides,
    row_of: int,
    labels: int,
    lse: int,
    ref_lse: int,
    coefs: int,
    N: int,
    a: float,
    c: float,
    out: int,
    out_strides: _Strides,
    threads: int,
    /,
) -> None: ...
def step_loss_fwd(
    is_double: bool,
    sizes: _Sizes,
    inputs: Sequence[int],
    formula: int,
    options: Sequence[float],
    label: float,
    out: Sequence[int],
    /,
) -> None:
    """`sizes`: N, S, P. `inputs`: the addresses of logp, weights, step_offsets, ref, pair_index, adj_offsets,
    adj_pairs, pair_weights, pair_margins, pair_labels and scale. `out`: those of loss, sums, pair_loss and coef."""

def add_product(
    total: int, gradient: int, hidden: int, strides: _Sizes, sizes: _Sizes, first: bool, threads: int, /
) -> None:
    """`strides`: of the rows of total, gradient and hidden. `sizes`: n, V, H."""

def product_why_not() -> str:
    """Why add_product cannot run here ('' where it can)."""

def prepare_large_output(data: int, bytes: int, /) -> None:
    """Asks the system for large pages under memory that is about to be written."""

def isa() -> str:
    """The instruction set in use; SSPO_CPU_ISA names another."""

def isas() -> dict[str, str]:
    """Instruction set -> why it cannot run here ('' where it can)."""
