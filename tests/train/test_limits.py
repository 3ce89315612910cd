# SPDX-License-Identifier: Apache-2.0
"""What a model cannot read is named before training, by dataset and row; and datasets of another form.

All were red before: an IndexError (a token without an embedding, a text longer than a table of positions), a KeyError
(raw rows), "num_samples should be a positive integer" (no rows), and a wrong hint (group_by_length).
"""

import logging

import pytest

pytest.importorskip("transformers")

import torch
from helpers import preference, rl
from helpers.launch import torchrun
from helpers.preference import OLD_TRAINER, VOCAB, config, make_features, make_model
from helpers.ranks import stream_two_ranks
from helpers.rl import ROWS, make_trainer
from helpers.tokenizer import byte_tokenizer

from sspo_ext.data.collator import StepPreferenceCollator
from sspo_ext.train.limits import Limits, check_fits, model_limits
from sspo_ext.train.preference_trainer import StepPreferenceTrainer

PAIR = {"prompt": "1 + 1 = ", "chosen": "2", "rejected": "3"}


def gpt2(positions=16, vocab=VOCAB):
    """A model with a table of positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab, n_positions=positions, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1
        )
    )


def trainer(folder, features, model=None, eval_dataset=None, **options):
    return StepPreferenceTrainer(model or make_model(), config(folder, **options), features, eval_dataset)


def with_token(feature, side, token):
    return {**feature, f"{side}_input_ids": [token, *feature[f"{side}_input_ids"][1:]]}


def test_what_models_say():
    assert model_limits(make_model()) == Limits(VOCAB, 64, fixed=False)
    assert model_limits(gpt2()) == Limits(VOCAB, 16, fixed=True)


@pytest.mark.parametrize("options", ({}, {"reference_free": True}, {"packing": True}), ids=str)
@pytest.mark.parametrize("side", ("chosen", "rejected"))
def test_a_token_without_an_embedding(tmp_path, side, options):
    features = make_features()
    features[3] = with_token(features[3], side, VOCAB)
    message = f"1 of 8 rows cannot be used:\n  test:4: token {VOCAB} has no embedding, since the model has {VOCAB}"
    with pytest.raises(ValueError, match=f"^train_dataset: {message}"):
        trainer(tmp_path, features, **options)
    with pytest.raises(ValueError, match=rf"^eval_dataset\['one'\]: {message}"):
        trainer(tmp_path, make_features(), eval_dataset={"one": features}, **options)
    with pytest.raises(ValueError, match=f"^evaluation dataset: {message}"):
        trainer(tmp_path, make_features(), **options).evaluate(features)


def test_a_stream_names_its_row_too(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            features = make_features()
            yield from [*features[:3], with_token(features[3], "rejected", VOCAB)]

    with pytest.raises(ValueError, match=rf"^input_ids: expected tokens in \[0, {VOCAB}\), got {VOCAB} in test:4"):
        trainer(tmp_path, Stream(), reference_free=True).train()
    with pytest.raises(ValueError, match=r"^input_ids: expected tokens in \[0, 9\), got -1 in test:1"):
        StepPreferenceCollator(0, vocab_size=9)([with_token(make_features()[0], "chosen", -1)])


def test_more_tokens_than_a_table_of_positions(tmp_path, caplog):
    features = make_features()
    longest = max(max(len(f["chosen_input_ids"]), len(f["rejected_input_ids"])) for f in features)
    with pytest.raises(
        ValueError, match=f"^train_dataset: .*\n.* {longest} tokens do not fit the model's {longest - 1} p"
    ):
        trainer(tmp_path, features, gpt2(longest - 1))
    trainer(tmp_path, features, gpt2(longest)).train()
    assert not caplog.records


def test_rotary_positions_go_on_with_one_warning(tmp_path, caplog):
    features = make_features(2, steps=(30, 31))
    with caplog.at_level(logging.WARNING, "sspo_ext"):
        trainer(tmp_path, features, max_steps=1).train()
    (record,) = caplog.records
    assert record.getMessage() == (
        "train_dataset: 2 of 2 rows have more tokens than the 64 positions that the model was made for (test:1, test:2)"
    )


def test_prompts(tmp_path):
    """Of `rl` the completion and the probe count, too."""
    rows = [*ROWS, {"prompt": "1" * 200, "answer": "1"}]
    tokens = r"200 tokens, and \d+ that may follow, do not fit the model's 128 positions"
    with pytest.raises(ValueError, match=f"^train_dataset: 1 of 17 rows cannot be used:\n  row 16: {tokens}"):
        make_trainer(tmp_path, gpt2(128, vocab=40), rows=rows)
    probed = 5 + 12 + len("# 2")  # a prompt, a completion and "#" with the answer
    make_trainer(tmp_path, gpt2(probed, vocab=40))
    with pytest.raises(
        ValueError, match=f"row 0: 5 tokens, and 15 that may follow, do not fit .* {probed - 1} positions"
    ):
        make_trainer(tmp_path, gpt2(probed - 1, vocab=40))
    make_trainer(tmp_path, gpt2(5 + 12, vocab=40), combine="outcome")
    with pytest.raises(ValueError, match="^train_dataset: 1 of 1 rows .*\n  row 0: token .* has no embedding"):
        make_trainer(tmp_path, gpt2(128, vocab=5), rows=ROWS[:1], per_device_train_batch_size=4)
    with pytest.raises(ValueError, match="^eval_dataset: expected at least one row, got none"):
        make_trainer(tmp_path, eval_dataset=[])


def test_no_row_is_no_text():
    check_fits("data", [], Limits(5))
    check_fits("data", [("a", [[], [4]])], Limits(5, 1, fixed=True))


@pytest.mark.parametrize("with_tokenizer", (True, False))
def test_raw_rows(tmp_path, with_tokenizer):
    tokenizer = byte_tokenizer() if with_tokenizer else None
    args = config(tmp_path)
    message = (
        "expected the features of tokenize_rows, got a row without 'chosen_input_ids': .*; call "
        r"tokenize_rows\(load_preference_rows\(rows\), tokenizer\) first"
    )
    for name, rows in (("train_dataset", [[PAIR], None]), ("eval_dataset", [make_features(), [PAIR]])):
        with pytest.raises(ValueError, match=f"^{name}: {message}"):
            StepPreferenceTrainer(make_model(), args, *rows, processing_class=tokenizer)
    made = StepPreferenceTrainer(make_model(), args, make_features(), processing_class=tokenizer)
    with pytest.raises(ValueError, match=f"^evaluation dataset: {message}"):
        made.evaluate([PAIR])


@pytest.mark.parametrize(
    "dataset, error, message",
    (
        ([], ValueError, "expected at least one row, got none"),
        ("pairs.jsonl", TypeError, "expected the features of tokenize_rows, got 'pairs.jsonl'"),
        ({"one": make_features()}, TypeError, "expected the features of tokenize_rows, got {'one'"),
        (5, TypeError, "expected the features of tokenize_rows, got 5"),
        (["a"], ValueError, "expected the features of tokenize_rows, got a row without 'chosen_input_ids': 'a'"),
    ),
    ids=("empty", "path", "dict", "int", "texts"),
)
def test_datasets_of_another_form(tmp_path, dataset, error, message):
    with pytest.raises(error, match=f"^train_dataset: {message}"):
        trainer(tmp_path, dataset)


@pytest.mark.parametrize("made, allowed", ((preference.config, ["random", "sequential"]), (rl.config, ["random"])))
def test_orders_of_the_rows(tmp_path, made, allowed):
    """transformers advised an 'input_ids' column, and SSPO's trainer ignored the option."""
    if OLD_TRAINER:
        with pytest.raises(ValueError, match="^group_by_length: expected False, since "):
            made(tmp_path, group_by_length=True)
        return
    for order in ("random", "sequential", "group_by_length", "batch_rebalance"):
        if order in allowed:
            made(tmp_path, train_sampling_strategy=order)
        else:
            with pytest.raises(ValueError, match=f"^train_sampling_strategy: expected 'random'.*, got '{order}'"):
                made(tmp_path, train_sampling_strategy=order)


def test_batches_are_not_sent(tmp_path):
    assert config(tmp_path).accelerator_config.dispatch_batches is False
    with pytest.raises(ValueError, match="^dispatch_batches: expected False"):
        config(tmp_path, accelerator_config={"dispatch_batches": True})


@pytest.mark.slow
def test_two_processes_train_on_a_stream_as_one_does(tmp_path):
    """accelerate gave: "You can't use batches of different size with `dispatch_batches=True`", which is not set."""
    torchrun("helpers.ranks.stream_two_ranks", tmp_path)
    one, two = stream_two_ranks.main(tmp_path, batch_size=4), torch.load(tmp_path / "found.pt")
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)
