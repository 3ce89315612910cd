# SPDX-License-Identifier: Apache-2.0
"""`sspo-ext trace`: what is wrong is told before a model is loaded, and leaves nothing behind; chats, their template's
options and their contents in parts; answers that are numbers.

All were red before but the answers that are none and --resume's case: options that do not fit failed after the model,
and some after all values, and left a file that refused the corrected run.
"""

import json
from dataclasses import replace

import pytest

pytest.importorskip("transformers")
from helpers.tokenizer import byte_tokenizer
from helpers.tracing import ROWS, TOKENIZER, chain, read, trace

from sspo_ext.data.graders import exact_grader
from sspo_ext.signals.probing.probe import probe_step_values
from sspo_ext.signals.probing.texts import as_probe
from sspo_ext.tracing.chains import load_chains, step_batch
from sspo_ext.tracing.lines import LineStore
from sspo_ext.tracing.page import write_page
from sspo_ext.tracing.picture import draw_chain, prompt_of

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "chains.jsonl", ROWS)


@pytest.mark.parametrize(
    "more, message",
    (
        (("--gamma", "2"), "--gamma: expected a number in [0, 1], got 2.0"),
        (("--lam", "-0.1"), "--lam: expected a number in [0, 1]"),
        (("--min-gap", "-1"), "min_gap: expected a finite number, 0 or above"),
        (("--pairs", "sampled", "--temperature", "-1"), "temperature: expected"),
        (("--pairs", "sampled", "--final", "("), "final: '(' is no regular expression"),
        (("--pairs", "sampled", "--split-by", "numbered"), "split_by: 'numbered'"),
        (("--num-samples", "3"), "num_samples: has no effect with mode 'likelihood'"),
        (("--mode", "graded", "--reduce", "mean"), "reduce: has no effect with mode 'graded'"),
        (("--mode", "graded", "--engine", "packed"), "engine: expected one of 'auto', 'cached', 'separate'"),
        (("--max-length", "3"), "--data: no chain of at most 3 tokens, 4 are longer"),
        (("--probe-turn",), "--probe-turn: the tokenizer has no chat template"),
        (("--resume", "--split-by", "word"), "by: 'word' is none of"),
        (("--min-gap", "0.5"), "--min-gap: has no effect without --pairs"),
        (("--weight", "gap"), "--weight: has no effect without --pairs"),
        (("--pairs", "chains", "--states", "5"), "--states: has no effect without --pairs sampled"),
        (("--final", "#"), "--final: has no effect without --pairs sampled"),
        (("--seed", "1"), "--seed: has no effect without --pairs sampled or --mode graded"),
    ),
)
def test_nothing_is_loaded_or_left(model, data, tmp_path, capsys, monkeypatch, more, message):
    loaded = []
    monkeypatch.setattr("sspo_ext.train.models.load_model", lambda *a, **k: loaded.append(a))
    assert trace(model, data, tmp_path / "out", *more) == 2
    assert message in capsys.readouterr().err and not loaded and not (tmp_path / "out").exists()


def test_an_empty_file_is_not_too_long(model, tmp_path, capsys):
    empty = write(tmp_path / "none.jsonl", [])
    assert trace(model, empty, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "--data: expected at least one chain, found none in" in error and "max-length" not in error


def test_another_runs_files_are_told_before_the_model(model, data, tmp_path, capsys, monkeypatch):
    assert trace(model, data, tmp_path / "out") == 0
    loaded = []
    monkeypatch.setattr("sspo_ext.train.models.load_model", lambda *a, **k: loaded.append(a))
    assert trace(model, data, tmp_path / "out") == 2
    assert "is there from another run" in capsys.readouterr().err and not loaded


def test_one_process_alone(model, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert trace(model, data, tmp_path / "out") == 2
    assert "trace: expected one process, got 2" in capsys.readouterr().err


@pytest.mark.parametrize("left", ("", '{"settings": {"gamma": 2}}\n', '{"settings": {"gam'))
@pytest.mark.parametrize("resume", (False, True))
def test_a_start_that_failed_is_in_nobodys_way(tmp_path, left, resume):
    (tmp_path / "a.jsonl.part").write_text(left)
    store = LineStore(tmp_path / "a.jsonl", {"gamma": 1}, resume=resume)
    store.add([{"key": "x"}])
    assert read(store.part) == [{"settings": {"gamma": 1}}, {"key": "x"}]
    assert store.finish(["x"]) == read(store.path) and not store.part.exists()


def test_nothing_is_written_before_the_first_row(tmp_path):
    store = LineStore(tmp_path / "new" / "a.jsonl", {}, resume=False)
    assert not (tmp_path / "new").exists()
    assert store.finish([]) == [] and read(store.path) == []


def test_a_chat_is_asked_in_a_turn(tmp_path, model):
    """The command's values are those of the same call; a chat's are those of the text that its template makes."""
    from transformers import AutoModelForCausalLM

    tokenizer, llama = byte_tokenizer(), AutoModelForCausalLM.from_pretrained(model)
    tokenizer.chat_template = "{% if quiet %}hush {% endif %}" + TEMPLATE
    for part in (tokenizer, llama):
        part.save_pretrained(tmp_path / "chat")
    rows = [ROWS[0] | {"prompt": p} for p in ([{"role": "user", "content": "Q"}], "hush [user]Q</s>\n[assistant]")]
    options = ("--probe-turn", "--chat-template-option", "quiet=true")
    values = []
    for number, row in enumerate(rows):
        out = tmp_path / str(number)
        assert trace(str(tmp_path / "chat"), write(tmp_path / f"{number}.jsonl", [row]), out, *options) == 0
        values.append(read(out / "values.jsonl")[0]["values"])
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    chains, _ = load_chains(rows[1:], tokenizer, grader=exact_grader())
    for turn in (True, False):
        probe = replace(as_probe("en"), turn=turn, chat_template_kwargs={"quiet": True})
        (expected,) = probe_step_values(llama, step_batch(chains), probe, ["5"], tokenizer=tokenizer).to_lists()
        assert (values[0] == pytest.approx(expected, rel=1e-4)) == turn


def test_options_of_the_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% if quiet %}hush {% endif %}" + TEMPLATE
    row = ROWS[0] | {"prompt": [{"role": "user", "content": [{"type": "text", "text": "2 + 3?"}]}]}
    for options, head in (({}, "[user]"), ({"quiet": True}, "hush [user]")):
        (found,), _ = load_chains([row], tokenizer, grader=exact_grader(), chat_template_kwargs=options)
        assert tokenizer.decode(found.prompt_ids) == f"{head}2 + 3?</s>\n[assistant]"


@pytest.mark.parametrize("answer, kept", ((5, "5"), ([5, "five"], ["5", "five"]), (0.5, "0.5"), ("5", "5")))
def test_answers_are_what_the_trainer_takes(answer, kept):
    ((found,), _) = load_chains([ROWS[0] | {"answer": answer, "reward": 1}], TOKENIZER)
    assert found.answer == kept


@pytest.mark.parametrize("answer", (None, True, "", " ", [], [None], {"answer": "5"}))
def test_answers_that_are_none(answer):
    with pytest.raises(ValueError, match="1 of 1 rows.*\n.*answer: expected a text"):
        load_chains([ROWS[0] | {"answer": answer, "reward": 1}], TOKENIZER)


def test_contents_in_parts_are_drawn(tmp_path):
    parts = [{"type": "text", "text": "问 <b>"}, {"type": "image", "url": "a.png"}]
    row = chain(2, prompt=[{"role": "user", "content": parts}, {"role": "assistant", "content": None}])
    assert prompt_of(row) == "问 <b> [image]\n"
    write_page([row], tmp_path / "a.html")
    assert "问 &lt;b&gt; [image]" in (tmp_path / "a.html").read_text(encoding="utf-8")
    pytest.importorskip("matplotlib")
    draw_chain(row, tmp_path / "a.png")


@pytest.mark.parametrize(
    "change, message",
    (
        (
            {"prompt": "Q", "answer": "5"},
            "rows.jsonl:1: expected prompt, response and answer, got no response; null st",
        ),
        (ROWS[0] | {"response": None}, "--data: expected a response with a step, found none in "),
    ),
)
def test_rows_without_a_response(model, tmp_path, capsys, change, message):
    """Exit status 0, and values of the questions alone."""
    assert trace(model, write(tmp_path / "rows.jsonl", [change]), tmp_path / "out") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_no_pair_is_said(model, tmp_path, capsys):
    rows = write(tmp_path / "rows.jsonl", [ROWS[0], ROWS[3]])
    for gap, said in (("2", True), ("0", False)):
        assert trace(model, rows, tmp_path / gap, "--pairs", "chains", "--min-gap", gap) == 0
        assert ("no two steps after the same state differ by more than --min-gap" in capsys.readouterr().out) == said


def test_a_token_without_an_embedding(tmp_path, capsys):
    """It was an IndexError."""
    from helpers.preference import make_model

    make_model().save_pretrained(tmp_path / "small")
    TOKENIZER.save_pretrained(tmp_path / "small")
    assert trace(str(tmp_path / "small"), write(tmp_path / "rows.jsonl", ROWS[:1]), tmp_path / "out") == 2
    assert "--data: 1 of 1 rows cannot be used:\n  sum: token 221 has no embedding" in capsys.readouterr().err
