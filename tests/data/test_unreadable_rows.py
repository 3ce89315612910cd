# SPDX-License-Identifier: Apache-2.0
"""Rows that no tokenizer, no float and no parser can read: one sentence with file and line, in all three commands.

All were red before: a TypeError of the tokenizer, a RecursionError, an OverflowError, a NaN loss (1e300).
"""

import json

import pytest

pytest.importorskip("transformers")

from helpers.pair_rows import byte_level

from sspo_ext.data.chat import chat_options, with_words
from sspo_ext.data.collator import StepPreferenceCollator
from sspo_ext.data.prompts import check_rows, load_prompt_rows
from sspo_ext.data.rows import load_preference_rows
from sspo_ext.data.tokenize import tokenize_rows
from sspo_ext.tracing.chains import load_chains

TOKENIZER = byte_level()
ROW = {"prompt": "Q\n", "chosen": "a", "rejected": "b", "response": "a", "answer": "5", "reward": 1}
HALF = "5\ud800"  # what json.loads makes of "5\\ud800"
LOADERS = {
    "train": lambda source: tokenize_rows(load_preference_rows(source), TOKENIZER),
    "rl": lambda source: check_rows("data", load_prompt_rows(source), chat=True, texts=True, tokenizer=TOKENIZER),
    "trace": lambda source: load_chains(source, TOKENIZER),
}


@pytest.fixture(params=LOADERS)
def load(request):
    return LOADERS[request.param]


@pytest.mark.parametrize(
    "loader, column",
    (
        *(("train", name) for name in ("prompt", "chosen", "rejected")),
        *(("rl", name) for name in ("prompt", "answer")),
        *(("trace", name) for name in ("prompt", "response", "answer", "id")),
    ),
)
@pytest.mark.parametrize("special_tokens", ("error", "allow"))
def test_half_of_a_surrogate_pair(tmp_path, loader, column, special_tokens):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROW) + "\n" + json.dumps({**ROW, column: HALF}) + "\n")
    where = "row 1" if loader == "rl" else f"{file}:2"
    with pytest.raises(ValueError) as error:
        LOADERS[loader](str(file))
    assert f"{where}: {column}: expected Unicode text, got the lone surrogate '\\ud800' at character 1" in str(
        error.value
    )
    if column not in ("answer", "id"):  # where special tokens are allowed, too
        options = {"special_tokens": special_tokens}
        row = {**ROW, column: HALF}
        with pytest.raises(ValueError, match=f"{column}: expected Unicode text"):
            if loader == "train":
                tokenize_rows([row], TOKENIZER, **options)
            elif loader == "rl":
                check_rows("data", [row], chat=True, tokenizer=TOKENIZER, **options)
            else:
                load_chains([row], TOKENIZER, **options)


def test_a_whole_pair_is_text():
    assert tokenize_rows([{**ROW, "chosen": "🙂"}], TOKENIZER)


@pytest.mark.parametrize("opening, closing", (("[", "]"), ('{"a":', "}")))
def test_nested_too_deep(tmp_path, load, opening, closing):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROW) + '\n{"prompt": ' + opening * 100_000 + "1" + closing * 100_000 + "}\n")
    with pytest.raises(ValueError, match=r"1 of 2 rows .*:\n  .*rows.jsonl:2: not a line of JSON: nested too"):
        load(str(file))


def test_nested_deep_in_memory(load):
    """What json.loads still reads: texts are looked at without recursion, and the template's error is a bad row."""
    deep: list = ["<eos>"]
    for _ in range(100_000):
        deep = [deep]
    try:
        row = {**ROW, "prompt": [{"role": "user", "content": "Q"}], "tools": deep}
        with pytest.raises(ValueError, match="row 0: tools: expected a text, got one that spells the special token"):
            load([row])
    finally:
        while deep and isinstance(deep[0], list):  # else freeing it would recurse
            deep = deep[0]
    with pytest.raises(ValueError, match="^tools: expected a list, or one in JSON: maximum recursion"):
        chat_options({"tools": "[" * 100_000 + "]" * 100_000})


def test_an_object_of_several_lines(tmp_path, load):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(ROW, indent=1))
    with pytest.raises(ValueError) as error:
        load(str(file))
    assert str(error.value).endswith(
        ": expected JSON lines, one object on each line, or one array, got an object of several lines; jq -c '.' FILE "
        "writes lines"
    )


def test_an_array_is_read_by_all_commands(tmp_path, load):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([ROW, ROW], indent=1))
    assert len(load(str(file))) == 2


@pytest.mark.parametrize("value", (10**400, -(10**400), 1e300, 3.5e38, float("inf"), float("nan"), True, "1"))
@pytest.mark.parametrize("name", ("weight", "margin"))
def test_numbers_that_float32_has_not(name, value):
    with pytest.raises(ValueError, match=f"row 0: {name}: expected a finite number") as error:
        load_preference_rows([{**ROW, name: value}])
    assert len(str(error.value)) < 200
    if isinstance(value, float):
        (feature,) = tokenize_rows([ROW], TOKENIZER, pair_by="sequence")
        with pytest.raises(ValueError, match=f"^{name}: expected a finite number of float32, got .* in here:3"):
            StepPreferenceCollator(0)([feature, {**feature, name: value, "source": "here:3"}])


def test_a_number_of_5000_digits(tmp_path, load):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROW)[:-1] + ', "weight": ' + "9" * 5000 + "}\n")
    with pytest.raises(ValueError, match=r"rows.jsonl:1: not a line of JSON: Exceeds the limit"):
        load(str(file))


def test_the_largest_number_is_one():
    (row,) = load_preference_rows([{**ROW, "weight": 3.4e38, "margin": -3.4e38}])
    assert (row["weight"], row["margin"]) == (3.4e38, -3.4e38)


@pytest.mark.parametrize("source", (5, None, ROW), ids=("int", "None", "one row"))
def test_a_source_that_is_no_list(source):
    """One row alone was read as the paths "prompt", "chosen", ..."""
    with pytest.raises(TypeError, match="^source: expected a path, several paths, or a list of mappings, got "):
        load_preference_rows(source)


@pytest.mark.parametrize(
    "rows, error, message",
    (
        ("rows.jsonl", TypeError, "^rows: expected the rows that load_preference_rows returns, got 'rows.jsonl'"),
        (ROW, TypeError, "^rows: expected the rows that load_preference_rows returns"),
        ([{"prompt": "a"}], ValueError, "row 0: expected prompt, chosen and rejected, got no chosen; load_preference"),
        (["a"], ValueError, "row 0: expected a mapping with prompt, chosen and rejected, got 'a'"),
        ([{**ROW, "rejected": 5}], ValueError, "row 0: rejected: expected a text or a list of steps, got 5"),
        ([{**ROW, "chosen": [1]}], ValueError, "row 0: chosen: expected a text or a list of steps"),
        ([{**ROW, "prompt": 5}], ValueError, "row 0: prompt: expected a text or chat messages, got 5"),
    ),
)
def test_rows_of_another_form(rows, error, message):
    """They were an AttributeError, a KeyError or a TypeError from inside."""
    with pytest.raises(error, match=message):
        tokenize_rows(rows, TOKENIZER)


def test_rows_of_prompts_of_another_form():
    for rows, message in (([], "^data: expected at least one row, got none"), (["a"], "row 0: expected a mapping")):
        with pytest.raises(ValueError, match=message):
            check_rows("data", rows, chat=True)


def test_a_message_without_content():
    """Beside calls of tools the content may be missing. It was a KeyError."""
    calls = {"role": "assistant", "tool_calls": []}
    assert with_words([calls], "a")[-1]["content"] == "a"
    assert with_words([{**calls, "content": None}], "a")[-1]["content"] == "a"
