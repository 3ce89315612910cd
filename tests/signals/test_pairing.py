# SPDX-License-Identifier: Apache-2.0
"""Step preferences traced from a model: candidates, their values, pairs, rows, divergence.

Mutations that turned a test red: no gap asked for (test_only_within_a_node_and_above_the_gap); no discount
(test_values_of_greedy_continuations); rollouts that share the number of steps alone taken for one state
(test_steps_are_compared_after_the_same_tokens_alone); the divergence always at the first token
(test_of_tokenized_rows).
"""

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
from helpers.paths import DOCS
from helpers.tokenizer import byte_tokenizer

from sspo_ext.data.rows import load_preference_rows
from sspo_ext.data.tokenize import UnusableRow, tokenize_row
from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses.pref import step_pref_loss
from sspo_ext.signals.pairing.candidates import step_end, trace_candidates
from sspo_ext.signals.pairing.node import Candidate, Node
from sspo_ext.signals.pairing.pairs import divergence_index, divergence_weights, pair_candidates, pair_rows
from sspo_ext.signals.pairing.rollouts import nodes_from_rollouts
from sspo_ext.signals.values import StepBatch

TOKENIZER = byte_tokenizer()


def ids(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


class Scripted(nn.Module):
    """Says what a script holds for the text so far: {the text's end: {continuation: probability}}, a byte at a time;
    where nothing fits, the end of sequence. Probabilities of continuations are exact if their first bytes differ."""

    def __init__(self, script):
        super().__init__()
        self.script, self.config = script, SimpleNamespace(eos_token_id=0)

    def options(self, text):
        found = {}
        for end, continuations in self.script.items():
            for continuation, p in continuations.items():
                whole = end + continuation
                for n in range(len(continuation)):
                    if text.endswith(whole[: len(end) + n]):
                        found.setdefault(len(end) + n, {}).setdefault(whole[len(end) + n], 0.0)
                        found[len(end) + n][whole[len(end) + n]] += p if n == 0 else 1.0
        return found[max(found)] if found else {}

    def forward(self, input_ids):
        logits = torch.full((*input_ids.shape, len(TOKENIZER)), -torch.inf)
        for b, row in enumerate(input_ids.tolist()):
            for t in range(len(row)):
                options = self.options(TOKENIZER.decode(row[: t + 1]))
                for text, p in options.items():
                    logits[b, t, ids(text)[0]] = torch.tensor(p).log()
                if not options:
                    logits[b, t, 0] = 0.0
        return SimpleNamespace(logits=logits)


# After the question: a right step (p = .5), a detour that comes right (.25), a wrong step (.25).
SCRIPT = {
    "Q\n": {"a\n": 0.5, "detour\n": 0.25, "x\n": 0.25},
    "Q\na\n": {"A: 7": 1.0},
    "detour\n": {"a\n": 1.0},
    "detour\na\n": {"A: 7": 1.0},
    "Q\nx\n": {"A: 8": 1.0},
    "P:": {" ": 1.0},
    "P: ": {"7": 0.1, "9": 0.9},
}
BATCH = StepBatch([ids("Q\n")], [[ids("a\n"), ids("A: 7")]])


def trace(**options):
    arguments = {
        "grader": lambda text, answer: float(text.endswith(f"A: {answer}")), "num_candidates": 30,
        "max_continuation_tokens": 20, "states": [(0, 0)],
    } | options  # fmt: skip
    answers = arguments.pop("answers", ["7"])
    return trace_candidates(Scripted(SCRIPT), TOKENIZER, BATCH, answers, **arguments)


class TestCandidates:
    def test_values_of_greedy_continuations(self):
        (node,) = trace()
        assert (node.sequence, node.step) == (0, 0)
        assert [(c.text, round(c.value, 6)) for c in node.candidates] == [("a", 0.9), ("detour", 0.81), ("x", 0.0)]
        assert sum(c.count for c in node.candidates) == 30 and node.candidates[0].count > 8
        assert [c.continuation for c in node.candidates] == ["A: 7", "a\nA: 7", "A: 8"]
        assert [c.logp for c in node.candidates] == pytest.approx([math.log(p) for p in (0.5, 0.25, 0.25)])
        assert not any(c.ended for c in node.candidates)

    def test_a_step_that_ends_the_response_has_the_reward(self):
        (node,) = trace(states=[(0, 1)])
        assert [(c.text, c.value, c.ended, c.continuation) for c in node.candidates] == [("A: 7", 1.0, True, "")]

    def test_a_continuation_without_an_end_is_worth_nothing(self):
        (node,) = trace(max_continuation_tokens=4)
        assert [c.value for c in node.candidates] == [0.0] * 3
        (node,) = trace(max_continuation_tokens=4, final="A: 7")
        assert {c.text: c.value for c in node.candidates} == {"a": 0.9, "detour": 0.0, "x": 0.0}

    def test_a_step_without_an_end_is_dropped(self):
        (node,) = trace(max_step_tokens=3)
        assert [c.text for c in node.candidates] == ["a", "x"]

    def test_probe_and_both(self):
        script = SCRIPT | {"a\nP: ": {"7": 0.6, "9": 0.4}}
        options = {"num_candidates": 30, "states": [(0, 0)], "probe": "P:"}
        options["grader"] = lambda text, answer: float(text.endswith(f"A: {answer}"))
        (node,) = trace_candidates(Scripted(script), TOKENIZER, BATCH, ["7"], value="probe", **options)
        values = {c.text: c.value for c in node.candidates}
        assert values["a"] == pytest.approx(0.6) and values["x"] == pytest.approx(0.1)
        (node,) = trace_candidates(Scripted(script), TOKENIZER, BATCH, ["7"], value="both", probe_share=0.25, **options)
        values = {c.text: c.value for c in node.candidates}
        assert values["a"] == pytest.approx(0.25 * 0.6 + 0.75 * 0.9) and values["x"] == pytest.approx(0.025)

    def test_all_states_by_default(self):
        nodes = trace(states=None)
        assert [(n.sequence, n.step) for n in nodes] == [(0, 0), (0, 1)]
        assert [[c.text for c in n.candidates] for n in nodes] == [["a", "detour", "x"], ["A: 7"]]

    def test_where_steps_end(self):
        assert [step_end("newline")(t) for t in ("\n", "a", "a\n", "\n a\n")] == [False, False, True, True]
        assert [step_end("blank_line")(t) for t in ("\n\n", "a\n", "a\n \n", "a\n\n")] == [False, False, True, True]
        assert step_end(r"(?<=[.!?])\s+")("a. b") and not step_end(r"(?<=[.!?])\s+")("a.")
        with pytest.raises(ValueError, match="numbered"):
            step_end("numbered")

    @pytest.mark.parametrize(
        "options, message",
        (
            ({"value": "luck"}, "value: expected one of"),
            ({"grader": None}, "grader: expected a function"),
            ({"gamma": 2}, "gamma: expected"),
            ({"probe_share": -0.1}, "probe_share: expected"),
            ({"num_candidates": 0}, "num_candidates: expected"),
            ({"max_step_tokens": 0}, "max_step_tokens: expected a whole number of at least 1, got 0"),
            ({"max_continuation_tokens": 0}, "max_continuation_tokens: expected"),
            ({"temperature": -1}, "temperature: expected"),
            ({"final": "("}, r"final: '\(' is no regular expression"),
            ({"split_by": "numbered"}, "split_by: 'numbered'"),
            ({"states": [(0, 0), (0, 9)]}, r"states: .*got \(0, 9\), which has 2 steps"),
            ({"states": [(1, 0)]}, r"states: expected .* of 1 sequences, got \(1, 0\)"),
            ({"states": [(0, -1)]}, "states: expected"),
            ({"answers": []}, "answers: expected one for each of 1 sequences, got 0"),
            ({"grader": lambda text, answer: float("nan")}, "grader: expected a finite number, got nan for the resp"),
        ),
    )
    def test_errors(self, options, message):
        with pytest.raises(ValueError, match=message):
            trace(**options)


def candidate(text, value, **options):
    return Candidate(tuple(ids(text)), text, 1, False, value, **options)


NODES = [
    Node(0, 0, (candidate("good", 0.9, logp=-1.0), candidate("fair", 0.5, logp=-2.0), candidate("same", 0.49))),
    Node(1, 1, (candidate("only", 0.3),)),
    Node(1, 0, (candidate("上", 1.0), candidate("下 🙂", 0.0))),
]


class TestPairs:
    def test_only_within_a_node_and_above_the_gap(self):
        pairs = pair_candidates(NODES, min_gap=0.02)
        assert [(p.winner.text, p.loser.text) for p in pairs] == [("good", "same"), ("good", "fair"), ("上", "下 🙂")]
        assert all({p.winner, p.loser} <= set(p.node.candidates) for p in pairs)
        assert [(p.weight, p.margin) for p in pairs] == [(1.0, 0.0)] * 3
        assert len(pair_candidates(NODES, min_gap=0.0)) == 4

    def test_weights_margins_and_the_largest_gaps(self):
        pairs = pair_candidates(NODES, weight="gap", margin="gap", max_pairs=1)
        assert [(p.winner.text, p.loser.text) for p in pairs] == [("good", "same"), ("上", "下 🙂")]
        assert [p.weight for p in pairs] == pytest.approx([0.41, 1.0]) == [p.margin for p in pairs]

    @pytest.mark.parametrize("number", (-1, 0))
    def test_a_number_of_pairs_that_is_none(self, number):
        """-1 once left out the smallest gap."""
        with pytest.raises(ValueError, match=f"max_pairs: expected a whole number of at least 1, got {number}"):
            pair_candidates(NODES, max_pairs=number)

    def test_values_that_are_none(self):
        node = Node(0, 0, (candidate("good", 0.9), candidate("bad", math.nan)))
        with pytest.raises(ValueError, match="nodes: expected finite values, got nan for the candidate 'bad'"):
            pair_candidates([node])

    def test_rows_are_what_the_trainer_reads(self):
        steps = [["s0\n", "s1"], ["一\n"]]
        rows = pair_rows(pair_candidates(NODES, weight="gap"), ["Q: 0\n", "问：1\n"], steps)
        assert rows[1]["logps"] == [-1.0, -2.0] and "logps" not in rows[0]
        loaded = load_preference_rows(rows)
        assert [row["branch"] for row in loaded] == [0, 0, 0] and loaded[0]["weight"] == pytest.approx(0.41)
        feature = tokenize_row(loaded[2], TOKENIZER)
        assert TOKENIZER.decode(feature["chosen_input_ids"]) == "问：1\n上"
        later = pair_rows(
            pair_candidates([Node(0, 1, (candidate("b", 1.0), candidate("c", 0.0)))]), ["Q\n"], [["a\n", "b"]]
        )
        feature = tokenize_row(load_preference_rows(later)[0], TOKENIZER)
        assert TOKENIZER.decode(feature["rejected_input_ids"]) == "Q\na\nc"
        assert [s for s in feature["rejected_step_ids"] if s >= 0] == [0]


class TestRollouts:
    def test_steps_are_compared_after_the_same_tokens_alone(self):
        """Three rollouts of one prompt, one of another; the step "b" after "x" is in another state than after "a"."""
        steps = [["a\n", "b"], ["a\n", "c"], ["x\n", "b"], ["a\n", "d"]]
        batch = StepBatch([ids("Q\n")] * 3 + [ids("R\n")], [[ids(s) for s in some] for some in steps])
        advantages = torch.tensor([0.2, 1.0, 0.4, -1.0, -0.5, 0.7, 9.0, 9.0])
        nodes = nodes_from_rollouts(batch, advantages, TOKENIZER)
        found = [[(c.text, round(c.value, 4), c.count, c.ended) for c in n.candidates] for n in nodes]
        assert [(n.sequence, n.step) for n in nodes] == [(0, 0), (0, 1)]
        assert found == [[("a", 0.3, 2, False), ("x", -0.5, 1, False)], [("b", 1.0, 1, True), ("c", -1.0, 1, True)]]

    @pytest.mark.parametrize("order", ([0, 1, 2, 3], [1, 0, 3, 2], [3, 2, 1, 0]))
    def test_a_text_that_some_ended_with(self, order):
        """Of two rollouts one ended with "a" and one went on; both ended with "b"."""
        rollouts = [(["a"], [1.0]), (["a\n", "c"], [-1.0, 0.0]), (["b"], [0.2]), (["b"], [0.4])]
        some = [rollouts[i] for i in order]
        batch = StepBatch([ids("Q\n")] * 4, [[ids(s) for s in steps] for steps, _ in some])
        advantages = torch.tensor([a for _, of in some for a in of])
        (node,) = nodes_from_rollouts(batch, advantages, TOKENIZER)
        assert [(c.text, round(c.value, 4), c.count, c.ended) for c in node.candidates] == [
            ("b", 0.3, 2, True), ("a", 0.0, 2, False),
        ]  # fmt: skip
        (row,) = pair_rows(pair_candidates([node]), ["Q\n"] * 4, [steps for steps, _ in some])
        assert (row["chosen"], row["rejected"], row["partial"]) == (["b"], ["a\n"], True)

    def test_shape(self):
        with pytest.raises(ValueError, match="step_advantages: expected shape"):
            nodes_from_rollouts(BATCH, torch.zeros(3), TOKENIZER)


class TestDivergence:
    @pytest.mark.parametrize(
        "a, b, at", (([1, 2], [1, 3], 1), ([4], [5], 0), ([1, 2], [1, 2, 3], None), ([1], [1], None))
    )
    def test_index(self, a, b, at):
        assert divergence_index(a, b) == divergence_index(b, a) == at

    def test_weights_of_a_layout(self):
        labels = torch.tensor([[9, 4, 5, 6, 7], [9, 4, 8, 6, 7]])
        steps = torch.tensor([[-1, 0, 0, 0, 1], [-1, 0, 0, 0, -1]])
        pairs = torch.tensor([[0, 2]])
        weights = divergence_weights(labels, steps, pairs)
        assert weights.tolist() == [[0, 0, 1, 0, 0], [0, 0, 1, 0, 0]]
        layout = StepLayout.from_step_ids(labels, steps, token_weights=weights)
        logits = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
        step_pref_loss(logits, layout, pairs, beta=1.0).loss.backward()
        assert (logits.grad.abs().sum(-1) > 0).tolist() == [[False, True, False, False, False]] * 2
        assert logits.grad[0, 1, 5] < 0 < logits.grad[1, 1, 8]  # the loss falls when the winner's token rises

    @pytest.mark.parametrize(
        "labels, pairs, message",
        (
            ([[9, 4, 5], [9, 4, -100]], [[0, 1]], "beginning of the other"),
            ([[9, 4, 5], [9, 4, 6], [9, 3, 5]], [[0, 1], [0, 2]], "step 0 first differs in one place"),
            ([[9, 4, 5]], [[0, 1]], "pairs: expected indices below 1"),
        ),
    )
    def test_errors(self, labels, pairs, message):
        labels = torch.tensor(labels)
        steps = torch.where((labels == -100) | (labels == 9), -1, 0)
        with pytest.raises(ValueError, match=message):
            divergence_weights(labels, steps, torch.tensor(pairs))

    def test_of_tokenized_rows(self):
        row = {"prompt": "Q\n", "chosen": ["s\n", "a is 1 now"], "rejected": ["s\n", "a is 2"], "branch": 1}
        feature = tokenize_row(load_preference_rows([row])[0], TOKENIZER, token_weights="divergence")
        for side, last in (("chosen", "1"), ("rejected", "2")):
            assert TOKENIZER.decode(feature[f"{side}_input_ids"]) == f"Q\ns\na is {last}"
            assert [s for s in feature[f"{side}_step_ids"] if s >= 0] == [0]
            assert [i for i in feature[f"{side}_labels"] if i >= 0] == ids(last)
        assert feature["pairs"] == [[0, 0]]
        sequence = tokenize_row(
            load_preference_rows([row])[0], TOKENIZER, pair_by="sequence", token_weights="divergence"
        )
        assert sequence["chosen_labels"] == feature["chosen_labels"]

    def test_rows_without_a_divergence(self):
        row = {"prompt": "Q\n", "chosen": ["a b"], "rejected": ["a"], "branch": 0, "partial": True}
        with pytest.raises(UnusableRow, match="beginning of the other"):
            tokenize_row(load_preference_rows([row])[0], TOKENIZER, token_weights="divergence")
        row = {"prompt": "Q\n", "chosen": "a\nb", "rejected": "a\nc"}
        with pytest.raises(ValueError, match="token_weights: 'divergence' needs"):
            tokenize_row(load_preference_rows([row])[0], TOKENIZER, token_weights="divergence")
        with pytest.raises(ValueError, match="token_weights: expected one of"):
            tokenize_row(load_preference_rows([row])[0], TOKENIZER, token_weights="first")


def test_rows_are_json():
    assert json.loads(json.dumps(pair_rows(pair_candidates(NODES), ["Q"] * 2, [["s"]] * 2)))


def test_the_snippets_of_the_page_run():
    """docs/signals.md, as written, on a random model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=512, initializer_range=0.3, eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    scope = {"model": LlamaForCausalLM(config).eval(), "tokenizer": TOKENIZER, "answers": ["26", ["2", "two"]]}
    scope["prompts"], scope["steps"] = (
        ["6 + 13 + 7?\n", "1 + 1?\n"],
        [["6 + 13 = 19\n", "= 26\n", "#### 26"], ["#### 2"]],
    )
    scope |= {"prompt_ids": list(map(ids, scope["prompts"])), "step_ids": [list(map(ids, s)) for s in scope["steps"]]}
    page = (DOCS / "signals.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for snippet in snippets:
        exec(snippet, scope)
    assert len(snippets) == 2
    assert [len(v) for v in scope["values"].to_lists()] == [4, 2]
    assert [(n.sequence, n.step) for n in scope["nodes"]] == [(0, 2), (1, 0)] and isinstance(scope["rows"], list)
    assert scope["grader"]("so\n#### 2", scope["answers"][1]) == 1.0
