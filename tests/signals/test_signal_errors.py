# SPDX-License-Identifier: Apache-2.0
"""Probes: what cannot be used, or has no effect, is an error that names it, and so is what is not a number.

All were red on the code without these checks but the answers [] and [None], the rotary positions and the grader of NaN,
which have to stay as they are. There, an int or blank answer, a table of positions at its end, and NaN logits were
"'int' object is not iterable", a value, an IndexError, and the value 0.
"""

import inspect
import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
from helpers.probing import BATCH, Knows, Letters
from helpers.tokenizer import byte_tokenizer

from sspo_ext.signals.branches.branch import Branch
from sspo_ext.signals.branches.sample import sample_branches
from sspo_ext.signals.branches.score import branch_logps
from sspo_ext.signals.pairing.candidates import CandidateOptions, trace_candidates
from sspo_ext.signals.pairing.pairs import PairOptions, pair_candidates
from sspo_ext.signals.probing.options import ProbeOptions
from sspo_ext.signals.probing.probe import probe_step_values
from sspo_ext.signals.values import StepBatch

TOKENIZER = byte_tokenizer()
GRADED = {"mode": "graded", "tokenizer": Letters(), "grader": lambda text, answer: 1.0}


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module", params=("gpt2", "opt"))
def table(request):
    """Models that look their positions up, 32 of them."""
    from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    if request.param == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=32, n_positions=32, n_embd=16, n_layer=1, n_head=2, eos_token_id=0, bos_token_id=0)
        ).eval()
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=50, max_position_embeddings=32, hidden_size=16, ffn_dim=16, num_hidden_layers=1,
            num_attention_heads=2, word_embed_proj_dim=16, eos_token_id=0, pad_token_id=1, bos_token_id=0,
        )
    ).eval()  # fmt: skip


@pytest.mark.parametrize("answer", ("  ", ["4", " \n"], "", None, True, 3.5j, [], [None]))
def test_answers_that_are_none(llama, answer):
    batch = StepBatch([TOKENIZER("Q").input_ids], [[]])
    with pytest.raises(ValueError, match="answers: expected .* for sequence 0"):
        probe_step_values(llama, batch, "en", [answer], tokenizer=TOKENIZER)


def test_a_number_is_its_text(llama):
    batch = StepBatch([TOKENIZER("Q").input_ids] * 2, [[], []])
    for number, text in ((42, "42"), (0.5, "0.5")):
        one, other = probe_step_values(llama, batch, "en", [number, text], tokenizer=TOKENIZER).to_lists()
        assert one == other
    with pytest.raises(ValueError, match="answers: expected .*got 3 for sequence 0"):  # or the token 3?
        probe_step_values(Knows(), BATCH, [2], [3, 4])


@pytest.mark.parametrize(
    "options, name",
    (
        ({"grader": lambda text, answer: 1.0}, "grader"),
        ({"num_samples": 3}, "num_samples"),
        ({"max_answer_tokens": 3}, "max_answer_tokens"),
        ({"temperature": 0.0}, "temperature"),
        (GRADED | {"reduce": "mean"}, "reduce"),
    ),
)
def test_options_without_effect(options, name):
    with pytest.raises(ValueError, match=f"{name}: has no effect with mode"):
        probe_step_values(Knows(), BATCH, [2], [[7], [7]], **options)


@pytest.mark.parametrize("options", ({"num_samples": 0}, {"num_samples": 2.5}, {"max_answer_tokens": 0}, {"seed": -1}))
def test_numbers_that_are_none(options):
    (name,) = options
    with pytest.raises((TypeError, ValueError), match=f"{name}: expected a whole number"):
        probe_step_values(Knows(), BATCH, [2], ["", ""], **GRADED, **options)


def test_positions_end(table):
    """31 tokens and an answer fit; one more does not, and is told before the model is run."""
    probe, answer = [5, 6], [7]
    fits, long = (StepBatch([[3] * 10], [[[4] * n]]) for n in (20, 21))
    options = {"tokenizer": None, "engine": "separate"}
    assert len(probe_step_values(table, fits, probe, [answer], **options).values) == 2
    message = r"trunks: expected at most 32 tokens .* which is where the positions of \w+ end, got 33"
    for engine in ("separate", "cached", "auto"):
        with pytest.raises(ValueError, match=message):
            probe_step_values(table, long, probe, [answer], tokenizer=None, engine=engine)
    branch = Branch(0, 30, [5])
    assert len(sample_branches(table, [[3] * 30], [branch], 1, max_new_tokens=2, engine="separate")[0][0]) == 2
    with pytest.raises(ValueError, match=message):
        sample_branches(table, [[3] * 30], [branch], 1, max_new_tokens=3, engine="separate")


def test_rotary_positions_do_not_end(llama):
    assert len(branch_logps(llama, [[3] * 40], [Branch(0, 40, [5])]).tokens) == 1


class Broken(Knows):
    def forward(self, input_ids, attention_mask=None):
        return SimpleNamespace(logits=super().forward(input_ids).logits * math.nan)


@pytest.mark.parametrize("temperature", (0.0, 0.6))
def test_a_model_of_nan_is_not_worth_nothing(temperature):
    with pytest.raises(ValueError, match="model: expected finite logits, got NaN"):
        probe_step_values(Broken(), BATCH, [2], ["", ""], **GRADED, temperature=temperature)
    with pytest.raises(ValueError, match="values: expected finite values, got nan"):
        probe_step_values(Broken(), BATCH, [2], [[7], [7]])


def test_a_grader_of_nan():
    with pytest.raises(ValueError, match=r"grader: expected grades in \[0, 1\], got nan"):
        probe_step_values(Knows(), BATCH, [2], ["", ""], **GRADED | {"grader": lambda text, answer: math.nan})


@pytest.mark.parametrize(
    "options, function",
    [(ProbeOptions, probe_step_values), (CandidateOptions, trace_candidates), (PairOptions, pair_candidates)],
)
def test_options_have_the_functions_defaults(options, function):
    """The defaults are written in the public signature and in the options."""
    theirs = {name: p.default for name, p in inspect.signature(function).parameters.items()}
    ours = {name: p.default for name, p in inspect.signature(options).parameters.items()}
    assert ours and ours == {name: theirs[name] for name in ours}
