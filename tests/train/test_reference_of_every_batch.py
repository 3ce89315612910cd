# SPDX-License-Identifier: Apache-2.0
"""A loss that takes a reference has one in every batch, whenever its rows were given: at the start, or later."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sspo_ext.data.collator import StepPreferenceCollator
from sspo_ext.train.preference_config import StepPreferenceConfig
from sspo_ext.train.preference_trainer import StepPreferenceTrainer


def make_model(seed=0):
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=41, pad_token_id=0, eos_token_id=1, initializer_range=0.3, **shape)
    return LlamaForCausalLM(config)


def make_rows(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        row = {"pairs": [[0, 0]], "weight": 1.0, "margin": 0.0, "source": f"test:{i + 1}"}
        for side, length in (("chosen", 2 + i), ("rejected", 9 + i)):
            ids = torch.randint(2, 41, (3 + length,), generator=generator).tolist()
            row[f"{side}_input_ids"] = ids
            row[f"{side}_labels"] = [-100] * 3 + ids[3:]
            row[f"{side}_step_ids"] = [-1] * 3 + [0] * length
        rows.append(row)
    return rows


def make_trainer(folder, train=None, held_out=None, model=None, collator=None, lora=None, **options):
    shared = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "beta": 0.5}
    shared |= {"max_steps": 2, "learning_rate": 0.05, "dataloader_pin_memory": False, "logging_steps": 1}
    args = StepPreferenceConfig(str(folder), **{**shared, **options})
    return StepPreferenceTrainer(model or make_model(), args, train, held_out, data_collator=collator, peft_config=lora)


def lora(**options):
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)


LATER = {
    "evaluate(rows)": lambda trainer, rows: trainer.evaluate(rows)["eval_loss"],
    "evaluate(dict)": lambda trainer, rows: trainer.evaluate({"a": rows})["eval_a_loss"],
    "predict(rows)": lambda trainer, rows: trainer.predict(rows).metrics["test_loss"],
    "eval_dataset = rows": lambda trainer, rows: (
        setattr(trainer, "eval_dataset", rows) or trainer.evaluate()["eval_loss"]
    ),
}


@pytest.mark.parametrize("way", LATER)
def test_rows_given_later_have_the_reference(tmp_path, way):
    trainer = make_trainer(tmp_path, make_rows(3))
    assert LATER[way](trainer, make_rows(4, seed=1)) == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("way", LATER)
def test_after_training_rows_of_the_cache_alone_are_evaluated(tmp_path, way):
    """The model before training is gone. Its log-probs of rows that it has seen are in the cache."""
    seen, other = make_rows(4, seed=1), make_rows(4, seed=2)
    trainer = make_trainer(tmp_path, make_rows(3), seen)
    trainer.train()
    expected = trainer.evaluate()["eval_loss"]
    assert abs(expected - math.log(2)) > 1e-3
    assert LATER[way](trainer, seen) == pytest.approx(expected)
    with pytest.raises(ValueError, match="dataset: expected rows with ref_chosen and ref_rejected.*before training"):
        LATER[way](trainer, other)
    again = make_trainer(tmp_path / "again", None, other)
    assert LATER[way](trainer, again.eval_dataset) != pytest.approx(math.log(2), abs=1e-3)


def test_after_training_without_a_change_the_reference_is_still_there(tmp_path):
    trainer = make_trainer(tmp_path, make_rows(3), learning_rate=0.0)
    trainer.train()
    assert trainer.evaluate(make_rows(4, seed=1))["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("bias", ["none", "all"])
def test_after_training_a_new_adapter_is_taken_off(tmp_path, bias):
    """It is the model without the adapter, unless the adapter's training has changed that too (`bias`)."""
    model = make_model()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(41))
    trainer = make_trainer(tmp_path, make_rows(3), model=model, lora=lora(bias=bias), route="logits", max_steps=4)
    trainer.train()
    rows = make_rows(4, seed=1)
    if bias == "all":
        with pytest.raises(ValueError, match="the reference is the model before training, which is no longer there"):
            trainer.evaluate(rows)
        return
    expected = make_trainer(tmp_path / "b", None, rows, model=make_model()).eval_dataset
    with_it = trainer.evaluate(expected)["eval_loss"]
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(with_it, rel=1e-5)
    assert abs(with_it - math.log(2)) > 1e-4


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_datasets_set_before_training_have_the_reference_in_it(tmp_path, name):
    options = {"eval_strategy": "steps", "eval_steps": 1, "learning_rate": 1e-9}
    trainer = make_trainer(tmp_path, make_rows(3), make_rows(4, seed=1), **options)
    setattr(trainer, name, make_rows(3, seed=2))
    trainer.train()
    losses = [v for log in trainer.state.log_history for k, v in log.items() if k in ("loss", "eval_loss")]
    assert len(losses) == 4 and losses == pytest.approx([math.log(2)] * 4, abs=1e-4)


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        yield from self.rows


def test_a_stream_with_the_reference_in_its_rows(tmp_path):
    """It needs no length, as the docstring says."""
    with_reference = make_trainer(tmp_path, make_rows(4)).train_dataset
    trainer = make_trainer(tmp_path / "b", Stream(with_reference), learning_rate=0.0)
    assert trainer.train().training_loss == pytest.approx(math.log(2), abs=1e-6)  # the log is rounded in transformers 4


def without_reference(features):
    return {k: v for k, v in StepPreferenceCollator(0)(features).items() if k != "ref"}


@pytest.mark.parametrize("route", ["linear", "logits"])
def test_a_collator_that_drops_the_reference_is_an_error(tmp_path, route):
    trainer = make_trainer(tmp_path, make_rows(3), make_rows(2), collator=without_reference, route=route)
    for run in (trainer.evaluate, trainer.train):
        with pytest.raises(ValueError, match=r"ref: loss_type \['sigmoid'\] takes a reference.*data_collator must"):
            run()
    make_trainer(tmp_path, make_rows(3), collator=without_reference, loss_type="simpo").train()
    make_trainer(tmp_path, make_rows(3), collator=without_reference, reference_free=True).train()


@pytest.mark.parametrize("options", [{"reference_free": True}, {"loss_type": "simpo"}])
def test_a_loss_without_a_reference_reads_none(tmp_path, options):
    """Rows may bring one, left by another run; it was used for reference_free, and simpo stopped at it."""
    rows = make_rows(3)
    with_reference = make_trainer(tmp_path, rows).train_dataset
    losses = [
        make_trainer(tmp_path, None, held_out, **options).evaluate()["eval_loss"] for held_out in (rows, with_reference)
    ]
    assert losses[0] == losses[1]
