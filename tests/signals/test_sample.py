# SPDX-License-Identifier: Apache-2.0
"""Sampled continuations against transformers' own generate, and by every engine alike.

Mutation of sspo_ext/signals/sample.py that turned a test red: positions that do not advance
(test_greedy_is_what_generate_gives[llama-cached]).
"""

import pytest
import torch

pytest.importorskip("transformers")
from transformers import MambaConfig, MambaForCausalLM

from benchmarks.models import families
from sspo_ext.signals.branches.branch import Branch
from sspo_ext.signals.branches.sample import sample_branches

pytestmark = pytest.mark.filterwarnings("ignore")

TRUNKS = [[5, 9, 12, 40, 33, 21, 8, 77, 60], [14, 15, 16, 17]]
BRANCHES = [Branch(0, 9, []), Branch(0, 3, [4, 8]), Branch(1, 4, [50]), Branch(0, 3, []), Branch(1, 1, [6, 6, 6])]


@pytest.fixture(scope="module", params=("llama", "gpt2"))
def model(request):
    return families.enlarge(families.build(request.param), 2.0)


def path(branch):
    return [*TRUNKS[branch.trunk][: branch.cut], *branch.ids]


@pytest.mark.parametrize("engine", ("cached", "separate"))
def test_greedy_is_what_generate_gives(model, engine):
    got = sample_branches(model, TRUNKS, BRANCHES, 1, max_new_tokens=7, temperature=0, engine=engine)
    for branch, (ids,) in zip(BRANCHES, got, strict=True):
        prompt = torch.tensor([path(branch)])
        expected = model.generate(prompt, max_new_tokens=7, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert ids == expected[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("max_tokens", (1, 100))
def test_engines_and_batches_are_equal(model, max_tokens):
    options = {"max_new_tokens": 6, "seed": 3, "eos_token_ids": [20, 30, 40, 50]}
    expected = sample_branches(model, TRUNKS, BRANCHES, 4, engine="separate", **options)
    got = sample_branches(model, TRUNKS, BRANCHES, 4, engine="cached", max_tokens=max_tokens, **options)
    assert got == expected
    backwards = sample_branches(model, TRUNKS, BRANCHES[::-1], 4, **options)
    assert backwards[::-1] == expected
    assert len({tuple(ids) for some in expected for ids in some}) > 10


def test_the_frequencies_are_the_probabilities(model):
    n = 2000
    (some,) = sample_branches(model, TRUNKS, BRANCHES[:1], n, max_new_tokens=1, temperature=2.0, max_tokens=10**6)
    counts = torch.bincount(torch.tensor(some)[:, 0], minlength=97) / n
    with torch.no_grad():
        p = (model(torch.tensor(TRUNKS[:1])).logits[0, -1].double() / 2.0).softmax(-1)
    assert (counts - p).abs().max() < 4 * (p * (1 - p) / n).sqrt().max()


@pytest.mark.parametrize("engine", ("cached", "separate"))
def test_where_a_continuation_ends(model, engine):
    options = {"max_new_tokens": 8, "temperature": 1.0, "engine": engine}
    free = sample_branches(model, TRUNKS, BRANCHES, 3, **options)
    assert {len(ids) for some in free for ids in some} == {8}
    eos = {ids[2] for some in free for ids in some[:1]}
    ended = sample_branches(model, TRUNKS, BRANCHES, 3, eos_token_ids=sorted(eos), **options)
    short = sample_branches(model, TRUNKS, BRANCHES, 3, stop=lambda ids: len(ids) == 3, **options)
    for a, b, c in zip(*(sum(x, []) for x in (free, ended, short)), strict=True):
        first = next((i for i, token in enumerate(a) if token in eos), 7)
        assert b == a[: first + 1] and c == a[:3]


def prefix_tuned():
    peft = pytest.importorskip("peft")
    model = families.enlarge(families.build("llama"), 2.0)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    return families.enlarge(peft.get_peft_model(model, config), 2.0)


def mamba():
    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "pad_token_id": 0}
    return families.enlarge(MambaForCausalLM(MambaConfig(**shape)), 2.0)


@pytest.mark.parametrize("make", (mamba, prefix_tuned))
def test_a_context_that_is_no_cache_of_the_text(make):
    """A recurrent state, and the virtual tokens of an adapter: neither is lost from one token to the next."""
    model = make().eval()
    got = sample_branches(model, TRUNKS, BRANCHES, 1, max_new_tokens=7, temperature=0)
    for branch, (ids,) in zip(BRANCHES, got, strict=True):
        text = path(branch)
        for _ in range(7):
            with torch.no_grad():
                text.append(int(model(input_ids=torch.tensor([text])).logits[0, -1].argmax()))
        assert ids == text[-7:]


def test_a_model_without_a_cache_is_run_anew():
    class NoCache(torch.nn.Module):
        """The next token is one more than the sum, modulo 10."""

        def forward(self, input_ids):
            return (
                torch.nn.functional.one_hot((input_ids.sum(1, keepdim=True) + 1) % 10, 10)
                .float()[None]
                .expand(1, -1, -1, -1)
                .reshape(len(input_ids), 1, 10)
                .expand(-1, input_ids.shape[1], -1)[None]
            )

    got = sample_branches(NoCache(), [[1, 2]], [Branch(0, 2, [])], 2, max_new_tokens=3, temperature=0)
    assert got == [[[4, 8, 6]] * 2]
