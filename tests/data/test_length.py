# SPDX-License-Identifier: Apache-2.0
"""A row that is surely over max_length is dropped before it is tokenized; 5 MB took 20 to 48 seconds.

Mutation, caught by the test named:
  a bound of `max_length * widest - 1` characters, without the one token more          test_what_is_sure_is_true
  `_surely_scored` counts the whole response of a row with a branch                   test_a_long_tail_is_kept
"""

import json
import random

import pytest

pytest.importorskip("transformers")

from helpers.pair_rows import byte_level
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sspo_ext.data.length import LengthBound
from sspo_ext.data.tokenize import tokenize_row, tokenize_rows
from sspo_ext.tracing.chains import load_chains

MERGES = [("a", "b"), ("ab", "ab"), ("c", "Ċ")]


class Counting:
    """A tokenizer that counts the characters that it is given."""

    def __init__(self, inner):
        self.inner, self.characters = inner, 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, text, **options):
        self.characters += len(text)
        return self.inner(text, **options)


@pytest.fixture
def counting():
    return Counting(byte_level(merges=MERGES))


def pair(**columns):
    return {"prompt": "Q:\n", "chosen": "a\nb", "rejected": "a\nc", **columns}


@pytest.mark.parametrize(
    "row, options",
    (
        (pair(prompt="a" * 5_000_000), {}),
        (pair(prompt="a" * 5_000_000), {"overflow": "cut"}),
        (pair(chosen="a" * 5_000_000), {}),
        (pair(rejected="a b\n" * 1_000_000), {"pair_by": "sequence"}),
        (pair(chosen=["a\n", "b" * 5_000_000], rejected=["a\n", "c"], branch=1), {}),
        (pair(prompt=[{"role": "user", "content": "a" * 5_000_000}]), {}),
    ),
)
def test_five_megabytes_are_not_tokenized(counting, row, options):
    with pytest.raises(ValueError, match="nothing to train on is left of 1 rows: 1 longer than max_length=1024"):
        tokenize_rows([row], counting, max_length=1024, **options)
    assert counting.characters < 1000


def test_a_long_chain_is_not_tokenized(counting):
    row = {"id": "long", "prompt": "Q", "response": "a" * 5_000_000, "answer": "1", "reward": 1}
    other = {**row, "id": "short", "response": "a"}
    chains, long = load_chains([row, other], counting, max_length=1024)
    assert [chain.source for chain in chains] == ["short"] and long == ["long"] and counting.characters < 1000


def test_a_long_tail_is_kept(counting):
    """What follows the last scored step may have any length."""
    tail = "x" * 50_000
    for row, options in (
        (pair(chosen=["a\n", "b\n", tail], rejected=["a\n", "c"], branch=1), {}),
        (pair(chosen=f"a\nb\n{tail}"), {}),
        (pair(chosen=f"a\nb\n{tail}"), {"pair_by": "branch"}),
        (pair(chosen=f"b{tail}", rejected=f"c{tail}"), {"pair_by": "sequence", "token_weights": "divergence"}),
    ):
        assert tokenize_row(row, counting, max_length=20, **options) == tokenize_row(row, counting, **options)


@pytest.mark.parametrize("overflow", ("drop", "cut"))
@pytest.mark.parametrize("pair_by", ("index", "branch", "sequence"))
def test_nothing_else_is_dropped(monkeypatch, pair_by, overflow):
    """The same rows are left, and the same features, as without the short cut."""
    tokenizer, draw = byte_level(merges=MERGES), random.Random(0)
    rows = [
        pair(**{side: "".join(draw.choice("abab c\n\nx") for _ in range(draw.choice((3, 9, 200)))) + "." + side
                for side in ("chosen", "rejected")}, source=str(i))
        for i in range(150)
    ]  # fmt: skip
    options = {"max_length": 20, "pair_by": pair_by, "overflow": overflow}
    found = tokenize_rows(rows, tokenizer, **options)
    monkeypatch.setattr(LengthBound, "exceeded", lambda self, text: False)
    assert found == tokenize_rows(rows, tokenizer, **options) and 0 < len(found) < 150


def test_what_is_sure_is_true():
    tokenizer, draw = byte_level(merges=MERGES), random.Random(0)
    bound, sure = LengthBound(tokenizer, 3), 0
    for _ in range(300):
        text = "".join(draw.choice(("abab", "é", "<eos>")) for _ in range(draw.randrange(12)))
        if bound.exceeded(text):
            sure += 1
            assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) > 3
    assert sure > 20
    assert not bound.exceeded("abab" * 3) and not LengthBound(tokenizer, None).exceeded("a" * 1000)


def made(model, pre=None, normalizer=None):
    tokenizer = Tokenizer(model)
    if pre is not None:
        tokenizer.pre_tokenizer = pre
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")


VOCAB = {"?": 0, "a": 1}
ONE = models.BPE(VOCAB, [], unk_token="?")


@pytest.mark.parametrize(
    "tokenizer",
    (
        made(models.WordLevel(VOCAB, unk_token="?")),  # one unknown word of any length
        made(models.BPE(VOCAB, [], unk_token="?", fuse_unk=True)),  # unknown characters are one token
        made(models.BPE(VOCAB, [])),  # they are none
        made(ONE, pre_tokenizers.Whitespace()),  # white space is none
        made(ONE, pre_tokenizers.Split(" ", "removed")),
        made(ONE, normalizer=normalizers.Strip()),
        made(ONE, normalizer=normalizers.Replace("aa", "a")),
        made(ONE, normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.StripAccents()])),
    ),
)
def test_nothing_is_sure_where_characters_are_lost(tokenizer):
    assert not LengthBound(tokenizer, 1).exceeded("a " * 1000)


def test_normalizers_that_compose(counting):
    tokenizer = made(ONE, pre_tokenizers.Split("a", "isolated"), normalizers.NFC())
    assert LengthBound(tokenizer, 1).exceeded("a" * 9) and not LengthBound(tokenizer, 1).exceeded("a" * 8)
    assert json.loads(tokenizer.backend_tokenizer.to_str())["normalizer"] == {"type": "NFC"}


def test_a_token_that_takes_white_space():
    from transformers import AddedToken

    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<end>", rstrip=True)])
    bound = LengthBound(tokenizer, 1)
    text = "<end>" + " " * 100
    assert len(tokenizer(text)["input_ids"]) == 1 and not bound.exceeded(text) and bound.exceeded("a" + text[5:])


@pytest.mark.parametrize("value, error", (("9", TypeError), (True, TypeError), (0, ValueError), (1.5, TypeError)))
def test_max_length_is_a_whole_number(counting, value, error):
    """A text gave a TypeError from inside, and True was the limit of 1."""
    with pytest.raises(error, match="^max_length: expected a whole number"):
        tokenize_rows([pair()], counting, max_length=value)
    with pytest.raises(error, match="^max_length: expected a whole number"):
        load_chains([], counting, max_length=value)
