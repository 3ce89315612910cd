# SPDX-License-Identifier: Apache-2.0
"""An argument of a wrong kind is named, whatever the kind: a bool for a number, a text, no element, a wrong container.

Red before: of 4347 calls 325 raised from inside (AttributeError, RuntimeError, OverflowError, numpy's UFuncTypeError),
and 126 ran: `ignore_index="x"`, `ignore_index=True` (which left out the label 1), `chunk_bytes=True`, `entropy="no"`.

Mutation, caught by the test named:
  `check_whole("ignore_index", ...)` taken out of StepLayout._build   test_every_argument_is_named[from_step_ids]
"""

import inspect
import warnings

import pytest
import torch

import sspo_ext
from sspo_ext import StepLayout, StepPairs
from sspo_ext.losses.lists import level_pairs

LABELS = torch.tensor([[1, 2, 3, 4], [1, 5, 6, 7]])
STEPS = torch.tensor([[-1, 0, 0, 1], [-1, 0, 1, 1]])
LAYOUT = StepLayout.from_step_ids(LABELS, STEPS)
PAIRS = LAYOUT.pair_by_index()
LOGITS, HIDDEN, HEAD = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in (
    (2, 4, 9), (2, 4, 8), (9, 8)))  # fmt: skip
LOGPS = sspo_ext.step_logps(LOGITS, LAYOUT)
ADVANTAGES = torch.ones(LAYOUT.num_steps)
FREE = {"reference_free": True}

CALLS = {
    "from_step_ids": (StepLayout.from_step_ids, {"labels": LABELS, "step_ids": STEPS}),
    "from_offsets": (
        StepLayout.from_offsets,
        {"labels": LABELS[0], "cu_seqlens": torch.tensor([0, 4]), "step_offsets": torch.tensor([[1, 3]])},
    ),
    "with_row_weights": (LAYOUT.with_row_weights, {"weights": torch.ones(LAYOUT.num_rows)}),
    "from_index": (StepPairs.from_index, {"layout": LAYOUT, "index": torch.tensor([[0, 1]])}),
    "with_values": (PAIRS.with_values, {}),
    "step_logps": (sspo_ext.step_logps, {"logits": LOGITS, "layout": LAYOUT}),
    "linear_step_logps": (sspo_ext.linear_step_logps, {"hidden": HIDDEN, "weight": HEAD, "layout": LAYOUT}),
    "step_pref_loss": (sspo_ext.step_pref_loss, {"logits": LOGITS, "layout": LAYOUT, "pairs": PAIRS, **FREE}),
    "linear_step_pref_loss": (
        sspo_ext.linear_step_pref_loss, {"hidden": HIDDEN, "weight": HEAD, "layout": LAYOUT, "pairs": PAIRS, **FREE},
    ),
    "pref_loss": (sspo_ext.pref_loss, {"logps": LOGPS, "layout": LAYOUT, "pairs": PAIRS, **FREE}),
    "step_policy_loss": (sspo_ext.step_policy_loss, {"logits": LOGITS, "layout": LAYOUT, "advantages": ADVANTAGES}),
    "linear_step_policy_loss": (
        sspo_ext.linear_step_policy_loss,
        {"hidden": HIDDEN, "weight": HEAD, "layout": LAYOUT, "advantages": ADVANTAGES},
    ),
    "StepPrefLoss": (sspo_ext.StepPrefLoss, {}),
    "level_pairs": (level_pairs, {"levels": torch.tensor([1, 2]), "groups": torch.tensor([0, 0])}),
}  # fmt: skip

WRONG = (
    True, False, "x", "", b"x", 1.5, -1, 0, float("nan"), float("inf"), 10**400, [], [1], {}, (1, 2), object(), None,
    torch.tensor(True), torch.zeros(0), torch.zeros(0, 0), torch.zeros(2, 4, 0), torch.ones(3, dtype=torch.int64),
    torch.ones(2, 2, 2, 2), torch.zeros(2, 4, dtype=torch.complex64), LAYOUT, PAIRS, LOGPS,
)  # fmt: skip


def allowed(name: str, value: object, default: object) -> bool:
    """Whether a value is of a kind that the argument has, so that the call may go through."""
    if value is None or isinstance(default, bool) and isinstance(value, bool):
        return True
    if name in ("pairs", "index") and isinstance(value, list):
        return value == []  # no pairs
    if isinstance(value, (torch.Tensor, StepLayout, StepPairs, sspo_ext.StepLogps)):
        return name not in ("ignore_index", "vocab_size", "chunk_bytes", "entropy", "sum_p2", "inplace_backward")
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value and abs(value) < 1e300


@pytest.mark.parametrize("call", CALLS)
def test_every_argument_is_named(call):
    function, given = CALLS[call]
    function(**given)
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        for value in WRONG:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    function(**{**given, parameter.name: value})
            except (TypeError, ValueError) as error:
                names, _, rest = str(error).partition(": ")
                assert rest and all(name.isidentifier() for name in names.replace(".", "_").split(", ")), (
                    parameter,
                    error,
                )
                assert len(str(error)) < 600
            else:
                assert allowed(parameter.name, value, parameter.default), f"{parameter}: {value!r} was taken"


@pytest.mark.parametrize(
    "kind, ways",
    ((StepPairs, "StepPairs.from_index"), (StepLayout, "StepLayout.from_offsets.* or StepLayout.from_tree")),
)
def test_the_calls_that_make_them(kind, ways):
    """StepPairs(index) said that 10 arguments were missing."""
    with pytest.raises(TypeError, match=rf"^{kind.__name__}: expected a call of {ways}\(...\), got torch.int64 tensor"):
        kind(torch.tensor([[0, 1]]))


@pytest.mark.parametrize("function", (sspo_ext.linear_step_pref_loss, sspo_ext.linear_step_logps))
def test_heads_that_do_not_fit(function):
    with pytest.raises(ValueError, match=r"^weight: expected shape \(V, 8\).*; it is transposed, pass weight.t\(\)"):
        function(HIDDEN, HEAD.t(), LAYOUT)
    with pytest.raises(
        ValueError, match=r"^weight: expected shape \(V, 8\), as hidden has, got .*shape \(9, 7\) on cpu$"
    ):
        function(HIDDEN, HEAD[:, :7], LAYOUT)
    with pytest.raises(ValueError, match="^hidden: expected at least one feature in the last dimension, got"):
        function(HIDDEN[..., :0], HEAD[:, :0], LAYOUT)


def test_a_square_head_cannot_be_told():
    square = torch.randn(8, 8)
    assert sspo_ext.linear_step_logps(HIDDEN, square.t(), LAYOUT).sums.isfinite().all()


def test_a_whole_number_may_be_negative():
    labels = torch.where(LABELS == 1, -7, LABELS)
    assert StepLayout.from_step_ids(labels, STEPS, ignore_index=-7).num_rows == LAYOUT.num_rows
