# SPDX-License-Identifier: Apache-2.0
"""CurriculumSampler: easy rows first, shuffled within a stage.

Mutations, each caught by the test named: the order reversed, or rows not shuffled (test_stages); all rows shuffled at
once (test_stages); a new generator in every pass (test_passes_differ); each check taken out (test_refused).
"""

import pytest
from torch.utils.data import DataLoader

from sspo_ext.data.curriculum import CurriculumSampler


def test_stages():
    difficulty = [3.0, 1.0, 2.0] * 20
    order = list(CurriculumSampler(difficulty))
    assert sorted(order) == list(range(60))
    assert [difficulty[i] for i in order] == [1.0] * 20 + [2.0] * 20 + [3.0] * 20
    assert order[:20] != sorted(order[:20])


def test_equal_stages():
    sampler = CurriculumSampler([5, 4, 3, 2, 1, 0, -1], stages=3)
    assert [sorted(rows) for rows in sampler.stage_rows] == [[5, 6], [3, 4], [0, 1, 2]]
    order = list(sampler)
    assert len(sampler) == 7 and [set(order[:2]), set(order[2:4]), set(order[4:])] == [{5, 6}, {3, 4}, {0, 1, 2}]


def test_passes_differ_and_seeds_decide():
    sampler = CurriculumSampler([0.0] * 30)
    first, second = list(sampler), list(sampler)
    assert first != second
    assert list(CurriculumSampler([0.0] * 30)) == first != list(CurriculumSampler([0.0] * 30, seed=1))


def test_data_loader():
    rows = [{"gap": gap} for gap in (1, 3, 2)]
    loader = DataLoader(rows, batch_size=1, sampler=CurriculumSampler([-row["gap"] for row in rows]), collate_fn=list)
    assert [batch[0]["gap"] for batch in loader] == [3, 2, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "difficulty: expected a number for each row, got no rows"),
        (([0.0, float("nan")],), "difficulty: expected finite numbers, got nan in row 1"),
        (([0.0, 1.0], 3), "stages: expected at most 2, the number of rows, got 3"),
        (([0.0, 1.0], 0), "stages: expected a whole number of at least 1, got 0"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CurriculumSampler(*arguments)
