# SPDX-License-Identifier: Apache-2.0
"""Rows cut between two gloo processes: loss and gradients are those of one process, for both routes."""

import json

import pytest
import torch
from helpers.launch import torchrun
from helpers.ranks import cut_rows

from sspo_ext import LayoutPart, StepLayout, gather_logps, step_logps


@pytest.fixture(scope="module")
def found():
    return json.loads(torchrun("helpers.ranks.cut_rows").splitlines()[-1])


def test_cut_rows_have_the_loss_and_the_gradients_of_whole_rows(found):
    losses = len(cut_rows.PREF) + len(cut_rows.POLICY)
    assert len(found["errors"]) == len(cut_rows.CUTS) * losses * 2
    for name, errors in found["errors"].items():
        assert max(errors) < 2e-6, (name, errors)


def test_a_row_on_no_process_or_on_two_is_an_error(found):
    for name, count in {"twice": 2, "nobody": 0}.items():
        position = {"twice": 11, "nobody": 10}[name]
        expected = f"positions: expected every scored position on exactly one process, got position {position} of row 0"
        assert found["problems"][name] == f"{expected} on {count}"


def test_log_probs_of_another_layout_are_refused():
    hidden, weight, layout, _, _ = cut_rows.batch()
    part = LayoutPart.from_positions(layout, range(11))
    logps = step_logps(hidden @ weight.T, layout)
    with pytest.raises(ValueError, match=r"logps\.tokens: expected shape"):
        gather_logps(logps, part)
    with pytest.raises(TypeError, match="part: expected a LayoutPart"):
        gather_logps(logps, layout)
    with pytest.raises(TypeError, match="logps: expected StepLogps"):
        gather_logps(logps.tokens, part)


def test_layouts_of_halves_lose_what_parts_keep():
    labels, step_ids = torch.arange(12).expand(2, -1), torch.zeros(2, 12, dtype=torch.int64)
    layout = StepLayout.from_step_ids(labels, step_ids)
    halves = [StepLayout.from_step_ids(labels[:, h], step_ids[:, h]) for h in (slice(6), slice(6, 12))]
    parts = [LayoutPart.from_positions(layout, range(*edges)) for edges in ((0, 6), (6, 12))]
    assert layout.num_rows == 22 and sum(half.num_rows for half in halves) == 20
    assert sum(part.layout.num_rows for part in parts) == 22
