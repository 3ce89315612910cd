# SPDX-License-Identifier: Apache-2.0
"""Forms of rows that users of TRL have: arrays of JSON, whole conversations, implicit prompts, equal responses.

Mutations, each caught by the test named:
  the line of an object is that of the array                      test_an_array_names_lines
  a prompt beside conversations is not compared                   test_a_prompt_that_conversations_do_not_have
  the prompt of two texts ends inside a word                      test_the_words_that_two_texts_share
  equal rows are dropped without a word                           test_equal_responses_are_counted
"""

import json
import logging
import re

import pytest

from sspo_ext.data.rows import load_preference_rows

ROW = {"prompt": "Q", "chosen": "a", "rejected": "b"}
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Why?"}


def said(text):
    return {"role": "assistant", "content": text}


def loaded(row):
    (found,) = load_preference_rows([row])
    return found["prompt"], found["chosen"], found["rejected"]


# ---- files


@pytest.mark.parametrize("indent", (None, 1, "\t"))
@pytest.mark.parametrize("before", ("", "\n \r\n", "\ufeff", "\ufeff\n"))
def test_an_array_of_rows(tmp_path, indent, before):
    file = tmp_path / "rows.json"
    rows = [{**ROW, "chosen": text} for text in ("a", "é[1, 2]", "c\n]")]
    file.write_text(before + json.dumps(rows, indent=indent, ensure_ascii=False) + "\n ", "utf-8")
    assert [row["chosen"] for row in load_preference_rows(file)] == ["a", "é[1, 2]", "c\n]"]


def test_an_array_names_lines(tmp_path):
    file = tmp_path / "rows.json"
    good = json.dumps(ROW)
    file.write_text(f'[\n{good},\n\n{good}, {{"prompt": "Q"}},\n5\n]')
    with pytest.raises(ValueError) as error:
        load_preference_rows(file)
    assert str(error.value) == (
        f"2 of 4 rows cannot be used:\n  {file}:4: expected the keys prompt, chosen and rejected, got no chosen and no "
        f"rejected\n  {file}:5: expected a JSON object, got int"
    )
    file.write_text(f"[{good},\n{good}]")
    assert [row["source"] for row in load_preference_rows(file)] == [f"{file}:1", f"{file}:2"]


@pytest.mark.parametrize(
    "text, message",
    (
        ("[\n{},\n", ":3: not an array of JSON objects: Expecting value"),
        ("[\n{}\n{}]", ":2: not an array of JSON objects: expected a comma or ] after this one"),
        ("[\n{},\n]", ":3: not an array of JSON objects: Expecting value"),
        ("[\n{}]\n{}", ": expected nothing after the array, or JSON lines from the start"),
        ("[\n" + "[" * 100_000, ":2: not an array of JSON objects: nested too deep"),
        ("[\n{}, '\udcff']", ": expected an array in UTF-8: 'utf-8' codec can't decode byte 0xff"),
        ("[]", "source: expected at least one row, found none in "),
    ),
)
def test_arrays_that_are_broken(tmp_path, text, message):
    file = tmp_path / "rows.json"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError) as error:
        load_preference_rows(file)
    assert (message if message.startswith("source") else f"{file}{message}") in str(error.value)


# ---- conversations


@pytest.mark.parametrize("prompt", (None, "Why?", " Why?\n", [USER]))
def test_whole_conversations(prompt):
    row = {"prompt": prompt, "chosen": [USER, said("a")], "rejected": [USER, said("b")], "score_chosen": 9.0}
    assert loaded(row) == ([USER], "a", "b")


@pytest.mark.parametrize(
    "prompt", (None, "And now?", [SYSTEM, USER], [SYSTEM, USER, said("x"), USER | {"content": "And now?"}])
)
def test_whole_conversations_of_several_turns(prompt):
    before = [SYSTEM, USER, said("x"), {"role": "user", "content": "And now?"}]
    row = {"prompt": prompt, "chosen": [*before, said("a")], "rejected": [*before, said("b")]}
    assert loaded(row) == (before, "a", "b")


@pytest.mark.parametrize(
    "prompt, message",
    (
        ("Who?", "prompt: expected what the user says last in the messages that chosen and rejected share, got 'Who?'"),
        ([SYSTEM], "prompt: expected the messages with which chosen and rejected begin, got others"),
    ),
)
def test_a_prompt_that_conversations_do_not_have(prompt, message):
    row = {"prompt": prompt, "chosen": [USER, said("a")], "rejected": [USER, said("b")]}
    with pytest.raises(ValueError, match="row 0: " + re.escape(message)):
        load_preference_rows([row])


def test_a_response_in_several_messages_is_refused():
    row = {"prompt": "Why?", "chosen": [USER, said("a"), USER, said("c")], "rejected": [USER, said("b")]}
    with pytest.raises(ValueError, match="chosen: expected one assistant message, got roles"):
        load_preference_rows([row])


# ---- texts


@pytest.mark.parametrize(
    "chosen, rejected, prompt",
    (
        ("Human: Why? Assistant: yes", "Human: Why? Assistant: no", "Human: Why? Assistant:"),
        ("1 + 1 = 12", "1 + 1 = 13", "1 + 1 ="),  # not within a number
        ("Q\n\nA: a", "Q\n\nB: a", "Q\n\n"),
        ("Q: left", "Q: left over", "Q:"),
    ),
)
def test_the_words_that_two_texts_share(chosen, rejected, prompt):
    assert loaded({"chosen": chosen, "rejected": rejected}) == (prompt, chosen[len(prompt) :], rejected[len(prompt) :])


def test_texts_that_share_nothing():
    with pytest.raises(ValueError, match="row 0: prompt: expected a text, got an empty one"):
        load_preference_rows([{"chosen": "a b", "rejected": "c d"}])


# ---- equal responses


def test_equal_responses_are_counted(caplog):
    rows = [ROW, {**ROW, "chosen": "b"}, {**ROW, "rejected": ["a"]}, {"chosen": "a b", "rejected": "a b"}]
    with pytest.raises(ValueError, match="3 of 4 rows cannot be used"):
        load_preference_rows(rows)
    with caplog.at_level(logging.WARNING):
        (row,) = load_preference_rows(rows[:3], skip_equal=True)
    assert row["source"] == "row 0"
    assert "2 of 3 rows are left out, since chosen and rejected are the same text (row 1, row 2)" in caplog.text
    with pytest.raises(ValueError, match="^source: nothing to train on is left"):
        load_preference_rows(rows[1:3], skip_equal=True)
    with pytest.raises(ValueError, match="row 1: expected the keys"):  # other faults stay faults
        load_preference_rows([ROW, {"prompt": "Q"}], skip_equal=True)
