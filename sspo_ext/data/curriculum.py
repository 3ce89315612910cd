# SPDX-License-Identifier: Apache-2.0
"""The order of rows from easy to hard."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

from .._checks import check_count


class CurriculumSampler(Sampler[int]):
    """Row numbers from easy to hard, in stages, each of them shuffled.

    It is a `sampler` for a DataLoader. Trainer has no such argument: give it the rows in this order and
    `train_sampling_strategy="sequential"`. Where a stage ends, Curry-DPO (arXiv 2403.07230) takes the model as the next
    reference: `stage_rows` has the rows of each.

    Args:
        difficulty: One finite number for each row; the smallest is the easiest. A column of the rows, or for pairs the
            gap of their scores with a minus sign.
        stages: The number of stages, as equal in size as can be. None: one for each number that occurs.
        seed: Decides the order within stages. Each pass has another one.

    Raises:
        ValueError: There are no rows, a difficulty is not finite, or there are more stages than rows.

    Examples:
        >>> from sspo_ext.data.curriculum import CurriculumSampler
        >>> rows = [{"gap": 1.0}, {"gap": 3.0}, {"gap": 2.0}]
        >>> list(CurriculumSampler([-row["gap"] for row in rows]))
        [1, 2, 0]
    """

    def __init__(self, difficulty: Sequence[float], stages: int | None = None, seed: int = 0):
        difficulty = [float(value) for value in difficulty]
        if not difficulty:
            raise ValueError("difficulty: expected a number for each row, got no rows")
        for row, value in enumerate(difficulty):
            if not math.isfinite(value):
                raise ValueError(f"difficulty: expected finite numbers, got {value} in row {row}")
        order = sorted(range(len(difficulty)), key=difficulty.__getitem__)
        if stages is None:
            values = sorted(set(difficulty))
            self.stage_rows = [[row for row in order if difficulty[row] == value] for value in values]
        else:
            check_count("stages", stages)
            if stages > len(order):
                raise ValueError(f"stages: expected at most {len(order)}, the number of rows, got {stages}")
            edges = [len(order) * k // stages for k in range(stages + 1)]
            self.stage_rows = [order[a:b] for a, b in zip(edges, edges[1:], strict=False)]
        self._rng = random.Random(seed)

    def __len__(self) -> int:
        return sum(map(len, self.stage_rows))

    def __iter__(self) -> Iterator[int]:
        for rows in self.stage_rows:
            yield from self._rng.sample(rows, len(rows))
