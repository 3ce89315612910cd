# SPDX-License-Identifier: Apache-2.0
"""Private torch.library ops, opaque to torch.compile: the three launches of the logits route.

Launches 1 and 3 also come with further reductions over the vocabulary, launch 2 for policy losses. The ops have no
autograd formula on purpose: gradients live in autograd.Functions, the only callers.
"""

from __future__ import annotations

import torch

from .. import backends
from .addresses import accumulator
from .arguments import PolicyConstantsArguments, PolicyLossArguments, StepLossArguments

_lib = torch.library.Library("sspo", "DEF")


def register(name, schema, fn, fake):
    """Defines sspo::name and returns its overload.

    One implementation serves every device: the argument `backend` says whose kernels run.
    """
    _lib.define(f"{name}{schema}")
    _lib.impl(name, fn, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sspo::{name}", fake, lib=_lib)
    return getattr(torch.ops.sspo, name).default


def _token_logp_fwd(logits, rows, labels, a, c, backend):
    return backends.load(backend).token_logp_fwd(logits, rows, labels, a, c)


def _token_logp_fwd_fake(logits, rows, labels, a, c, backend):
    dtypes = (accumulator(logits.dtype), torch.float64)
    return tuple(logits.new_empty(rows.shape, dtype=dtype) for dtype in dtypes)


def _step_loss_fwd(*args):
    *arguments, backend = args
    return backends.load(backend).step_loss_fwd(StepLossArguments(*arguments))


def _step_loss_fwd_fake(logps, weights, step_offsets, ref, pair_index, *args):
    steps, pairs = step_offsets.shape[0] - 1, pair_index.shape[0]
    return logps.new_empty(()), logps.new_empty(steps), logps.new_empty(pairs), torch.empty_like(logps)


def _token_logp_bwd(logits, row_of, labels, lse, coef, upstream, a, c, backend):
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    backends.load(backend).token_logp_bwd(logits, row_of, labels, lse, coef, upstream, a, c, out)
    return out


def _token_logp_bwd_fake(logits, *args):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _token_logp_bwd_(logits, row_of, labels, lse, coef, upstream, a, c, backend):
    backends.load(backend).token_logp_bwd(logits, row_of, labels, lse, coef, upstream, a, c, logits)
    # autograd cannot see that the kernels write into the memory
    torch.autograd.graph.increment_version(logits)


def _row_reductions_fwd(logits, rows, labels, ref, a, c, entropy, sum_p2, backend):
    return backends.load(backend).row_reductions_fwd(logits, rows, labels, ref, a, c, entropy, sum_p2)


def _row_reductions_fwd_fake(logits, rows, labels, ref, a, c, entropy, sum_p2, backend):
    dtype, N = accumulator(logits.dtype), rows.shape[0]
    E, P, M = N if entropy else 0, N if sum_p2 else 0, 0 if ref is None else N
    return tuple(
        logits.new_empty(n, dtype=d)
        for n, d in ((N, dtype), (N, torch.float64), (E, dtype), (P, dtype), (M, dtype), (M, torch.float64))
    )


def _row_reductions_bwd(logits, row_of, labels, lse, ref, ref_lse, coefs, a, c, backend):
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    backends.load(backend).row_reductions_bwd(logits, row_of, labels, lse, ref, ref_lse, coefs, a, c, out)
    return out


def _row_reductions_bwd_(logits, row_of, labels, lse, ref, ref_lse, coefs, a, c, backend):
    backends.load(backend).row_reductions_bwd(logits, row_of, labels, lse, ref, ref_lse, coefs, a, c, logits)
    torch.autograd.graph.increment_version(logits)


def _policy_constants(*args):
    *arguments, backend = args
    return backends.load(backend).policy_constants(PolicyConstantsArguments(*arguments))


def _policy_constants_fake(advantages, step_of_row, *args):
    N = step_of_row.shape[0]
    sizes = (0 if advantages is None else N, N, ())
    return tuple(step_of_row.new_empty(size, dtype=torch.float32) for size in sizes)


def _policy_loss_fwd(*args):
    *arguments, backend = args
    return backends.load(backend).policy_loss_fwd(PolicyLossArguments(*arguments))


def _policy_loss_fwd_fake(logps, old, ref, entropy, *args):
    return logps.new_empty(()), logps.new_empty(logps.shape if entropy is None else (logps.shape[0], 5))


_BWD = "Tensor row_of, Tensor labels, Tensor lse, Tensor coef, Tensor? upstream, float a, float c, str backend"

token_logp_fwd = register(
    "token_logp_fwd",
    "(Tensor logits, Tensor rows, Tensor labels, float a, float c, str backend) -> (Tensor, Tensor)",
    _token_logp_fwd,
    _token_logp_fwd_fake,
)

step_loss_fwd = register(
    "step_loss_fwd",
    "(Tensor logps, Tensor? weights, Tensor step_offsets, Tensor? ref, Tensor pair_index, Tensor adj_offsets, "
    "Tensor adj_pairs, Tensor? pair_weights, Tensor? pair_margins, Tensor? pair_labels, Tensor scale, str formula, "
    "float[] options, float label, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _step_loss_fwd,
    _step_loss_fwd_fake,
)

token_logp_bwd = register("token_logp_bwd", f"(Tensor logits, {_BWD}) -> Tensor", _token_logp_bwd, _token_logp_bwd_fake)

token_logp_bwd_ = register(
    "token_logp_bwd_", f"(Tensor(a!) logits, {_BWD}) -> ()", _token_logp_bwd_, lambda logits, *args: None
)

_REDUCTIONS_BWD = (
    "Tensor row_of, Tensor labels, Tensor lse, Tensor? ref, Tensor ref_lse, Tensor coefs, float a, float c, str backend"
)

row_reductions_fwd = register(
    "row_reductions_fwd",
    "(Tensor logits, Tensor rows, Tensor labels, Tensor? ref, float a, float c, bool entropy, bool sum_p2, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _row_reductions_fwd,
    _row_reductions_fwd_fake,
)

row_reductions_bwd = register(
    "row_reductions_bwd", f"(Tensor logits, {_REDUCTIONS_BWD}) -> Tensor", _row_reductions_bwd, _token_logp_bwd_fake
)

row_reductions_bwd_ = register(
    "row_reductions_bwd_",
    f"(Tensor(a!) logits, {_REDUCTIONS_BWD}) -> ()",
    _row_reductions_bwd_,
    lambda logits, *args: None,
)

policy_constants = register(
    "policy_constants",
    "(Tensor? advantages, Tensor step_of_row, Tensor? weights, Tensor? old, Tensor? offsets, Tensor? items, "
    "bool counts, float threshold, float norm, str backend) -> (Tensor, Tensor, Tensor)",
    _policy_constants,
    _policy_constants_fake,
)

policy_loss_fwd = register(
    "policy_loss_fwd",
    "(Tensor logps, Tensor? old, Tensor? ref, Tensor? entropy, Tensor advantage, Tensor scale, Tensor norm, "
    "Tensor? offsets, str formula, float[] options, bool length_normalize, str kl_estimator, float kl_coef, "
    "float entropy_coef, str backend) -> (Tensor, Tensor)",
    _policy_loss_fwd,
    _policy_loss_fwd_fake,
)
