# SPDX-License-Identifier: Apache-2.0
"""`sspo-ext trace`, file to file: chains in, values, pairs and pictures out, killed and resumed.

Mutation of sspo_ext/train/lines.py that turned a test red: a torn last line is not cut off
(test_what_was_written_whole_is_found).
"""

import json
import re
from html.parser import HTMLParser

import pytest

pytest.importorskip("transformers")
from helpers.tracing import ROWS, TOKENIZER, chain, read, trace

from sspo_ext.data.graders import exact_grader
from sspo_ext.data.rows import load_preference_rows
from sspo_ext.tracing import lines
from sspo_ext.tracing.chains import load_chains
from sspo_ext.tracing.lines import LineStore
from sspo_ext.tracing.page import write_page
from sspo_ext.tracing.picture import draw_chain, shade, signed, wrap


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "chains.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


class TestCommand:
    def test_values_and_advantages(self, model, data, tmp_path, capsys):
        assert trace(model, data, tmp_path / "out", "--gamma", "1", "--probe", "####") == 0
        rows = read(tmp_path / "out" / "values.jsonl")
        assert [row["key"] for row in rows] == ["sum", "和", "none", "wrong"]
        assert [row["reward"] for row in rows] == [1.0, 0.5, 0.0, 0.0]
        assert [len(row["values"]) for row in rows] == [3, 3, 1, 3]
        assert rows[0]["steps"] == ["2 + 3 = 5\n", "#### 5"] and rows[1]["steps"] == ["二加三是五 🙂\n", "#### 5"]
        for row in rows:
            v = row["values"]
            assert all(0 < x < 1 for x in v)
            after = [*v[1:-1], row["reward"]]  # the last step has the reward in place of its value
            expected = [b - a for a, b in zip(v[:-1], after, strict=False)]
            assert row["advantages"] == pytest.approx(expected, abs=3e-6)
        assert not list((tmp_path / "out").glob("*.part")) and "4 chains, 6 steps" in capsys.readouterr().out

    def test_killed_and_resumed_is_the_same(self, model, data, tmp_path, monkeypatch, capsys):
        options = ("--batch-size", "1", "--pairs", "sampled", "--num-candidates", "4", "--max-step-tokens", "40")
        options += ("--value", "probe", "--min-gap", "0", "--split-by", r"(?<=[a-z0-9])")
        assert trace(model, data, tmp_path / "whole", *options) == 0
        written = []
        add = LineStore.add

        def dies(self, rows):
            if len(written) in (2, 5):
                written.append(None)
                raise KeyboardInterrupt
            written.append(add(self, rows))

        monkeypatch.setattr(LineStore, "add", dies)
        out = tmp_path / "out"
        assert trace(model, data, out, *options) == 130
        assert "trace: interrupted; give the same command with --resume to go on" in capsys.readouterr().err
        assert not (out / "values.jsonl").exists()
        with open(out / "values.jsonl.part", "ab") as file:
            file.write(b'{"key": "none", "val')  # torn by the kill
        assert trace(model, data, out, *options) == 2  # not without --resume
        assert trace(model, data, out, "--resume", *options) == 130
        assert trace(model, data, out, "--resume", *options) == 0
        assert len(written) == 2 + 8  # 4 chains' values and 4 chains' pairs once each, and two deaths
        for name in ("values.jsonl", "pairs.jsonl"):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        pairs = load_preference_rows(out / "pairs.jsonl")
        assert pairs and all(row["branch"] is not None for row in pairs)

    def test_other_settings_are_not_mixed(self, model, data, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(LineStore, "finish", lambda self, order: (_ for _ in ()).throw(OSError("disk full")))
        assert trace(model, data, tmp_path / "out") == 2
        assert trace(model, data, tmp_path / "out", "--resume", "--probe", "zh") == 2
        assert "begun with other settings (probe)" in capsys.readouterr().err

    def test_pairs_of_the_chains_themselves(self, model, data, tmp_path):
        assert trace(model, data, tmp_path / "out", "--pairs", "chains", "--weight", "gap", "--min-gap", "0") == 0
        (row,) = read(tmp_path / "out" / "pairs.jsonl")
        assert sorted([row["chosen"], row["rejected"]]) == [["2 + 3 = 5\n"], ["2 + 3 = 6\n"]] and row["branch"] == 0
        assert row["weight"] == pytest.approx(row["values"][0] - row["values"][1], abs=2e-6)

    def test_pictures(self, model, data, tmp_path):
        pytest.importorskip("matplotlib")
        assert trace(model, data, tmp_path / "out", "--plot", "2") == 0
        names = sorted(path.name for path in (tmp_path / "out").iterdir())
        assert names == ["chain_001.png", "chain_002.png", "chains.html", "values.jsonl", "values.jsonl.settings"]

    @pytest.mark.parametrize(
        "more, message",
        (
            (("--split-by", "word"), "by: 'word' is none of"),
            (("--grader", "luck"), "grader: expected"),
            (("--probe", "jp"), "probe: expected a language"),
            (("--max-length", "3"), "--data: no chain of at most 3 tokens"),
            (("--pairs", "sampled", "--split-by", "numbered"), "numbered"),
        ),
    )
    def test_mistakes_are_one_message(self, model, data, tmp_path, capsys, more, message):
        assert trace(model, data, tmp_path / "out", *more) == 2
        assert message in capsys.readouterr().err

    def test_a_missing_file(self, model, tmp_path, capsys):
        assert trace(model, str(tmp_path / "no.jsonl"), tmp_path / "out") == 2
        assert "--data" in capsys.readouterr().err


class TestChains:
    def test_rows_that_are_wrong_are_named_together(self):
        rows = [
            {"response": "a", "answer": "1"},
            {"prompt": "Q", "response": "a"},
            {"prompt": "Q", "response": 3, "answer": "1"},
            {"prompt": "Q", "response": ["a", ""], "answer": "1"},
            {"prompt": "Q", "response": "a", "answer": "1"},
        ]
        with pytest.raises(ValueError) as error:
            load_chains(rows, TOKENIZER)
        reasons = ("prompt: expected", "answer: expected", "response: expected a text or a list", "reward: expected")
        for part in ("5 of 5 rows", "response: expected a text, or a list of steps with text in each", *reasons):
            assert part in str(error.value)

    @pytest.mark.parametrize(
        "given, reward",
        (
            ({"reward": None, "is_correct": True}, 1.0),
            ({"reward": 0.0, "is_correct": True}, 0.0),
            ({"reward": 0.25, "is_correct": None}, 0.25),
            ({"reward": None, "is_correct": None}, 0.5),
            ({"reward": float("nan")}, None),
            ({"reward": -1.5}, None),
            ({"reward": 2}, None),
        ),
    )
    def test_a_null_is_no_reward(self, given, reward):
        """Data sets write nulls into the columns that some of their rows do not have."""
        rows = [{"prompt": "Q\n", "response": "a", "answer": "1", **given}]
        if reward is None:
            with pytest.raises(ValueError, match=r"reward: expected a number in \[0, 1\]"):
                load_chains(rows, TOKENIZER, grader=lambda p, c, a: 0.5)
        else:
            assert load_chains(rows, TOKENIZER, grader=lambda p, c, a: 0.5)[0][0].reward == reward

    def test_a_grader_of_trls_form_has_the_columns(self):
        seen = []

        def grader(prompts, completions, answer, level, **_):
            seen.append((prompts, completions, answer, level))
            return [0.25]

        row = chain(1) | {"level": 3, "response": "1\n2"}
        row.pop("reward", None), row.pop("is_correct", None)
        (found,), _ = load_chains([row], TOKENIZER, grader=grader)
        assert found.reward == 0.25
        assert seen == [([row["prompt"]], ["".join(found.steps)], [row["answer"]], [3])]

    def test_tokens_are_the_texts(self):
        chains, long = load_chains(ROWS, TOKENIZER, grader=exact_grader())
        assert not long
        for found in chains:
            assert [TOKENIZER.decode(ids) for ids in found.step_ids] == found.steps
            assert TOKENIZER.decode(found.prompt_ids) == found.prompt

    def test_long_ones_are_told(self):
        chains, long = load_chains(ROWS, TOKENIZER, grader=exact_grader(), max_length=20)
        assert [c.source for c in chains] == ["none"] and long == ["sum", "和", "wrong"]


class TestLineStore:
    def test_what_was_written_whole_is_found(self, tmp_path):
        store = LineStore(tmp_path / "a.jsonl", {"x": 1}, resume=False)
        store.add([{"key": "一"}, {"key": "b"}])
        with open(store.part, "ab") as file:
            file.write(b'{"key": "c"}')  # whole, but without its end of line
        again = LineStore(tmp_path / "a.jsonl", {"x": 1}, resume=True)
        assert list(again.rows) == ["一", "b"]
        again.add([{"key": "c", "n": 2}])
        again = LineStore(tmp_path / "a.jsonl", {"x": 1}, resume=True)
        assert again.rows["c"] == {"key": "c", "n": 2}
        assert again.finish(["c", "b", "一"])[0] == {"key": "c", "n": 2}
        assert [row["key"] for row in read(tmp_path / "a.jsonl")] == ["c", "b", "一"]
        with pytest.raises(ValueError, match=r"other settings \(x\)"):
            LineStore(tmp_path / "a.jsonl", {"x": 2}, resume=True)
        done = LineStore(tmp_path / "a.jsonl", {"x": 1}, resume=True)
        assert done.complete and len(done.finish(["一"])) == 1
        with pytest.raises(ValueError, match="another run"):
            LineStore(tmp_path / "a.jsonl", {"x": 1}, resume=False)

    @pytest.mark.parametrize("text", ("a\u2028b", "a\u2029b", "a\x85b", "a\rb\x0b\x0c\x1c", "最终 🙂"))
    def test_any_text_comes_back(self, tmp_path, text):
        settings, rows = {"probe": text}, {"x": {"key": "x", "text": text}, "y": {"key": "y", "text": "b"}}
        LineStore(tmp_path / "a.jsonl", settings, resume=False).add(rows.values())
        again = LineStore(tmp_path / "a.jsonl", settings, resume=True)
        assert again.rows == rows and again.finish(["y", "x"])
        again = LineStore(tmp_path / "a.jsonl", settings, resume=True)
        assert again.complete and again.rows == rows

    def test_a_file_is_whole_or_not_there(self, tmp_path, monkeypatch):
        lines.write_lines(tmp_path / "a.jsonl", [{"a": 1}])
        monkeypatch.setattr(lines.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError):
            lines.write_lines(tmp_path / "a.jsonl", [{"a": 2}])
        assert read(tmp_path / "a.jsonl") == [{"a": 1}]


class TestPictures:
    @pytest.mark.parametrize("steps", (0, 3, 90))
    def test_draws_any_length(self, tmp_path, steps):
        image = pytest.importorskip("matplotlib.image")
        draw_chain(chain(steps), tmp_path / "a.png")
        height, width = image.imread(tmp_path / "a.png").shape[:2]
        assert width > 1000 and 100 < height < 4000

    def test_the_colours_follow_the_advantages(self, tmp_path):
        image = pytest.importorskip("matplotlib.image")
        row = chain(2, advantages=[0.5, -0.5], steps=["good\n", "bad\n"])
        draw_chain(row, tmp_path / "a.png")
        column = (image.imread(tmp_path / "a.png")[:, 700, :3] * 255).round().astype(int).tolist()
        found = ["#" + "".join(f"{c:02x}" for c in pixel) for pixel in column]
        assert shade(1) in found and shade(-1) in found and found.index(shade(1)) < found.index(shade(-1))

    def test_shades_and_numbers(self):
        assert shade(0) == "#f4f2ee" and len({shade(x / 4) for x in range(-4, 5)}) == 9
        assert [signed(x) for x in (0.123, -0.5, -0.001)] == ["+0.12", "\u22120.50", "0.00"]

    def test_lines_are_broken_by_columns(self):
        assert wrap("aa bb cc\n\ndd", 5) == ["aa bb", "cc", "dd"]
        assert wrap("一二三四五六", 5) == ["一二", "三四", "五六"]
        assert wrap("abcdefgh", 3) == ["abc", "def", "gh"] and wrap("", 5) == [""]
        assert "".join(wrap("word " * 40 + "三四" * 30, 30)).replace(" ", "") == "word" * 40 + "三四" * 30


class TestPage:
    class Reader(HTMLParser):
        def __init__(self):
            super().__init__()
            self.tags, self.links, self.open, self.text = [], [], [], ""

        def handle_starttag(self, tag, attributes):
            self.tags.append(tag)
            self.links += [value for name, value in attributes if name in ("src", "href")]
            if tag not in ("meta", "input", "path", "polygon", "polyline", "circle", "br"):
                self.open.append(tag)

        def handle_endtag(self, tag):
            if tag not in ("path", "polygon", "polyline", "circle"):
                assert self.open.pop() == tag

        def handle_data(self, data):
            self.text += data

    def test_is_one_whole_file_with_all_of_the_text(self, tmp_path):
        rows = [chain(k, reward=float(k % 2)) for k in (0, 1, 30)]
        write_page(rows, tmp_path / "a.html", title="<Title>")
        page = (tmp_path / "a.html").read_text(encoding="utf-8")
        reader = self.Reader()
        reader.feed(page)
        assert not reader.open and not reader.links and "script" not in reader.tags
        assert "url(" not in page and "@import" not in page and "http" not in re.sub(r"xmlns=\S+", "", page)
        assert reader.text.count("<script>一</script> $y_1$") == 31 and "问 <b>&</b> $x$ 🙂" in reader.text
        assert reader.tags.count("details") == 3
