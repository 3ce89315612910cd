# SPDX-License-Identifier: Apache-2.0
"""Rows of pairs have the text that the model wrote, so that training on them sees the model's own tokens.

All were red before: the white space around a step was cut off, so " 19" became "19" behind "=", and "19\n" lost the
token of its end; and steps without a line's end got one, because `load_preference_rows` appends it.
"""

import pytest
import torch

pytest.importorskip("transformers")

from helpers.pair_rows import byte_level
from helpers.rl import make_model, make_tokenizer

from sspo_ext.data.rows import load_preference_rows
from sspo_ext.data.tokenize import tokenize_row
from sspo_ext.signals.pairing.candidates import trace_candidates
from sspo_ext.signals.pairing.node import Candidate, Node, text_after
from sspo_ext.signals.pairing.pairs import pair_candidates, pair_rows
from sspo_ext.signals.pairing.rollouts import nodes_from_rollouts
from sspo_ext.signals.values import StepBatch

TOKENIZER = byte_level(merges=[("Ġ", "1"), ("9", "Ċ")])


def ids(text, tokenizer=TOKENIZER):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def trained_on(row, side, tokenizer=TOKENIZER):
    """The tokens of a response, as training sees them."""
    feature = tokenize_row(load_preference_rows([row])[0], tokenizer)
    start = len(ids(row["prompt"], tokenizer))
    return feature[f"{side}_input_ids"][start:]


def test_of_rollouts():
    steps = [[[*ids("a b.")], [*ids(" 19\n")]], [[*ids("a b.")], [*ids(" 20\n")]]]
    rest = [ids("z"), ids("z")]
    batch = StepBatch([ids("Q =")] * 2, [[*some, end] for some, end in zip(steps, rest, strict=True)])
    (node,) = nodes_from_rollouts(batch, torch.tensor([0.0, 1.0, 0.0, 0.0, -1.0, 0.0]), TOKENIZER)
    assert [(c.text, c.written) for c in node.candidates] == [("19", " 19\n"), ("20", " 20\n")]
    (row,) = pair_rows(pair_candidates([node]), ["Q ="] * 2, [["a b.", " 19\n", "z"], ["a b.", " 20\n", "z"]])
    assert row["chosen"] == ["a b.", " 19\n"] and row["step_separator"] == "" and row["partial"]
    assert trained_on(row, "chosen") == [*steps[0][0], *steps[0][1]]
    assert trained_on(row, "rejected") == [*steps[1][0], *steps[1][1]]


def test_of_samples():
    """Whatever a random model writes after a state without a line's end, training sees the same tokens."""
    tokenizer = make_tokenizer()
    state = [ids("1=", tokenizer), ids("a:", tokenizer)]
    batch = StepBatch(state[:1], [[state[1], ids(" b", tokenizer)]])
    nodes = trace_candidates(
        make_model(scale=1.0), tokenizer, batch, ["1"], states=[(0, 1)], value="probe", num_candidates=60,
        split_by=r"(?<=[\s:])", max_step_tokens=60,
    )  # fmt: skip
    found = {c.written: c.ids for c in nodes[0].candidates}
    assert len(found) > 20 and any(text != text.strip() for text in found)
    for row in pair_rows(pair_candidates(nodes, min_gap=0.0), ["1="], [["a:", " b"]])[:100]:
        for side in ("chosen", "rejected"):
            assert trained_on({**row, "partial": True}, side, tokenizer) == [*state[1], *found[row[side][1]]]


def test_an_end_of_sequence_follows_the_text():
    pair = [Candidate((1,), t, 1, True, value, written=f" {t}\n") for t, value in (("19", 1.0), ("20", 0.0))]
    (row,) = pair_rows(pair_candidates([Node(0, 1, tuple(pair))]), ["Q"], [["a\n"]])
    assert (row["chosen"], row["partial"], "step_separator" in row) == (["a\n", " 19"], False, False)


def test_without_a_written_text_it_is_the_text():
    pair = [Candidate((1,), t, 1, False, value) for t, value in (("19", 1.0), ("20", 0.0))]
    (row,) = pair_rows(pair_candidates([Node(0, 0, tuple(pair))]), ["Q"], [[]])
    assert (row["chosen"], row["rejected"]) == (["19"], ["20"])


def test_a_tokenizer_that_drops_the_first_space():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE({"?": 0, "▁": 1, "a": 2, "=": 3, "▁a": 4}, [("▁", "a")], unk_token="?"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    assert tokenizer.decode([4]) == "a" and text_after(tokenizer, [4, 3], [4]) == " a"
    assert text_after(tokenizer, [], [4]) == "a"


def test_a_rows_own_separator():
    row = {"prompt": "Q", "chosen": ["a", "b"], "rejected": ["a", "c"]}
    assert load_preference_rows([{**row, "step_separator": ""}])[0]["chosen"] == ["a", "b"]
    assert load_preference_rows([{**row, "step_separator": " "}])[0]["chosen"] == ["a ", "b"]
    assert load_preference_rows([row])[0]["chosen"] == ["a\n", "b"]
    with pytest.raises(ValueError, match="row 0: step_separator: expected a text, got 1"):
        load_preference_rows([{**row, "step_separator": 1}])
