# SPDX-License-Identifier: Apache-2.0
"""A tree gives the log-probs, the loss and the gradients of each sequence alone, for real model classes.

Mutations, each caught by the test named:
  sspo_ext/tree/masks.py: `query < end` left out; the window left out; the window counted in columns
                                                                  test_a_tree_equals_each_sequence_alone
  sspo_ext/tree/inputs.py: position_ids left out                  test_a_tree_equals_each_sequence_alone
"""

from functools import partial

import pytest
import torch

pytest.importorskip("transformers")
from benchmarks.models import trees
from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses.pref import step_pref_loss
from sspo_ext.tree import TokenTree, UnsupportedTree, tree_attention, tree_inputs

pytestmark = pytest.mark.filterwarnings("ignore")

CASES = [
    (name, attention)
    for name, (default, _) in trees.MODELS.items()
    for attention in (trees.ATTENTIONS if default == "sdpa" else (default,))
]


@pytest.mark.parametrize("route", trees.ROUTES)
@pytest.mark.parametrize(("name", "attention"), CASES)
def test_a_tree_equals_each_sequence_alone(name, attention, route):
    """In float64. A row of 27 tokens splits a tree and repeats what is shared; the model is the same."""
    for max_tokens in (None, 27):
        try:
            row = trees.compare(name, torch.float64, route, attention, max_tokens)
        except UnsupportedTree as error:
            if "its attention cannot be set" in str(error):
                pytest.skip(f"in this transformers: {error}")
            raise
        assert row.d_logps < 1e-13 and row.d_loss < 1e-13 and row.d_grad < 1e-13 * max(row.max_grad, 1), row
        assert row.max_grad > 0.1 and row.parameters > 10


def test_the_windows_are_shorter_than_the_paths():
    longest = max(map(len, trees.batch().sequences))
    windows = [options.get("sliding_window") for _, options in trees.MODELS.values()]
    assert sum(window is not None and window < longest for window in windows) == 4


def test_the_budget_of_the_test_splits_a_tree():
    b = trees.batch()
    whole, split = (TokenTree.from_sequences(b.sequences, groups=b.groups, max_tokens=n) for n in (None, 27))
    assert split.num_tokens > whole.num_tokens and max(map(len, b.sequences)) <= 27


@pytest.mark.parametrize("attention", trees.ATTENTIONS)
@pytest.mark.parametrize("name", ("llama", "mistral", "gpt2"))
def test_another_branch_does_not_change_a_bit(name, attention):
    """Not one bit of a path's logits, whatever the tokens of the other branches are."""
    model = trees.build(name, **trees.MODELS[name][1])
    prompt = [7, 8, 9, 10, 11, 12]

    def run(other):
        tree = TokenTree.from_sequences([[*prompt, 20, 21, 22], [*prompt, *other], [30, 31]], max_tokens=16)
        assert tree.shape == (1, 14)
        with torch.no_grad(), tree_attention(model, attention):
            logits = model(**tree_inputs(model, tree)).logits.flatten(0, 1)
        return [logits[place] for place in tree.places()]

    first, second = run([40, 41, 42]), run([50, 61, 72])
    assert torch.equal(first[0], second[0]) and torch.equal(first[2], second[2])
    assert torch.equal(first[1][:6], second[1][:6]) and not torch.equal(first[1][6:], second[1][6:])


@pytest.mark.parametrize("attention", ("sdpa", "eager"))
@pytest.mark.parametrize(
    ("name", "lengths"),
    (
        ("llama", (12, 9, 12)),
        ("llama", (12,) * 3),
        ("mistral", (12, 9, 12)),
        ("gpt2", (12, 9, 12)),
        ("mixtral", (12,) * 3),
    ),
)
def test_a_tree_of_one_path_is_the_plain_batch(name, lengths, attention):
    """Bit for bit: a padded batch of sequences that share nothing, its logits, its loss and every gradient.

    Padding sees itself in a tree and the sequence before it in a plain batch. So experts get other tokens of padding,
    and a product over all of an expert's tokens adds in another order: Mixtral's batch has no padding.
    """
    model = trees.build(name, **trees.MODELS[name][1])
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(3, 97, (n,), generator=generator) for n in lengths]
    tree = TokenTree.from_sequences(sequences, groups=[0, 1, 2], max_tokens=12)
    ids, mask = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.long)
    for b, sequence in enumerate(sequences):
        ids[b, : len(sequence)], mask[b, : len(sequence)] = sequence, 1
    assert tree.shape == (3, 12) and torch.equal(tree.input_ids, ids)
    steps = [torch.arange(n) // 4 - 1 for n in lengths]
    padded = torch.full((3, 12), -1)
    for b, step in enumerate(steps):
        padded[b, : len(step)] = step

    def run(layout, **inputs):
        model.zero_grad()
        logits = model(**inputs, use_cache=False).logits
        loss = step_pref_loss(logits, layout, torch.tensor([[0, 2], [1, 4]]), reference_free=True).loss
        loss.backward()
        return logits.detach()[mask.bool()], loss.detach(), [p.grad.clone() for p in model.parameters()]

    with tree_attention(model, attention):
        got = run(StepLayout.from_tree(tree, sequences, steps), **tree_inputs(model, tree))
        expected = run(StepLayout.from_step_ids(ids, padded), input_ids=ids, attention_mask=mask)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    # Without padding and windows transformers gives SDPA no mask, and its causal backward adds in another order.
    causal = name == "llama" and attention == "sdpa" and min(lengths) == 12
    close = partial(torch.allclose, atol=1e-5) if causal else torch.equal
    assert all(close(a, b) for a, b in zip(got[2], expected[2], strict=True))
