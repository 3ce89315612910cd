# SPDX-License-Identifier: Apache-2.0
"""Forced answers, worked out by hand: a model that answers 7 once it has written 7, and 6 before.

Mutations, each caught by the test named: a completion that has ended is asked all the same
(test_a_completion_that_has_ended_counts_by_its_reward); the state at budget 0 is taken for the first cut
(test_by_tokens); the area without its width (test_the_area_and_the_gap).
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from helpers.rl import make_tokenizer

from sspo_ext.signals import BudgetCurve, Probe, StepBatch, budget_curve, efficiency_gaps
from sspo_ext.tracing.budgets import draw_budget_curves

TOKENIZER = make_tokenizer()
PROBE = Probe(":", lead="", separator="")


class Writes(nn.Module):
    """Its answers are counted."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(eos_token_id=1)
        self.asked = []

    def forward(self, input_ids, attention_mask=None):
        six, seven, colon = (TOKENIZER(c)["input_ids"][0] for c in "67:")
        for row in input_ids.tolist():
            if row[-1] == colon:
                self.asked.append(TOKENIZER.decode(row))
        knows = (input_ids == seven).cumsum(1) > 0
        logits = torch.zeros(*input_ids.shape, len(TOKENIZER))
        logits[..., seven], logits[..., six] = torch.where(knows, 9.0, 0.0), torch.where(knows, 0.0, 9.0)
        logits[..., 1] = torch.where((input_ids == colon).cumsum(1) > 0, 5.0, 0.0)
        after = torch.zeros_like(input_ids, dtype=torch.bool)
        after[:, 1:] = input_ids[:, :-1] == colon
        logits[..., 1] = torch.where(after, 99.0, logits[..., 1])
        return SimpleNamespace(logits=logits)


def batch_of(*texts):
    parts = [[TOKENIZER(part)["input_ids"] for part in text.split("|")] for text in texts]
    return StepBatch([p[0] for p in parts], [p[1:] for p in parts])


def curve(batch, model=None, **options):
    options = {"by": "steps", **options}
    same = lambda text, answer: float(text == answer)  # noqa: E731
    return budget_curve(model or Writes(), TOKENIZER, batch, ["7"] * len(batch), PROBE, same, **options)


TEXTS = ("3+4=\n|a\n|=7\n|b\n|#7", "3+4=\n|=6\n|#7")


def test_by_steps():
    found = curve(batch_of(*TEXTS))
    assert (found.budgets, found.accuracy) == ((0, 1, 2, 3, 4), (0.0, 0.0, 1.0, 1.0, 1.0))
    assert found.spent == (0.0, 2.5, 5.0, 6.0, 7.0)  # 2, 5, 7, 9 tokens of the first; 3, 5 of the other


def test_by_tokens():
    model = Writes()
    found = curve(batch_of(*TEXTS), model, by="tokens", budgets=[0, 3, 4, 20])
    assert (found.accuracy, found.spent) == ((0.0, 0.0, 0.5, 1.0), (0.0, 3.0, 4.0, 7.0))
    assert model.asked == [f"3+4=\n{t}:" for t in ("", "a\n=", "a\n=7", "a\n=7\nb\n#7", "", "=6\n", "=6\n#", "=6\n#7")]
    later = curve(batch_of(*TEXTS), model, by="tokens", budgets=[4, 20])
    assert (later.accuracy, later.spent) == (found.accuracy[2:], found.spent[2:])


def test_a_completion_that_has_ended_counts_by_its_reward():
    model = Writes()
    found = curve(batch_of(*TEXTS), model, rewards=[0.25, None])
    assert found.accuracy == (0.0, 0.0, 1.0, 1.0, 0.625)
    assert "3+4=\n=6\n#7:" in model.asked and "3+4=\na\n=7\nb\n#7:" not in model.asked
    nothing = curve(batch_of("3+4=\n|=7"), rewards=[1.0], budgets=[1, 9])
    assert (nothing.accuracy, nothing.area) == ((1.0, 1.0), 1.0)


def test_a_long_completion_is_cut_at_even_places():
    found = curve(batch_of("3+4=\n|" + "a" * 32), by="tokens")
    assert found.budgets == tuple(range(0, 33, 2))
    empty = curve(batch_of("3+4=\n"))
    assert (empty.budgets, empty.accuracy, empty.area) == ((0,), (0.0,), 0.0)


def test_the_area_and_the_gap():
    slow = BudgetCurve("tokens", (0, 10, 40), (0.0, 0.2, 1.0), (0.0, 10.0, 40.0))
    fast = BudgetCurve("tokens", (0, 10, 40), (0.1, 0.8, 0.9), (0.0, 10.0, 12.0))
    assert slow.area == pytest.approx((10 * 0.1 + 30 * 0.6) / 40)
    best = (10 * (0.1 + 0.8) / 2 + 30 * (0.8 + 1.0) / 2) / 40
    gaps = efficiency_gaps({"slow": slow, "fast": fast})
    assert gaps == {"slow": pytest.approx(best - slow.area), "fast": pytest.approx(30 * 0.05 / 40)}
    assert BudgetCurve.from_dict(slow.to_dict()) == slow
    other = BudgetCurve("steps", (0, 10, 40), (0.0, 0.2, 1.0), (0.0, 10.0, 40.0))
    for wrong in ({"one": slow}, {"slow": slow, "other": other}):
        with pytest.raises(ValueError, match="curves: expected at least two with the same budgets"):
            efficiency_gaps(wrong)


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    found = curve(batch_of(*TEXTS))
    draw_budget_curves({"before": found, "after": found}, tmp_path / "budgets.png")
    assert (tmp_path / "budgets.png").stat().st_size > 10_000
    other = BudgetCurve("tokens", (0,), (0.0,), (0.0,))
    for wrong in ({}, {"a": found, "b": other}):
        with pytest.raises(ValueError, match="curves: expected some, all by steps or all by tokens"):
            draw_budget_curves(wrong, tmp_path / "no.png")


def test_mistakes():
    batch = batch_of(*TEXTS)
    for change, message in (
        ({"by": "words"}, "by: expected one of"),
        ({"budgets": [3, 1]}, "budgets: expected whole numbers, ascending"),
        ({"budgets": [-1]}, "budgets: expected a whole number of at least 0"),
        ({"budgets": []}, "budgets: expected whole numbers"),
        ({"rewards": [1.0]}, "rewards: expected one for each of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            curve(batch, **change)
