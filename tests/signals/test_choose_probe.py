# SPDX-License-Identifier: Apache-2.0
"""Probes compared: by hand on a model whose answers have known probabilities, and on the package's start model.

Mutations, each caught by the test named: V_K counts among the values that are asked for
(test_what_shows_after_the_last_step_alone); `after` leaves it out (test_a_question_that_holds_the_answer); AUC from the
first value (test_right_is_told_from_wrong_before_the_last_step); right completions whose question holds the answer are
measured (test_a_question_that_holds_the_answer); the answer is looked for as a part of a word (test_holds); a
completion that was cut off is graded (test_on_its_own_completions).
"""

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from helpers.rl import make_tokenizer

from sspo_ext.demo.arms import load_start
from sspo_ext.demo.tasks import Task
from sspo_ext.signals import PROBES, Probe, StepBatch, choose_probe, compare_probes, named_probes, probe_step_values
from sspo_ext.signals.probing.compare import auc, holds

TOKENIZER = make_tokenizer()


class Knower(nn.Module):
    """After ":" it answers 7 with probability .1, and with .8 once it has written 7; after "+" with .0004 and .8; after
    "#" with .0004 always."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(eos_token_id=1)

    def forward(self, input_ids, attention_mask=None):
        ids = {c: TOKENIZER(c)["input_ids"][0] for c in "7:#+"}
        p = torch.full((*input_ids.shape, len(TOKENIZER)), 0.0)
        seven = torch.where((input_ids == ids["7"]).cumsum(1) > 0, 0.8, 0.1)
        unknown = (input_ids == ids["+"]) & (seven < 0.5)
        seven = torch.where((input_ids == ids["#"]) | unknown, 0.0004, seven)
        p += (1 - seven[..., None]) / (p.shape[-1] - 1)
        p[..., ids["7"]] = seven
        return SimpleNamespace(logits=p.log())


def batch_of(*texts):
    """Of "prompt|step|step" each."""
    parts = [[TOKENIZER(part)["input_ids"] for part in text.split("|")] for text in texts]
    return StepBatch([p[0] for p in parts], [p[1:] for p in parts])


PAIR = {"colon": Probe(":", lead="", separator=""), "hash": Probe("#", lead="", separator="")}


def test_by_hand():
    batch = batch_of("3+4=\n|a\n|=7\n|#7", "3+4=\n|a\n|7", "3+4=\n|b\n|=6\n|#6", "3+4=\n|7\n|c\n|#8")
    found = compare_probes(Knower(), TOKENIZER, batch, ["7", 7, ["7"], "7"], [1.0, 1.0, 0.0, 0.5], PAIR)
    assert (found.completions, found.right, found.reached, found.best) == (4, 2, 2, "colon")
    colon, other = found.trials
    assert (colon.before, colon.after) == pytest.approx((0.1, 0.8))
    # before the last step: .8 and .1 where it is right, .1 and .8 where it is wrong
    assert colon.auc == 0.5 and other.auc == 0.5
    assert (colon.near_zero, other.near_zero) == (0.0, 1.0)
    assert other.rise == pytest.approx(0, abs=1e-6) and other.before == pytest.approx(0.0004)
    assert re.match(
        r"Take 'colon': .* rises from 0\.100 to 0\.800 .* \(in 2 right .* the best score of 2", found.reason
    )


def test_right_is_told_from_wrong_before_the_last_step():
    batch = batch_of("3+4=\n|=7\n|#7", "3+4=\n|=6\n|#6")
    found = compare_probes(Knower(), TOKENIZER, batch, ["7", "7"], [1.0, 0.0], PAIR)
    assert found.trials[0].auc == 1.0
    rows = found.table().splitlines()
    assert (
        "| colon | : | 0.100 | 0.800 | 1.00 | 0% | 0.700 |" in rows
        and "| hash | # | 0.000 | 0.000 | 0.50 | 100% | 0.000 |" in rows
    )
    assert rows[-1] == found.reason and "AUC 1.00" in found.reason


def test_one_reading_gives_what_single_probes_give():
    batch = batch_of("3+4=\n|a\n|=7\n|#7", "3+4=\n|7")
    for probe in PAIR.values():
        values = probe_step_values(Knower(), batch, probe, ["7", "7"], tokenizer=TOKENIZER).to_lists()
        single = compare_probes(Knower(), TOKENIZER, batch, ["7", "7"], [1.0, 1.0], {"one": probe}, batch_size=1)
        expected = [*values[0][:2], values[1][0]], [*values[0][2:], *values[1][1:]]
        assert (single.trials[0].before, single.trials[0].after) == tuple(
            pytest.approx(sum(some) / len(some)) for some in expected
        )


def test_a_question_that_holds_the_answer():
    batch = batch_of("7+0=\n|=7\n|#7", "1+6=\n|=7")
    found = compare_probes(Knower(), TOKENIZER, batch, ["7", "7"], [1.0, 1.0], PAIR)
    assert (found.right, found.reached) == (2, 1)
    assert (found.trials[0].before, found.trials[0].after) == pytest.approx((0.1, 0.8))
    only = compare_probes(Knower(), TOKENIZER, batch_of("7+0=\n|=7"), ["7"], [1.0], PAIR)
    assert only.best is None and "every question holds its answer" in only.reason


def test_what_shows_after_the_last_step_alone():
    """In training the value there is not asked for, so it counts in `after` and not among those near zero."""
    plus = {"plus": Probe("+", lead="", separator="")}
    found = compare_probes(Knower(), TOKENIZER, batch_of("3:4\n|a\n|=7"), ["7"], [1.0], plus)
    assert found.trials[0].near_zero == 1 and found.trials[0].rise == pytest.approx(0.7996)
    assert found.best is None and "or all are near zero" in found.reason


def test_none_is_taken_for_a_reason():
    wrong = compare_probes(Knower(), TOKENIZER, batch_of("3+4=\n|=6"), ["7"], [0.0], PAIR)
    assert wrong.best is None and "none of 1 completions is right" in wrong.reason
    assert math.isnan(wrong.trials[0].before) and wrong.to_dict()["trials"][0]["before"] is None
    flat = compare_probes(Knower(), TOKENIZER, batch_of("3+4=\n|=7"), ["7"], [1.0], {"hash": PAIR["hash"]})
    assert flat.best is None and "reduce='logprob'" in flat.reason
    json.dumps(flat.to_dict(), allow_nan=False)


def test_holds():
    for text, answer, found in (
        ("it is 18.", "18", True), ("118", "18", False), ("18.5", "18", False), ("1,118", "18", False),
        ("答案是18元", "18", True), ("so b", "b", True), ("bob", "b", False), ("x=-3", "-3", True), ("a+b", "+", True),
        ("18, then", "18", True), ("三加四等于七", "七", True),
    ):  # fmt: skip
        assert holds(text, answer) == found, (text, answer)


def test_auc():
    assert auc([1, 2], [0, 1]) == pytest.approx(0.875) and math.isnan(auc([], [1]))


def test_names():
    probes = named_probes(["So:", "de", Probe("So:")])
    assert list(probes) == [*PROBES, "So:"] and probes["de"] is PROBES["de"]
    assert list(named_probes({"mine": "So:"}, builtin=False)) == ["mine"]
    for given, message in (
        ([" "], "probes: expected texts that are not blank"),
        (["jp"], "probe: expected a language"),
        ([Probe("So:"), Probe("So:", separator="")], "probes: expected different names, got 'So:'"),
        ({"en": "So:"}, "probes: expected different names, got 'en'"),
    ):
        with pytest.raises(ValueError, match=message):
            named_probes(given)
    with pytest.raises(ValueError, match="probes: expected at least one"):
        named_probes(builtin=False)
    with pytest.raises(TypeError, match="probes: expected a list"):
        named_probes("So:")


@pytest.fixture(scope="module")
def start():
    return load_start()


def test_on_its_own_completions(start):
    """The start model was made to answer after "####", and to repeat its last sum after "so far", which rises more."""
    model, tokenizer = start
    problems = Task("sums").problems(6, 3, held_out=True)
    told, graded = [], []

    def right(text, answer):
        graded.append(text)
        return float(text.rpartition("####")[2].strip() == answer)

    def choose(**options):
        return choose_probe(
            model, tokenizer, [p.prompt for p in problems], [p.answer for p in problems], ["so far"],
            num_generations=3, max_completion_length=48, grader=right, **options,
        )  # fmt: skip

    found = choose(seed=1, progress=lambda *at: told.append(at))
    assert found.completions == 18 and 3 <= found.right < 18 and len(graded) < 18  # some are cut off
    assert found.best == "symbol" and found.trials[0].score > 0.3 > found.trials[1].score
    assert {t.name: t for t in found.trials}["so far"].rise > found.trials[0].rise
    assert found.trials[0].auc > 0.9 and {t.name for t in found.trials} == {*PROBES, "so far"}
    assert told == sorted(told) and told[-1] == (12, 12)
    assert choose(seed=1).to_dict() == found.to_dict() != choose(seed=2).to_dict()


def test_mistakes_are_told_before_anything_runs():
    class Never(nn.Module):
        def forward(self, *args, **kwargs):
            raise AssertionError("it ran")

    given = {"prompts": ["1+1=\n"], "answers": ["2"]}
    for change, message in (
        ({"prompts": []}, "prompts: expected at least one"),
        ({"answers": []}, "got 1 prompts and 0 answers"),
        ({"answers": [" "]}, "answers: expected a text that is not blank"),
        ({"prompts": [[]]}, "prompts: expected texts or token ids"),
        ({"probes": ["jp"]}, "probe: expected a language"),
        ({"num_generations": 0}, "num_generations: expected"),
        ({"temperature": -1.0}, "temperature: expected"),
        ({"engine": "fast"}, "engine: expected one of"),
        ({"split_by": "numbered"}, "numbered"),
    ):
        with pytest.raises(ValueError, match=message):
            choose_probe(Never(), TOKENIZER, **{**given, **change})
    with pytest.raises(TypeError, match="answers: expected texts and numbers"):
        choose_probe(Never(), TOKENIZER, ["1+1=\n"], [None])
    with pytest.raises(ValueError, match="rewards: expected one for each of 1"):
        compare_probes(Never(), TOKENIZER, batch_of("1+1=|2"), ["2"], [], PAIR)
