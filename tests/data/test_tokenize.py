# SPDX-License-Identifier: Apache-2.0
"""Tokens, labels and steps of a row of pairs, on small tokenizers made here.

Mutations, each caught by the test named:
  labels shifted by one, or prompt tokens scored                  test_tokens_labels_and_steps
  end of sequence as a step of its own, or on a partial answer    test_tokens_labels_and_steps, test_partial_has_no_eos
  response tokenized apart from the prompt without need           test_prompt_and_response_are_one_text
"""

import logging

import pytest
from helpers.pair_rows import CHAT, byte_level, row, steps_of, transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from sspo_ext.data.tokenize import UnusableRow, tokenize_row, tokenize_rows
from sspo_ext.signals.split import split_text

LINES = [
    "Question: 3 + 4?\nAnswer:\n3 + 4 = 7\nA: 7\n",
    "第一步：计算。\n\n答案 42 😀\n",
    "Step 1: add\nStep 2: halve\n",
]


def test_tokens_labels_and_steps(tok):
    feature = tokenize_row(row(), tok, skip_shared=False)
    assert tok.decode(feature["chosen_input_ids"]) == "Q:\na\nb\nc<eos>"
    assert steps_of(feature, "chosen", tok) == ["a\n", "b\n", "c<eos>"]
    assert steps_of(feature, "rejected", tok) == ["a\n", "x\n", "c<eos>"]
    assert feature["chosen_step_ids"] == [-1] * 3 + [0, 0, 1, 1, 2, 2]
    assert feature["pairs"] == [[0, 0], [1, 1], [2, 2]]
    assert (feature["weight"], feature["margin"], feature["source"]) == (1.0, 0.0, "row 0")


def test_skip_shared_and_unmatched_steps(tok):
    feature = tokenize_row(row("a\nb\nc\nd", "a\nx"), tok)
    assert steps_of(feature, "chosen", tok) == ["b\n"] and steps_of(feature, "rejected", tok) == ["x<eos>"]
    assert tok.decode(feature["chosen_input_ids"]) == "Q:\na\nb\n"  # nothing after the last scored token
    assert feature["pairs"] == [[0, 0]]
    assert steps_of(tokenize_row(row("a\nb\nc", "a\nx\nc\nd"), tok), "chosen", tok) == ["b\n", "c<eos>"]


def test_pair_by(tok):
    branch = tokenize_row(row(), tok, pair_by="branch")
    assert steps_of(branch, "chosen", tok) == ["b\n"] and steps_of(branch, "rejected", tok) == ["x\n"]
    sequence = tokenize_row(row(), tok, pair_by="sequence")
    assert steps_of(sequence, "chosen", tok) == ["a\nb\nc<eos>"] and sequence["pairs"] == [[0, 0]]
    own = row(["a", "b", "c"], ["a", "b", "d"], branch=1)
    own["chosen"][1] = "B\n"
    assert steps_of(tokenize_row(own, tok), "chosen", tok) == ["B\n"]
    assert steps_of(tokenize_row(row(branch=1), tok), "rejected", tok) == ["x\n"]
    with pytest.raises(ValueError, match="^branch: the first 2 steps"):
        tokenize_row(row(branch=2), tok)
    with pytest.raises(ValueError, match="^branch: expected less than the 3 steps of chosen, got 3"):
        tokenize_row({**row(), "rejected": "a\nb\nc\nd", "branch": 3}, tok)
    with pytest.raises(ValueError, match="^branch: step 0 is the same"):
        tokenize_row(row(branch=0), tok)
    with pytest.raises(ValueError, match="^pair_by: "):
        tokenize_row(row(), tok, pair_by="step")


def test_partial_has_no_eos(tok):
    step_dpo = row(" b", " x", initial_reason_steps="Step 1: a\nStep 2:")
    feature = tokenize_row(step_dpo, tok)
    assert steps_of(feature, "chosen", tok) == [" b"] and steps_of(feature, "rejected", tok) == [" x"]
    assert tok.decode(feature["rejected_input_ids"]) == "Q:\nStep 1: a\nStep 2: x"
    for options in ({"add_eos": False}, {}):
        feature = tokenize_row(row(partial=not options), tok, pair_by="sequence", **options)
        assert steps_of(feature, "chosen", tok) == ["a\nb\nc"]
    assert tokenize_row(row("a<eos>", "b"), tok)["chosen_input_ids"].count(tok.eos_token_id) == 1


def test_prompt_and_response_are_one_text():
    merging = byte_level(bos=True, merges=[("Ċ", "a"), ("a", "b"), (":", "Ġ")])
    # inside the response "ab" merges; at its start "\n" + "a" would, over the prompt's end, so each is tokenized alone
    feature = tokenize_row(row("ab", "x", prompt="Q:\n"), merging)
    assert merging.convert_ids_to_tokens(feature["chosen_input_ids"]) == ["<bos>", "Q", ":", "Ċ", "ab", "<eos>"]
    assert merging.convert_ids_to_tokens(feature["rejected_input_ids"]) == ["<bos>", "Q", ":", "Ċ", "x", "<eos>"]
    assert feature["chosen_step_ids"] == [-1, -1, -1, -1, 0, 0]
    twice = tokenize_row(row("ab", "x", prompt="<bos>Q"), merging)
    assert twice["chosen_input_ids"].count(merging.bos_token_id) == 1

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # alone, this tokenizer puts a space before the first word: joined with its prompt a response has none
    vocab = {t: i for i, t in enumerate(["<eos>", "▁", "Q", ":", "x", "y", "\n"])}
    space = Tokenizer(models.BPE(vocab, []))
    space.pre_tokenizer, space.decoder = pre_tokenizers.Metaspace(split=False), decoders.Metaspace()
    space = transformers.PreTrainedTokenizerFast(tokenizer_object=space, eos_token="<eos>")
    feature = tokenize_row(row("x", "y", prompt="Q:"), space)
    assert space.convert_ids_to_tokens(feature["chosen_input_ids"]) == ["▁", "Q", ":", "x", "<eos>"]


def test_straddled_steps_keep_their_row():
    merging = byte_level(merges=[("Ċ", "b"), ("Ċb", "Ċ")])
    feature = tokenize_row(
        row("a\nb\nc", "x\ny\nz"), merging
    )  # "\nb\n" starts in the first step and swallows the second
    assert steps_of(feature, "chosen", merging) == ["a\nb\n", "c<eos>"]
    # the step after shared ones begins where the tokens part, so it has the token over the border
    feature = tokenize_row(row(["a", "b", "c"], ["a", "y", "z"], branch=1), merging)
    assert steps_of(feature, "chosen", merging) == ["\nb\n"] and steps_of(feature, "rejected", merging) == ["\ny\n"]


def test_max_length(tok, caplog):
    rows = [row(), row("a\nb\n" + "c" * 20, "a\nx\nc"), row("b" * 20, "c")]
    assert len(tokenize_row(rows[0], tok, max_length=9)["chosen_input_ids"]) == 9
    for options in ({"max_length": 8}, {"max_length": 8, "overflow": "cut"}):
        with pytest.raises(UnusableRow, match="longer than max_length=8"):
            tokenize_row(rows[2], tok, **options)
    with pytest.raises(ValueError, match="^max_length: 28 tokens are more than 9"):
        tokenize_row(rows[1], tok, max_length=9, overflow="error")
    with caplog.at_level(logging.WARNING):
        assert len(tokenize_rows(rows, tok, max_length=9)) == 1
    assert "2 of 3 rows are left out: 2 longer than max_length=9" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        cut = tokenize_rows(rows, tok, max_length=9, overflow="cut")
    assert [f["pairs"] for f in cut] == [[[0, 0], [1, 1]], [[0, 0]]]
    assert "1 of 3 rows lose steps" in caplog.text and "1 longer than" in caplog.text
    assert steps_of(cut[1], "chosen", tok) == ["b\n"]
    with pytest.raises(ValueError, match="nothing to train on is left of 3 rows: 3 longer"):
        tokenize_rows(rows, tok, max_length=3)
    with pytest.raises(ValueError, match="^overflow: "):
        tokenize_row(rows[0], tok, overflow="truncate")


def test_wrong_rows_are_all_named_and_unusable_ones_counted(tok, caplog):
    rows = [row(), row(branch=2), row(), row(branch=2)]
    for i, r in enumerate(rows):
        r["source"] = f"f:{i}"
    with pytest.raises(ValueError, match="2 of 4 rows cannot be used:\n  f:1: branch.*\n  f:3: branch"):
        tokenize_rows(rows, tok)
    prefix = row("a\nb", "a\n", partial=True)
    with caplog.at_level(logging.WARNING):
        assert len(tokenize_rows([rows[0], prefix], tok)) == 1
    assert "one response is the beginning of the other" in caplog.text
    with pytest.raises(TypeError, match="^tokenizer: expected a fast one"):
        tokenize_row(row(), object())


def test_chat(tok):
    messages = [{"role": "user", "content": "2 + 2?"}]
    feature = tokenize_row(row(" a\nb\n", "a\nx", prompt=messages), tok, skip_shared=False)
    assert tok.decode(feature["chosen_input_ids"]) == "<|user|>\n2 + 2?<eos>\n<|assistant|>\na\nb<eos>"
    assert steps_of(feature, "chosen", tok) == ["a\n", "b<eos>"]
    feature = tokenize_row(row(["a", "b"], ["a", "x"], prompt=messages, branch=1, partial=True), tok)
    assert steps_of(feature, "chosen", tok) == ["b"]
    thinking = CHAT.replace(
        "<|{{ m.role }}|>\n", "<|{{ m.role }}|>\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    )
    other = byte_level()
    other.chat_template = thinking
    feature = tokenize_row(row("a\nb", "a\nx", prompt=messages), other, skip_shared=False)
    assert steps_of(feature, "chosen", other) == ["<think>\n\n</think>\n\na\n", "b<eos>"]
    other.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    with pytest.raises(ValueError, match="^prompt: the chat template"):
        tokenize_row(row("a\nb", "a\nx", prompt=messages), other)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from([*LINES, "a", "\n", " ", "\n\n", "😀", "B。"]), min_size=1, max_size=6).map("".join),
    st.lists(st.sampled_from([*LINES, "a", "\n", " ", "\n\n", "😀", "B。"]), min_size=1, max_size=6).map("".join),
    st.sampled_from(["newline", "blank_line", "numbered"]),
)
def test_steps_concatenate_to_the_response(chosen, rejected, by):
    if not chosen.strip() or not rejected.strip() or chosen == rejected:
        return
    tok = byte_level()
    feature = tokenize_row(row(chosen, rejected), tok, split_by=by, pair_by="sequence")
    assert steps_of(feature, "chosen", tok) == [chosen + "<eos>"]
    feature = tokenize_row(row(chosen, rejected), tok, split_by=by, skip_shared=False)
    for side, text in (("chosen", chosen), ("rejected", rejected)):
        steps = steps_of(feature, side, tok)
        texts = [text[a:b] for a, b in split_text(text, by)]
        texts[-1] += "<eos>"
        assert steps == texts[: len(steps)] and (len(steps) == len(texts) or len(feature["pairs"]) == len(steps))
