"""Rows, tokens, pairs and batches: what the trainer is fed, on small tokenizers trained here.

Mutations, each caught by the test named:
  labels shifted by one, or prompt tokens scored                  test_tokens_labels_and_steps
  end of sequence as a step of its own, or on a partial answer    test_tokens_labels_and_steps, test_partial_has_no_eos
  response tokenized apart from the prompt without need           test_prompt_and_response_are_one_text
  pairs of the collator not offset by the rejected rows           test_padded_and_packed_agree
  reference sums in the features' order, not the layout's         test_reference_sums_follow_the_layout
  stop at the first bad row                                       test_all_bad_rows_are_named
"""

import json
import logging
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.models.gsm8k import load_gsm8k_solutions
from sspo_ext.data.collator import StepPreferenceCollator
from sspo_ext.data.rows import load_preference_rows
from sspo_ext.data.tokenize import UnusableRow, tokenize_row, tokenize_rows
from sspo_ext.signals.split import split_text

transformers = pytest.importorskip("transformers")

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
USER = [{"role": "user", "content": "p"}]
LINES = [
    "Question: 3 + 4?\nAnswer:\n3 + 4 = 7\nA: 7\n",
    "第一步：计算。\n\n答案 42 😀\n",
    "Step 1: add\nStep 2: halve\n",
]


def _byte_level(bos=None, merges=()):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate(["<eos>", "<pad>", "<bos>", *letters, *(a + b for a, b in merges)])}
    tok = Tokenizer(models.BPE(vocab, list(merges)))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = decoders.ByteLevel()
    if bos:
        tok.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tok, eos_token="<eos>", pad_token="<pad>", bos_token="<bos>", chat_template=CHAT
    )


@pytest.fixture(scope="module")
def tok():
    return _byte_level()


def row(chosen="a\nb\nc", rejected="a\nx\nc", prompt="Q:\n", **more):
    return load_preference_rows([{"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}])[0]


def steps_of(feature, side, tok):
    """The text of each scored step."""
    ids, steps, labels = (feature[f"{side}_{name}"] for name in ("input_ids", "step_ids", "labels"))
    assert len(ids) == len(steps) == len(labels)
    assert all(
        (label == i) if step >= 0 else (label == -100) for i, step, label in zip(ids, steps, labels, strict=True)
    )
    return [tok.decode([i for i, s in zip(ids, steps, strict=True) if s == k]) for k in range(max(steps) + 1)]


def write(path, lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), "utf-8")
    return path


# ---- rows


def test_forms_of_a_row(tmp_path):
    file = write(
        tmp_path / "a.jsonl",
        [
            "\ufeff" + json.dumps({"prompt": "p", "chosen": "a\u2028b", "rejected": "c", "weight": 2, "other": [1]}),
            "",
            {"prompt": "p", "chosen": ["a", "b\n", "c"], "rejected": ["a", "d"], "branch": 1, "margin": 0.5},
            {"prompt": "p", "initial_reason_steps": "Step 1: a\nStep 2:", "chosen": " b", "rejected": " c"},
            {"prompt": USER, "chosen": [{"role": "assistant", "content": "a"}], "rejected": "b"},
            {
                "chosen": [*USER, {"role": "assistant", "content": "a"}],
                "rejected": [*USER, {"role": "assistant", "content": "b"}],
            },
        ],
    )  # fmt: skip
    rows = load_preference_rows(file)
    assert rows == load_preference_rows([str(file)])
    assert [r["source"].rsplit(":", 1)[1] for r in rows] == ["1", "3", "4", "5", "6"]
    before = "Step 1: a\nStep 2:"
    common = {"prompt": "p", "branch": None, "partial": False, "weight": 1.0, "margin": 0.0}
    chat = {**common, "prompt": USER, "chosen": "a", "rejected": "b"}
    assert [{k: v for k, v in r.items() if k != "source"} for r in rows] == [
        {**common, "chosen": "a\u2028b", "rejected": "c", "weight": 2.0},
        {**common, "chosen": ["a\n", "b\n", "c"], "rejected": ["a\n", "d"], "branch": 1, "margin": 0.5},
        {**common, "chosen": [before, " b"], "rejected": [before, " c"], "branch": 1, "partial": True},
        chat,
        chat,
    ]  # fmt: skip
    assert load_preference_rows([{"prompt": "p", "chosen": ["a", "b"], "rejected": "c"}], step_separator=" ")[0][
        "chosen"
    ] == ["a ", "b"]


def test_all_bad_rows_are_named(tmp_path):
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    bad = {
        "{": "not a line of JSON",
        "[1]": "expected a JSON object, got list",
        json.dumps({"prompt": "p", "chosen": "a"}): "got no rejected",
        json.dumps({"completion": 1}): "got no prompt and no chosen and no rejected",
        json.dumps({**good, "rejected": " "}): "rejected: expected a text, got an empty one",
        json.dumps({**good, "prompt": 3}): "prompt: expected a text, got int",
        json.dumps({**good, "chosen": ["a", ""]}): "chosen: step 1: expected a text, got an empty one",
        json.dumps({**good, "chosen": []}): "chosen: expected at least one step",
        json.dumps({**good, "rejected": "a"}): "the same text",
        json.dumps({**good, "chosen": ["a"], "branch": 1}): "branch: expected less than the 1 steps of chosen, got 1",
        json.dumps({**good, "branch": -1}): "branch: expected the number of shared steps, got -1",
        json.dumps({**good, "chosen": ["x", "b"], "rejected": ["y", "b"], "branch": 1}): "branch: the first 1 steps",
        json.dumps({**good, "weight": "1"}): "weight: expected a finite number, got '1'",
        json.dumps({**good, "weight": -1}): "weight: expected at least 0",
        json.dumps({**good, "margin": float("nan")}): "margin: expected a finite number",
        json.dumps({**good, "partial": 1}): "partial: expected true or false",
        json.dumps({**good, "chosen": [{"role": "assistant", "content": "a"}]}): "needs a prompt that is one too",
        json.dumps({"prompt": "p", "completions": ["a", "b"], "labels": [True]}): "labels: expected one for each of 2",
        json.dumps({"prompt": "p", "completions": ["a"], "labels": ["yes"]}): "labels: expected a list of true and",
    }  # fmt: skip
    file = write(tmp_path / "bad.jsonl", [good, *bad])
    with open(file, "ab") as f:
        f.write(b'{"prompt": "\xff"}\n')
    with pytest.raises(ValueError) as error:
        load_preference_rows(file)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{len(bad) + 1} of {len(bad) + 2} rows cannot be used:"
    for number, (line, reason) in enumerate(zip(lines[1:], bad.values(), strict=False), 2):
        assert line.startswith(f"  {file}:{number}: ") and reason in line, line
    assert lines[-1].startswith(f"  {file}:{len(bad) + 2}: not a line of JSON")
    with pytest.raises(ValueError, match="50 of 50 rows cannot be used:(.*\n){21}.*and 30 more"):
        load_preference_rows([{}] * 50)
    with pytest.raises(ValueError, match="found none"):
        load_preference_rows([])
    with pytest.raises(TypeError, match="^source: .*int"):
        load_preference_rows([3])
    with pytest.raises(FileNotFoundError):
        load_preference_rows(tmp_path / "none.jsonl")


def test_stepwise_supervision(caplog):
    rows = [
        {"prompt": "p", "completions": ["a", "b", "c"], "labels": [True, True, True]},
        {"prompt": "p", "completions": ["a", "x", "y"], "labels": [True, False, False]},
        {"prompt": "p", "completions": ["a", "z"], "labels": [True, False]},
        {"prompt": "p", "completions": ["a", "b", "d"], "labels": [1, 1, 0]},
        {"prompt": "other", "completions": ["a", "x"], "labels": [True, False]},
    ]
    with caplog.at_level(logging.WARNING):
        pairs = load_preference_rows(rows)
    assert "1 of 5 stepwise rows give no pair" in caplog.text and "row 4" in caplog.text
    assert [(p["chosen"], p["rejected"], p["branch"], p["source"]) for p in pairs] == [
        (["a\n", "b"], ["a\n", "x"], 1, "row 0 and row 1"),
        (["a\n", "b"], ["a\n", "z"], 1, "row 0 and row 2"),
        (["a\n", "b\n", "c"], ["a\n", "b\n", "d"], 2, "row 0 and row 3"),
    ]
    assert all(p["partial"] and p["prompt"] == "p" for p in pairs)
    with pytest.raises(ValueError, match="row 1: labels: step 0 is labelled true after the same steps in row 0"):
        load_preference_rows(
            [{"prompt": "p", "completions": ["a"], "labels": [label]} for label in (True, False)]
        )  # fmt: skip


def test_gsm8k_solutions(tmp_path):
    def line(i, **solutions):
        return {"question": f"q{i}", "ground_truth": "A: 1", **solutions}

    good, wrong = {"solution": "1 + 1 = 2\nA: 2", "is_correct": True}, {"solution": "A: 3", "is_correct": False}
    other = {"solution": "A: 4", "is_correct": False}
    file = write(
        tmp_path / "s.jsonl", [line(i, m=wrong, n=good, o=good, p=other) for i in range(200)] + [line(-1, m=good)]
    )
    train, held = load_gsm8k_solutions(file, held_out=0.25)
    assert len(train) + len(held) == 200 and 30 < len(held) < 70
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in held}
    assert {(r["chosen"], r["rejected"]) for r in train + held} == {("1 + 1 = 2\nA: 2", "A: 3")}
    assert train[0]["prompt"].startswith("Question: q") and train[0]["prompt"].endswith("\nAnswer:\n")
    again, _ = load_gsm8k_solutions(write(tmp_path / "t.jsonl", [line(7, m=wrong, n=good)]), held_out=0.25)
    assert bool(again) == any(r["prompt"] == "Question: q7\nAnswer:\n" for r in train)
    assert len(load_gsm8k_solutions(file, held_out=0, max_pairs=9)[0]) == 400
    assert load_gsm8k_solutions(file, held_out=0, prompt_template="{question}? ")[0][0]["prompt"] == "q0? "
    assert load_gsm8k_solutions(file, held_out=0, models=["p", "n"])[0][0]["rejected"] == "A: 4"
    with pytest.raises(ValueError, match=r"^models: expected some of .*, got \[.x.\]"):
        load_gsm8k_solutions(file, models=["n", "x"])
    write(file, [line(1, m={"solution": "a", "is_correct": 1}), line(2, m=good), {"question": "q"}])
    with pytest.raises(
        ValueError, match="2 of 3 rows(.*\n)*.*:1: m: expected is_correct(.*\n)*.*:3: expected at least"
    ):
        load_gsm8k_solutions(file)


def test_gsm8k_solutions_real_file():
    path = os.path.join(os.path.dirname(__file__), "../../shared/data/gsm8k/example_model_solutions.jsonl")
    if not os.path.exists(path):
        pytest.skip("no ../shared/data/gsm8k here")
    train, held = load_gsm8k_solutions(path)
    assert len(train) + len(held) == 731
    assert 0.15 < len(held) / 731 < 0.25


# ---- tokens


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
    merging = _byte_level(bos=True, merges=[("Ċ", "a"), ("a", "b"), (":", "Ġ")])
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
    merging = _byte_level(merges=[("Ċ", "b"), ("Ċb", "Ċ")])
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
    other = _byte_level()
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
    tok = _byte_level()
    feature = tokenize_row(row(chosen, rejected), tok, split_by=by, pair_by="sequence")
    assert steps_of(feature, "chosen", tok) == [chosen + "<eos>"]
    feature = tokenize_row(row(chosen, rejected), tok, split_by=by, skip_shared=False)
    for side, text in (("chosen", chosen), ("rejected", rejected)):
        steps = steps_of(feature, side, tok)
        texts = [text[a:b] for a, b in split_text(text, by)]
        texts[-1] += "<eos>"
        assert steps == texts[: len(steps)] and (len(steps) == len(texts) or len(feature["pairs"]) == len(steps))


# ---- batches


def features(tok, **options):
    rows = [
        row("a\nb\nc", "a\nx\nlonger line\nd", weight=2.0),
        row("5 + 5 = 10\nA: 10", "5 + 5 = 11\nA: 11", margin=0.5),
        row("😀\n\nb", "a", prompt="A longer prompt:\n"),
    ]
    return tokenize_rows(rows, tok, skip_shared=False, **options)


def scored(batch):
    """Text-free view of a batch: for every step its labels and the ids of all positions that predict them."""
    layout = batch["layout"]
    ids = batch["input_ids"].reshape(-1)
    offsets = layout.step_offsets.tolist()
    return [
        (layout.labels[a:b].tolist(), ids[layout.rows[a:b]].tolist())
        for a, b in zip(offsets[:-1], offsets[1:], strict=True)
    ]


@pytest.mark.parametrize("pair_by", ["index", "branch", "sequence"])
def test_padded_and_packed_agree(tok, pair_by):
    rows = features(tok, pair_by=pair_by)
    padded = StepPreferenceCollator(tok.pad_token_id)(rows)
    packed = StepPreferenceCollator(tok.pad_token_id, packed=True)(rows)
    assert set(padded) == {"input_ids", "attention_mask", "layout", "pairs"}
    assert set(packed) == {"input_ids", "position_ids", "layout", "pairs"}
    assert scored(padded) == scored(packed)
    assert torch.equal(padded["pairs"].index, packed["pairs"].index)
    assert torch.equal(padded["layout"].step_sequence, packed["layout"].step_sequence)
    lengths = [len(f[f"{side}_input_ids"]) for side in ("chosen", "rejected") for f in rows]
    assert padded["attention_mask"].sum(1).tolist() == lengths and packed["input_ids"].shape == (1, sum(lengths))
    assert packed["position_ids"][0].tolist() == [i for n in lengths for i in range(n)]
    assert (padded["input_ids"][padded["attention_mask"] == 0] == tok.pad_token_id).all()

    texts = [tok.decode(labels) for labels, _ in scored(padded)]
    pairs = [(texts[winner], texts[loser]) for winner, loser in padded["pairs"].index.tolist()]
    expected = [
        (c, r)
        for f in rows
        for k, j in f["pairs"]
        for c, r in [(steps_of(f, "chosen", tok)[k], steps_of(f, "rejected", tok)[j])]
    ]
    assert pairs == expected
    if pair_by == "index":
        assert ("b\n", "x\n") in pairs and len(texts) == 3 + 2 + 1 + 3 + 2 + 1
    counts = [len(f["pairs"]) for f in rows]
    weights, margins = padded["pairs"].weights, padded["pairs"].margins
    assert weights.tolist() == [2.0] * counts[0] + [1.0] * (counts[1] + counts[2])
    assert margins.tolist() == [0.0] * counts[0] + [0.5] * counts[1] + [0.0] * counts[2]


def test_loss_of_padded_and_packed_is_the_same(tok):
    from sspo_ext.losses.pref import step_pref_loss

    rows = features(tok)
    table = torch.randn(len(tok), len(tok), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = []
    for packed in (False, True):
        batch = StepPreferenceCollator(tok.pad_token_id, packed=packed, pad_to_multiple_of=8)(rows)
        assert packed or batch["input_ids"].shape[1] % 8 == 0
        logits = table[batch["input_ids"]]  # a model that looks at one token
        out.append(step_pref_loss(logits, batch["layout"], batch["pairs"], backend="reference"))
    torch.testing.assert_close(out[0].loss, out[1].loss)
    torch.testing.assert_close(out[0].step_logps, out[1].step_logps)


def test_reference_sums_follow_the_layout(tok):
    rows = features(tok)
    for i, f in enumerate(rows):
        for j, side in enumerate(("chosen", "rejected")):
            f[f"ref_{side}"] = [100.0 * j + 10 * i + k for k in range(max(f[f"{side}_step_ids"]) + 1)]
    batch = StepPreferenceCollator(tok.pad_token_id)(rows)
    expected = [100 * (s // 3) + 10 * (s % 3) for s in batch["layout"].step_sequence.tolist()]
    assert (batch["ref"] // 10 * 10).tolist() == expected and batch["ref"].dtype == torch.float32
    assert batch["ref"].shape == (batch["layout"].num_steps,)
    rows[1]["ref_rejected"] = [0.0]
    with pytest.raises(ValueError, match="^ref: expected 2 step sums for row 0, got shape"):
        StepPreferenceCollator(tok.pad_token_id)(rows)


def test_collator_errors_and_defaults(tok):
    with pytest.raises(ValueError, match="^features: "):
        StepPreferenceCollator(0)([])
    with pytest.raises(ValueError, match="labels"):
        StepPreferenceCollator(0, vocab_size=5)(features(tok))
    plain = StepPreferenceCollator(tok.pad_token_id)(tokenize_rows([row()], tok))
    assert plain["pairs"].weights is None and plain["pairs"].margins is None and "ref" not in plain
