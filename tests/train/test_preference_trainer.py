# SPDX-License-Identifier: Apache-2.0
"""StepPreferenceTrainer: updates, evaluation, packing and resume, on a tiny random Llama.

The traps of transformers.Trainer each have a test here: accumulation scaling, dropped columns, a missing eval_loss, a
hidden NaN.
"""

import json
import math

import pytest
import torch
from helpers.launch import torchrun
from helpers.preference import (
    LOG_ROUNDING,
    OLD_TRAINER,
    VOCAB,
    batch_loss,
    config,
    logs,
    make_features,
    make_model,
    parameters,
    trained,
)  # fmt: skip
from helpers.ranks import preference_two_ranks
from transformers import OPTConfig, OPTForCausalLM, TrainerCallback

from sspo_ext.train.preference_trainer import StepPreferenceTrainer
from sspo_ext.train.whole_batches import whole_batches


def test_update_is_the_gradient_of_the_loss(tmp_path):
    features = make_features(2)
    trainer = trained(tmp_path, features, max_steps=1, reference_free=True, learning_rate=0.1)
    model = make_model()
    out = batch_loss(model, features, beta=0.5)
    out.loss.backward()
    expected = torch.cat([(p - 0.1 * p.grad).detach().reshape(-1) for p in model.parameters()])
    torch.testing.assert_close(parameters(trainer), expected, rtol=0, atol=1e-6)
    assert logs(trainer) == pytest.approx([out.loss.item()], rel=1e-5, abs=LOG_ROUNDING)


@pytest.mark.parametrize("batch_size,accumulation", [(1, 4), (2, 2), (3, 2)])
def test_accumulation_is_one_big_batch(tmp_path, batch_size, accumulation):
    """Micro-batches have 1 to 6 pairs: a mean of means, or a division by the accumulation steps, does not agree."""
    features = make_features(12, steps=(1, 6))
    assert len({len(f["pairs"]) for f in features}) > 2
    big = trained(tmp_path / "big", features, per_device_train_batch_size=batch_size * accumulation, max_steps=2)
    many = trained(
        tmp_path / "many",
        features,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=2,
    )
    assert (parameters(big) - parameters(make_model())).abs().max() > 1e-3
    torch.testing.assert_close(parameters(many), parameters(big), rtol=0, atol=2e-6)
    for key in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "steps/tokens", "pairs/count"):
        # the first step's rewards are rounding around 0, and so its accuracy is noise
        rounding = 2 * LOG_ROUNDING if key == "loss" else 1e-6
        assert logs(many, key)[1:] == pytest.approx(logs(big, key)[1:], rel=1e-4, abs=max(rounding, 1e-6)), key


def test_short_last_accumulation_window(tmp_path):
    """5 rows, batches of 1, windows of 4: the second update has one micro-batch, whose gradient is not divided by 4."""
    features = make_features(5)
    many = trained(tmp_path / "a", features, per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=2)
    big = trained(tmp_path / "b", features, per_device_train_batch_size=4, max_steps=2)
    torch.testing.assert_close(parameters(many), parameters(big), rtol=0, atol=2e-6)


def test_weighted_pairs_and_loss_types(tmp_path):
    features = [{**f, "weight": 1.0 + i, "margin": 0.1 * i} for i, f in enumerate(make_features(4))]
    for loss_type, options in (("ipo", {}), ("hinge", {}), ("simpo", {"simpo_gamma": 0.3})):
        trainer = trained(
            tmp_path / loss_type,
            features,
            max_steps=1,
            per_device_train_batch_size=4,
            loss_type=loss_type,
            loss_options=options,
        )
        ref = None if loss_type == "simpo" else batch_loss(make_model(), features).step_logps
        expected = batch_loss(make_model(), features, loss_type=loss_type, beta=0.5, ref=ref, **options).loss.item()
        assert logs(trainer)[0] == pytest.approx(expected, rel=1e-5, abs=LOG_ROUNDING)


def test_first_loss_with_a_reference_is_ln_2(tmp_path):
    trainer = trained(tmp_path, make_features(), max_steps=1)
    assert logs(trainer)[0] == pytest.approx(math.log(2), abs=1e-6 + LOG_ROUNDING)
    assert logs(trainer, "rewards/margins")[0] == pytest.approx(0, abs=1e-5)


def test_learns(tmp_path):
    features = make_features(8)
    trainer = StepPreferenceTrainer(
        make_model(), config(tmp_path, max_steps=25, optim="adamw_torch", learning_rate=3e-3), features, features
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.5 * before["eval_loss"] and after["eval_rewards/accuracies"] > 0.95


def test_columns_are_not_dropped(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = [{**f, "weight": float(i)} for i, f in enumerate(make_features(6))]
    table = datasets.Dataset.from_list([{**f, "comment": "goes away"} for f in features])
    a = trained(tmp_path / "a", table, remove_unused_columns=True, label_smoothing=0.1)
    b = trained(tmp_path / "b", features, label_smoothing=0.1)
    torch.testing.assert_close(parameters(a), parameters(b), rtol=0, atol=0)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_evaluate_gives_the_mean_over_pairs(tmp_path, batch_size):
    features = make_features(8, steps=(1, 6))
    trainer = StepPreferenceTrainer(
        make_model(1), config(tmp_path, per_device_eval_batch_size=batch_size, reference_free=True), None, features
    )
    found = trainer.evaluate()
    out = batch_loss(make_model(1), features, beta=0.5)
    assert found["eval_loss"] == pytest.approx(out.loss.item(), rel=1e-5)
    for name in ("rewards/margins", "rewards/accuracies", "logps/rejected", "steps/logps", "pairs/count"):
        assert found[f"eval_{name}"] == pytest.approx(out.metrics[name].item(), rel=1e-5), name
    assert [e["eval_rewards/margins"] for e in trainer.state.log_history] == [found["eval_rewards/margins"]]


def test_best_checkpoint_by_a_preference_metric(tmp_path):
    features = make_features(6)
    args = config(
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="rewards/margins",
        greater_is_better=True,
    )
    trainer = StepPreferenceTrainer(make_model(), args, features, {"one": features[:3], "two": features[3:]})
    args.metric_for_best_model = "eval_one_rewards/margins"
    trainer.train()
    assert trainer.state.best_metric == max(logs(trainer, "eval_one_rewards/margins"))


def test_nan_is_not_hidden(tmp_path):
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                model.lm_head.weight[3] = float("nan")

    trainer = StepPreferenceTrainer(make_model(), config(tmp_path, max_steps=2), make_features(), callbacks=[Poison()])
    with pytest.raises(ValueError, match="loss: expected a finite number, got nan after 2 updates"):
        trainer.train()
    assert math.isfinite(logs(trainer)[0]) and math.isnan(logs(trainer)[1])
    assert math.isnan(logs(trainer, "rewards/margins")[1])


def test_layout_and_pairs_follow_the_batch_to_the_device(tmp_path, monkeypatch):
    trainer = StepPreferenceTrainer(make_model(), config(tmp_path, reference_free=True), make_features())
    batch = trainer.data_collator(make_features(2))
    monkeypatch.setattr(type(trainer.args), "device", torch.device("meta"))
    moved = trainer._prepare_inputs(batch)
    for bundle in (moved["layout"], moved["pairs"]):
        for name, value in vars(bundle).items():
            if isinstance(value, torch.Tensor):
                assert value.device.type == ("cpu" if name.startswith("host_") else "meta"), name
    # nothing of them is read back: moving a layout that is on a device without storage would raise if it were
    moved["layout"].to("meta"), moved["pairs"].to("meta")


def test_arguments_are_checked(tmp_path):
    with pytest.raises(ValueError, match="loss_type: .*'dpo'"):
        StepPreferenceTrainer(make_model(), config(tmp_path, loss_type="dpo"), make_features())
    with pytest.raises(TypeError, match="simpo_gamma: .*'sigmoid'"):
        StepPreferenceTrainer(make_model(), config(tmp_path, loss_options={"simpo_gamma": 1.0}), make_features())
    with pytest.raises(ValueError, match="compute_metrics"):
        StepPreferenceTrainer(make_model(), config(tmp_path), make_features(), compute_metrics=lambda p: {})
    with pytest.raises(ValueError, match="compute_loss_func: expected None"):
        StepPreferenceTrainer(make_model(), config(tmp_path), make_features(), compute_loss_func=lambda *a, **k: 0)
    with pytest.raises(ValueError, match="label_smoothing_factor: expected 0.*got 0.3; label_smoothing is for"):
        config(tmp_path, label_smoothing_factor=0.3)
    with pytest.raises(ValueError, match="train_dataset: .*length"):
        StepPreferenceTrainer(make_model(), config(tmp_path), Endless())
    StepPreferenceTrainer(make_model(), config(tmp_path, reference_free=True), Endless())


@pytest.mark.parametrize("packing", [False, True])
def test_evaluation_of_whole_batches_counts_the_rows_alone(tmp_path, packing):
    """Rows without pairs, which fill the batches of several processes, alone in a batch and beside others."""
    features = [{**f, "weight": 1.0 + i} for i, f in enumerate(make_features(5, steps=(1, 6)))]
    trainer = StepPreferenceTrainer(
        make_model(1), config(tmp_path, packing=packing, per_device_eval_batch_size=2, backend="auto"), None, features
    )
    filled = whole_batches(trainer.eval_dataset, 8)
    assert len(filled) == 8 and len(whole_batches(features, 5)) == 5 and list(whole_batches([], 4)) == []
    found, expected = trainer.evaluate(filled), trainer.evaluate()
    assert expected["eval_pairs/count"] == sum(len(f["pairs"]) for f in features)
    for name, value in expected.items():
        if "per_second" not in name and "runtime" not in name:
            assert found[name] == pytest.approx(value, rel=1e-5), name


def test_a_stream_in_whole_batches():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from make_features(3)

    rows = list(whole_batches(Stream(), 4))
    assert rows[:3] == make_features(3) and [len(f["pairs"]) for f in rows[3:]] == [0]


@pytest.mark.slow
def test_two_processes_evaluate_what_one_does(tmp_path):
    """5 rows in batches of 1 and of 4, a list and a stream: no row is counted twice (preference_two_ranks.py)."""
    torchrun("helpers.ranks.preference_two_ranks", tmp_path)
    one, two = preference_two_ranks.main(tmp_path), torch.load(tmp_path / "found.pt")
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=1e-5), name


def test_packing_of_a_stream(tmp_path):
    options = {"packing": True, "reference_free": True, "max_steps": 1}
    streamed = trained(tmp_path / "a", Endless(), **options)
    torch.testing.assert_close(parameters(streamed), parameters(trained(tmp_path / "b", make_features(2), **options)))


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        while True:
            yield from make_features(2)


@pytest.mark.parametrize("reference_free", [False, True])
def test_packed_equals_padded(tmp_path, reference_free):
    features = make_features(8)
    options = {"reference_free": reference_free, "gradient_accumulation_steps": 2}
    packed, padded = (trained(tmp_path / str(p), features, packing=p, max_steps=3, **options) for p in (True, False))
    batch = packed.data_collator(features[:2])
    assert "attention_mask" not in batch and batch["input_ids"].shape[0] == 1
    assert logs(packed) == pytest.approx(logs(padded), rel=1e-5, abs=2 * LOG_ROUNDING)
    torch.testing.assert_close(parameters(packed), parameters(padded), rtol=0, atol=1e-5)


def test_packing_is_refused_where_sequences_would_mix(tmp_path):
    torch.manual_seed(0)
    opt = OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            ffn_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
        )
    )
    with torch.no_grad():
        for p in opt.parameters():
            if p.ndim == 2:
                p *= 20
    with pytest.raises(ValueError, match="packing: OPTForCausalLM gives other log-probs"):
        StepPreferenceTrainer(opt, config(tmp_path, packing=True), make_features())


@pytest.mark.parametrize(
    "rows",
    [
        12,
        pytest.param(
            10, marks=pytest.mark.skipif(OLD_TRAINER, reason="transformers 4 resumes without the short last window")
        ),
    ],
)
def test_resumed_equals_uninterrupted(tmp_path, rows):
    features = make_features(rows)
    options = dict(
        optim="adamw_torch",
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        max_steps=6,
        gradient_accumulation_steps=2,
        save_steps=2,
        save_strategy="steps",
    )
    whole = trained(tmp_path / "a", features, make_model(dropout=0.1), **options)
    again = StepPreferenceTrainer(make_model(dropout=0.1), config(tmp_path / "b", **options), features)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert torch.equal(parameters(whole), parameters(again))
    for key in ("loss", "rewards/margins", "rewards/accuracies"):
        assert logs(again, key) == logs(whole, key), key
    state = json.loads((tmp_path / "a" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["global_step"] == 4
