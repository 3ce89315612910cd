# SPDX-License-Identifier: Apache-2.0
"""Private torch.library ops of the linear route. Each plans on the host from CPU tensors, then runs the chunked engine.

`needs` says which gradients to accumulate: hidden, weight, bias. What was not asked for comes back empty. GEMMs run in
`dtype`; the weight's gradient accumulates over chunks in `accum_dtype` and is cast once, to `grad_dtype`. All ranks cut
the same chunks because `vocab_rows` is the size of the largest vocabulary shard.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ...backends.addresses import accumulator
from ...backends.ops import register
from ...objective.pair import unpack_terms
from ..tree_rows import gradient_places
from . import engine
from .budget import budget_of
from .cache import cached_plan
from .gradients import Gradients, start_gradients
from .head import Head
from .plan import LinearPlan, Products, make_plan
from .shards import VocabShard


@dataclass(frozen=True, eq=False)
class HeadCall:
    """The first arguments of every op of the route, in the order of SCHEMA: scored rows, LM head, and its settings."""

    hidden: Tensor  # (N0, H)
    weight: Tensor  # (V, H), or this rank's rows of it
    bias: Tensor | None  # (V,)
    rows: Tensor  # (U,) int64: positions; below, N is U
    labels: Tensor  # (U,) int64
    extra: Tensor | None  # (E,) int64: rows whose position has an earlier row; hidden gradients are (N0 + E, H) then
    kept_ids: Tensor | None  # (M,) int64: the kept tokens of rows that have not kept all
    kept_row: Tensor | None  # (M,) int64: the row of each
    host_kept_counts: Tensor | None  # (U,) int64: how many each row has
    host_step_offsets: Tensor  # (S + 1,) int64
    needs: list[bool]
    a: float
    c: float
    dtype: torch.dtype
    accum_dtype: torch.dtype
    grad_dtype: torch.dtype
    chunk_bytes: int  # 0: the device's default
    batch_invariant: bool
    tp_group: str  # "": the whole vocabulary is here
    vocab_start: int
    vocab_rows: int
    vocab_size: int
    backend: str

    @property
    def acc_dtype(self) -> torch.dtype:
        """The dtype of log-probs and losses."""
        return accumulator(self.dtype)

    @property
    def hidden_gradient_dtype(self) -> torch.dtype:
        """The GEMMs' dtype with a frozen head, since backward still scales the rows; else that of the hidden states."""
        return self.dtype if is_frozen(self.needs) else self.hidden.dtype

    def head(self) -> Head:
        """The LM head in the GEMMs' dtype; a weight of another dtype is copied, once a call."""
        shard = None
        if self.tp_group:
            shard = VocabShard(self.tp_group, self.vocab_start, self.weight.shape[0], self.vocab_size)
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return Head(self.weight.to(self.dtype), bias, self.a, self.c, self.backend, shard, self.batch_invariant)

    def products(self, buffers: int = 1) -> Products:
        """The call's GEMMs, in chunks for which this many logits buffers fit in the budget."""
        vocab, size = self.weight.shape
        # one chunk saves the sum, unless the sum is what is delivered
        columns = size if self.needs[1] and self.accum_dtype != self.dtype == self.grad_dtype else 0
        budget = budget_of(
            self.vocab_rows * buffers, self.dtype, self.chunk_bytes or None, self.weight.device,
            accumulator_columns=columns, sharded=bool(self.tp_group), batch_invariant=self.batch_invariant,
        )  # fmt: skip
        return Products(*budget, vocab, size, self.dtype, *self.needs)

    def gathered(self, plan: LinearPlan, token_weights: Tensor | None = None) -> engine.Rows:
        """The scored rows in the plan's order."""
        places = gradient_places(self.rows, self.extra, self.hidden.shape[0])
        return engine.Rows(self.hidden, self.rows, self.labels, places, token_weights, plan, self.dtype, self.kept)

    @property
    def kept(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Ids, rows and counts of the kept tokens."""
        if self.kept_ids is None:
            return None
        assert self.kept_row is not None and self.host_kept_counts is not None
        return self.kept_ids, self.kept_row, self.host_kept_counts

    @property
    def hidden_shape(self) -> tuple[int, int]:
        """Of the gradients of the hidden states."""
        return (self.hidden.shape[0] + (0 if self.extra is None else self.extra.shape[0]), self.hidden.shape[1])

    def results(self, head: Head, gradients: Gradients) -> tuple[Tensor, Tensor, Tensor]:
        """(N0, H), (V, H), (V,), each empty when not asked for."""
        d_weight = head.weight.new_empty(0, dtype=self.grad_dtype)
        if gradients.weight is not None:
            d_weight = gradients.weight.in_dtype(self.grad_dtype)
        return (
            head.weight.new_empty(0) if gradients.hidden is None else gradients.hidden,
            d_weight,
            head.weight.new_empty(0, dtype=head.acc_dtype) if gradients.bias is None else gradients.bias,
        )

    def fake_results(self, hidden_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The shapes and dtypes of `results`."""
        hidden, weight, needs = self.hidden, self.weight, self.needs
        kept = self.hidden_gradient_dtype if hidden_dtype is None else hidden_dtype
        return (
            hidden.new_empty(self.hidden_shape, dtype=kept) if needs[0] else weight.new_empty(0, dtype=self.dtype),
            weight.new_empty(weight.shape if needs[1] else 0, dtype=self.grad_dtype),
            weight.new_empty(weight.shape[:1] if needs[2] else 0, dtype=self.acc_dtype),
        )


SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor rows, Tensor labels, Tensor? extra, Tensor? kept_ids, "
    "Tensor? kept_row, Tensor? host_kept_counts, Tensor host_step_offsets, bool[] needs, "
    "float a, float c, ScalarType dtype, ScalarType accum_dtype, ScalarType grad_dtype, int chunk_bytes, "
    "bool batch_invariant, str tp_group, int vocab_start, int vocab_rows, int vocab_size, str backend"
)
_LEADING = len(fields(HeadCall))


def register_head_op(name: str, more: str, returns: str, fn: Callable, fake: Callable):
    """Registers an op whose arguments are a HeadCall's fields, then those of the schema `more`.

    `fn` and `fake` get the fields as one HeadCall.
    """

    def split(function: Callable) -> Callable:
        return lambda *args: function(HeadCall(*args[:_LEADING]), *args[_LEADING:])

    schema = f"({SCHEMA}{', ' if more else ''}{more}) -> {returns}"
    return register(name, schema, split(fn), split(fake))


@dataclass
class Work:
    """What an op works with: the head, the plan, the rows in the plan's order, and the gradients."""

    head: Head
    plan: LinearPlan
    rows: engine.Rows
    gradients: Gradients


def set_up(
    call: HeadCall, token_weights: Tensor | None = None, pair_index: Tensor | None = None, buffers: int = 0,
    host_row: Tensor | None = None,
) -> Work:  # fmt: skip
    """Head, plan, rows and gradients of a call.

    `buffers`: with entropy, sum_p2 or kl, how many logits buffers share the budget; 0 without them.
    """
    head, products = call.head(), call.products(max(buffers, 1))

    def make() -> LinearPlan:
        index = None if pair_index is None else pair_index.numpy()
        row = None if host_row is None else host_row.numpy()
        return make_plan(call.host_step_offsets.numpy(), index, products, reductions=buffers > 0, host_row=row)

    plan = cached_plan(make, call.host_step_offsets, pair_index, buffers > 0, *vars(products).values())
    gradients = start_gradients(head, plan, call.hidden_shape, call.hidden_gradient_dtype, call.accum_dtype)
    return Work(head, plan, call.gathered(plan, token_weights), gradients)


def is_frozen(needs: list[bool]) -> bool:
    """Whether only the hidden states need a gradient."""
    return needs[0] and not needs[1] and not needs[2]


def _linear_pref_fwd(
    call: HeadCall, token_weights, ref, host_pair_index, pair_weights, pair_margins, pair_labels, token_pair_weights,
    scale, host_row, formulas, term_numbers, term_flags,
):  # fmt: skip
    shared = host_row is not None
    work = set_up(call, None if shared else token_weights, host_pair_index, host_row=host_row)
    weights = token_weights if shared else work.rows.weights
    problem = engine.PairProblem(
        weights, ref, pair_weights, pair_margins, pair_labels, token_pair_weights, scale,
        unpack_terms(formulas, term_numbers, term_flags), call.backend,
    )  # fmt: skip
    row = host_row.numpy() if shared else None
    problem.prepare(work.plan, call.host_step_offsets.numpy(), host_pair_index.numpy(), row, call.labels.device)
    results = engine.run_pref(work.head, work.rows, work.plan, problem, work.gradients)
    return *results, *call.results(work.head, work.gradients)


def _linear_pref_fwd_fake(call: HeadCall, token_weights, ref, host_pair_index, *more):
    num_terms = len(more[-1])
    steps, pairs, rows = call.host_step_offsets.shape[0] - 1, host_pair_index.shape[0], call.rows.shape[0]
    sizes = ((), steps, (num_terms, pairs), rows)
    results = (call.weight.new_empty(size, dtype=call.acc_dtype) for size in sizes)
    return *results, *call.fake_results()


def _linear_logps_fwd(call: HeadCall):
    work = set_up(call)
    tokens, lse = engine.run_logps(work.head, work.rows, work.plan, work.gradients)
    return tokens, lse, call.results(work.head, work.gradients)[0]


def _linear_logps_fwd_fake(call: HeadCall):
    tokens = call.weight.new_empty(call.rows.shape, dtype=call.acc_dtype)
    return tokens, torch.empty_like(tokens, dtype=torch.float64), call.fake_results()[0]


def _linear_logps_bwd(call: HeadCall, lse, coef):
    work = set_up(call)
    engine.run_backward(work.head, work.rows, work.plan, lse, coef, work.gradients)
    return call.results(work.head, work.gradients)


linear_pref_fwd = register_head_op(
    "linear_pref_fwd",
    "Tensor? token_weights, Tensor? ref, Tensor host_pair_index, Tensor? pair_weights, Tensor? pair_margins, "
    "Tensor? pair_labels, Tensor? token_pair_weights, Tensor scale, Tensor? host_row, str formulas, "
    "float[] term_numbers, int[] term_flags",
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear_pref_fwd,
    _linear_pref_fwd_fake,
)

linear_logps_fwd = register_head_op(
    "linear_logps_fwd", "", "(Tensor, Tensor, Tensor)", _linear_logps_fwd, _linear_logps_fwd_fake
)

linear_logps_bwd = register_head_op(
    "linear_logps_bwd",
    "Tensor lse, Tensor coef",
    "(Tensor, Tensor, Tensor)",
    _linear_logps_bwd,
    lambda call, lse, coef: call.fake_results(),
)
