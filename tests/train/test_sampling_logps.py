# SPDX-License-Identifier: Apache-2.0
"""The log-probs and kept tokens that our engines report, against the model's own logits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")

from helpers.rl import make_model

from sspo_ext.train.drawing import Chooser
from sspo_ext.train.rollout import CompactEngine, GenerateEngine
from sspo_ext.train.sampling import Sampling

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [5, 6], [20, 3, 4]]
SEEDS = [(0, i) for i in range(len(PROMPTS))]
OPTIONS = [{}, {"temperature": 0.7, "top_k": 5}, {"top_p": 0.6}, {"top_p": 0.8, "top_k": 6, "temperature": 1.3}]


def sampling(**options):
    return Sampling(**{"max_completion_length": 10, "eos_token_ids": (1, 4), **options})


@pytest.fixture(scope="module")
def model():
    return make_model(scale=2.0).eval()


def narrowed(logits, given):
    """The set of kept tokens, written out: sort, cut, and count the mass before each token."""
    p = (logits.double() / given.temperature).softmax(-1)
    if given.top_k:
        p = torch.where(p >= p.topk(given.top_k).values[-1], p, 0.0)
        p = p / p.sum()
    order = p.argsort(descending=True)
    before = p[order].cumsum(0) - p[order]
    return set(order[(before < given.top_p) & (p[order] > 0)].tolist())


@pytest.mark.parametrize("engine", [GenerateEngine, CompactEngine])
@pytest.mark.parametrize("options", OPTIONS)
def test_what_is_reported_is_the_distribution_that_was_drawn_from(model, engine, options):
    given = sampling(logps=True, kept=True, **options)
    made = engine(0, rows_at_once=2).complete(model, PROMPTS, given, SEEDS)
    assert made.token_ids == engine(0).complete(model, PROMPTS, sampling(**options), SEEDS)  # the same draws
    narrows = bool(given.top_k or given.top_p < 1)
    assert (made.kept is not None) == narrows
    for i, (prompt, ids, logps) in enumerate(zip(PROMPTS, made.token_ids, made.logps, strict=True)):
        assert len(ids) == len(logps)
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        for t, (row, token, logp) in enumerate(zip(logits, ids, logps, strict=True)):
            kept = narrowed(row, given)
            p = (row.double() / given.temperature).softmax(-1)
            assert logp == pytest.approx((p[token] / p[list(kept)].sum()).log().item(), abs=2e-5)
            if narrows:
                assert set(made.kept[i][t].tolist()) == kept
                assert token in kept


def test_greedy_draws_have_probability_one(model):
    made = GenerateEngine(0).complete(model, PROMPTS, sampling(temperature=0.0, logps=True, kept=True), SEEDS)
    assert {x for row in made.logps for x in row} == {0.0} and made.kept is None


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def draw(logits, uniform):
    """What a draw needs, written down once more."""
    cumulative = logits.float().softmax(-1).cumsum(-1)
    target = uniform[torch.arange(5), 0, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=25)


def operations(fn, *args):
    with Operations() as seen:
        fn(*args)
    return sorted(seen.names)


def test_who_does_not_ask_does_not_pay():
    """Without a question the operations are those of drawing alone, one by one."""
    logits, rows, device = torch.randn(5, 26), torch.arange(5), torch.device("cpu")
    plain = Chooser(sampling(), SEEDS, device)
    alone = operations(draw, logits, plain.uniform)
    assert operations(lambda: plain(logits, torch.arange(5), 0)) == alone
    asked = operations(Chooser(sampling(logps=True), SEEDS, device), logits, rows, 0)
    assert sum("log_softmax" in name for name in asked) == 1 and not any("nonzero" in name for name in asked)
    silent = operations(Chooser(sampling(top_p=0.6), SEEDS, device), logits, rows, 0)
    assert not any("log_softmax" in name or "nonzero" in name for name in silent)
    asked = operations(Chooser(sampling(top_p=0.6, kept=True), SEEDS, device), logits, rows, 0)
    assert sum("nonzero" in name for name in asked) == 1
