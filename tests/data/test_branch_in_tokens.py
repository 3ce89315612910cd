# SPDX-License-Identifier: Apache-2.0
"""Two responses that share steps share them in tokens: what is compared begins where the tokens part.

All were red before but the message of a step that is the same: a token over the branch's border was left unscored
(" Yes" and " No" of test_a_space_before_the_branch), or it stood in the context of one response alone.
"""

import pytest

pytest.importorskip("transformers")
from hypothesis import given, settings
from hypothesis import strategies as st

from sspo_ext.data.rows import load_preference_rows
from sspo_ext.data.tokenize import tokenize_row
from sspo_ext.tracing.chains import load_chains

MERGES = [
    ("Ġ", "Y"), ("Ġ", "N"), ("ĠY", "e"), ("1", "2"), ("12", "3"), ("Ċ", "b"), ("Ċb", "Ċ"), ("Ġ", "Ġ"), (".", "Ġ"),
    ("e", "s"), (":", "Ġ"), ("Ċ", "Ċ"), ("ĠY", "es"),
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = dict.fromkeys(["<eos>", *letters, *(a + b for a, b in MERGES)])
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, MERGES))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<eos>")


def compared(row, tokenizer, **options):
    """What both responses are given before the compared step, and the step of each, in tokens."""
    (row,) = load_preference_rows([row] if isinstance(row, dict) else row, **options)
    feature = tokenize_row(row, tokenizer)
    assert feature["pairs"] == [[0, 0]]
    contexts, steps = [], []
    for side in ("chosen", "rejected"):
        ids, labels = feature[f"{side}_input_ids"], feature[f"{side}_labels"]
        at = next(i for i, label in enumerate(labels) if label >= 0)
        assert labels[at:] == ids[at:]
        contexts.append(ids[:at])
        steps.append([tokenizer.decode([i]) for i in ids[at:]])
    assert contexts[0] == contexts[1]
    return (tokenizer.decode(contexts[0]), *steps)


def test_a_space_before_the_branch(tokenizer):
    row = {"prompt": "Q:\n", "initial_reason_steps": "Step 2 ", "chosen": "Yes it", "rejected": "No it"}
    assert compared(row, tokenizer) == ("Q:\nStep 2", [" Ye", "s", " ", "i", "t"], [" N", "o", " ", "i", "t"])
    row["initial_reason_steps"] = "Step 2:\n"  # nothing spans the border, and the step begins there
    assert compared(row, tokenizer) == ("Q:\nStep 2:\n", ["Y", "es", " ", "i", "t"], ["N", "o", " ", "i", "t"])


def test_a_step_that_differs_only_in_the_token_over_the_border(tokenizer):
    """It was refused with "step 1 is the same in chosen and rejected", which is false."""
    row = {"prompt": "Q:\n", "initial_reason_steps": "Step 2 ", "chosen": "Y.", "rejected": "N."}
    assert compared(row, tokenizer) == ("Q:\nStep 2", [" Y", "."], [" N", "."])


def test_a_token_over_the_border_of_one_response_alone(tokenizer):
    row = {"prompt": "Q:\n", "initial_reason_steps": "= 12", "chosen": "3.", "rejected": ".5"}
    assert compared(row, tokenizer) == ("Q:\n= ", ["123", "."], ["12", ".", "5"])


def test_lists_with_a_branch(tokenizer):
    row = {"prompt": "Q:\n", "chosen": ["1 ", "2 ", "Yes"], "rejected": ["1 ", "2 ", "No", "3"], "branch": 2}
    assert compared(row, tokenizer) == ("Q:\n1 2", [" Ye", "s", "<eos>"], [" N", "o", "\n"])
    row = {"prompt": "Q:\n", "chosen": ["a", "b", "c"], "rejected": ["a", "y", "z"], "branch": 1}
    assert compared(row, tokenizer) == ("Q:\na", ["\nb\n"], ["\n", "y", "\n"])


def test_stepwise_rows_with_another_separator(tokenizer):
    rows = [
        {"prompt": "Q:\n", "completions": ["1", "Yes"], "labels": [True, True]},
        {"prompt": "Q:\n", "completions": ["1", "No"], "labels": [True, False]},
    ]
    assert compared(rows, tokenizer, step_separator=" ") == ("Q:\n1", [" Ye", "s"], [" N", "o"])


def test_messages_are_true(tokenizer):
    row = {"prompt": "Q:\n", "chosen": ["a", "b", "c"], "rejected": ["a", "b", "d"], "branch": 1}
    with pytest.raises(ValueError, match="^branch: step 1 is the same in chosen and rejected$"):
        compared(row, tokenizer)
    from tokenizers import normalizers

    lower = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    row = {"prompt": "Q:\n", "chosen": ["a", "x", "c"], "rejected": ["a", "X", "d"], "branch": 1}
    try:
        with pytest.raises(ValueError, match=r"^branch: step 1 has the same tokens .*, 'x\\n' and 'X\\n'$"):
            compared(row, lower)
    finally:
        lower.backend_tokenizer.normalizer = None


PIECES = st.lists(st.sampled_from(["Y", "N", "es", " ", "12", "3", "\n", "b", ".", ":", "😀"]), max_size=5).map("".join)


@settings(deadline=None, max_examples=500)
@given(PIECES, PIECES, PIECES)
def test_whatever_the_texts(tokenizer, shared, chosen, rejected):
    if not chosen.strip() or not rejected.strip() or chosen == rejected:
        return
    row = {"prompt": "Q:\n", "initial_reason_steps": shared, "chosen": chosen, "rejected": rejected}
    context, *steps = compared(row, tokenizer)
    border = len("Q:\n" + shared)
    spans = len(context + steps[0][0]) > border
    assert len(context) == border or (len(context) < border and (spans or steps[0][0] != steps[1][0]))
    (pair,) = load_preference_rows([row])
    feature = tokenize_row(pair, tokenizer)
    for side, text in (("chosen", chosen), ("rejected", rejected)):
        assert tokenizer.decode(feature[f"{side}_input_ids"]) == "Q:\n" + shared + text


def test_the_texts_of_a_traced_chain_are_those_of_its_tokens(tokenizer):
    row = {"prompt": "Q:\n", "response": "a\nb = 1\nc\nb\nd", "answer": "1", "reward": 1}
    ((chain,), _) = load_chains([row], tokenizer)
    assert chain.steps == ["a\nb", " = 1\n", "c\nb\n", "d"]
    assert [tokenizer.decode(ids) for ids in chain.step_ids] == chain.steps
