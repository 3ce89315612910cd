# SPDX-License-Identifier: Apache-2.0
"""The schedule is a fact: FLOPs of the matrix products that ran, counted by the profiler, equal the plan's and the
number in design.

Mutations of sspo_ext/{plan,linear,linear_engine}.py, and the test that catches each:
* recompute looks at the last chunk again: test_what_ran_is_what_was_planned
* hidden gradient always made: test_what_ran_is_what_was_planned
* grad mode not looked at: test_evaluation_of_a_trained_model_is_one_gemm
* step_logps makes directions without need: test_step_logps
"""

import pytest
import torch
from helpers.linear import GRADIENTS, gemm_flops, layout_of_lengths, pairs_of, problem

from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses import pref_plan
from sspo_ext.losses.logps import linear_step_logps
from sspo_ext.losses.pref import linear_step_pref_loss

V, H = 53, 17
# lengths, pairs, rows a chunk; the steps of the last one: two small units, a large one, a loose step, an empty one
CASES = {
    "one chunk": ([6, 7], [(0, 1)], 100),
    "units fit": ([3, 2, 3, 4, 2, 2], [(0, 1), (2, 3), (5, 4)], 7),
    "one large unit": ([12, 15], [(0, 1)], 8),
    "one-row chunks": ([3, 4], [(0, 1)], 1),
    "mixed": ([2, 9, 0, 3, 8, 5, 1], [(0, 3), (1, 4), (2, 5), (6, 3)], 7),
    "no pairs": ([4, 5], [], 4),
}


def run(case, needs, *, grad_mode=True):
    lengths, pairs, rows = CASES[case]
    layout = layout_of_lengths(lengths, V)
    pairs = pairs_of(layout, *pairs)
    chunk_bytes = rows * V * 4
    leaves = problem((1, layout.shape[1]), V, H).leaves(needs)

    def step():
        with torch.set_grad_enabled(grad_mode):
            loss = linear_step_pref_loss(*leaves[:2], layout, pairs, bias=leaves[2], chunk_bytes=chunk_bytes).loss
            if loss.requires_grad:
                loss.backward()

    wanted = [bool(n) and grad_mode for n in needs]
    plan = pref_plan(
        layout,
        pairs,
        vocab=V,
        hidden=H,
        chunk_bytes=chunk_bytes,
        hidden_gradient=wanted[0],
        weight_gradient=wanted[1],
        bias_gradient=wanted[2],
    )
    return gemm_flops(step), plan, 2 * layout.num_rows * H * V


def test_the_counter_counts():
    a, b, out = torch.randn(5, 7), torch.randn(7, 3), torch.empty(5, 3)
    assert gemm_flops(lambda: torch.mm(a, b)) == gemm_flops(lambda: torch.mm(a, b, out=out)) == 2 * 5 * 7 * 3
    assert gemm_flops(lambda: torch.addmm(b[0], a, b)) == gemm_flops(lambda: out.addmm_(a, b)) == 2 * 5 * 7 * 3
    assert gemm_flops(lambda: torch.nn.functional.linear(a[None], b.t(), b[0])) == 2 * 5 * 7 * 3
    assert gemm_flops(lambda: a.sum()) == 0


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("gradients", [*GRADIENTS, "none"])
def test_what_ran_is_what_was_planned(case, gradients):
    ran, plan, _ = run(case, GRADIENTS.get(gradients, (0, 0, 0)))
    assert ran == plan.flops, plan


@pytest.mark.parametrize("case", ["one chunk", "units fit", "one large unit"])
@pytest.mark.parametrize(
    "needs, gemms",
    [((0, 0, 0), 1), ((1, 0, 0), 2), ((0, 1, 0), 2), ((1, 1, 0), 3), ((1, 1, 1), 3), ((0, 0, 1), 1), ((1, 0, 1), 2)],
)
def test_gemms_of_the_schedule(case, needs, gemms):
    """1 without gradients, 2 with a frozen head, 3 with a trained one; a second look only at the rows of a unit
    above the budget."""
    ran, _, one = run(case, needs)
    if case == "one large unit" and (needs[1] or needs[2]):
        assert gemms * one < ran < (gemms + 1) * one  # but for the last chunk, which is still there
    else:
        assert ran == gemms * one


@pytest.mark.parametrize("needs", [(1, 1, 1), (1, 0, 0)])
def test_evaluation_of_a_trained_model_is_one_gemm(needs):
    """no_grad, with parameters that want gradients."""
    ran, _, one = run("units fit", needs, grad_mode=False)
    assert ran == one


@pytest.mark.parametrize("needs, gemms", [((0, 0, 0), 1), ((1, 0, 0), 2), ((0, 1, 0), 3), ((1, 1, 1), 4)])
def test_step_logps(needs, gemms):
    """A gradient known only in backward computes a trained head's logits again."""
    layout = layout_of_lengths([6, 7, 3], V)
    leaves = problem((1, layout.shape[1]), V, H).leaves(needs)

    def step():
        sums = linear_step_logps(*leaves[:2], layout, bias=leaves[2], chunk_bytes=5 * V * 4).sums
        if sums.requires_grad:
            sums.sum().backward()

    assert gemm_flops(step) == gemms * 2 * layout.num_rows * H * V


def flops_of_backward(layout, pairs, needs):
    leaves = problem((1, layout.shape[1]), V, H).leaves(needs)
    return gemm_flops(lambda: linear_step_pref_loss(*leaves[:2], layout, pairs, bias=leaves[2]).loss.backward())


def test_unscored_rows_cost_nothing():
    """The same scored tokens behind a prompt ten times as long."""
    for prompt in (1, 130):
        total = prompt + 13
        spans = torch.tensor([[prompt, prompt + 6], [prompt + 6, total]])
        layout = StepLayout.from_offsets(torch.zeros(total, dtype=torch.int64), torch.tensor([0, total]), spans)
        assert flops_of_backward(layout, pairs_of(layout, (0, 1)), (1, 1, 1)) == 3 * 2 * 13 * H * V


def test_a_loose_step_costs_one():
    layout = layout_of_lengths([6, 7, 20], V)
    for needs, gemms in (((1, 0, 0), 2), ((1, 1, 0), 3)):
        assert flops_of_backward(layout, pairs_of(layout, (0, 1)), needs) == 2 * H * V * (gemms * 13 + 20)
