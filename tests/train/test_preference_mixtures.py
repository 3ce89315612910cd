# SPDX-License-Identifier: Apache-2.0
"""Several loss types in the trainer and on its command line: the sum of the losses, TRL's names, what raises.

Mutations of sspo_ext/train/trainer.py and cli.py, each caught by the test named (on a copy of the package):
  loss_weights not handed on                  test_update_is_the_gradient_of_the_sum
  a reference only if the first loss takes it   test_reference_is_made_where_one_loss_takes_it
  reference_free asks the first loss alone    test_arguments_are_checked_before_the_model_is_loaded
  options not checked at the start            test_arguments_are_checked_before_the_model_is_loaded
  lengths not checked at the start            test_arguments_are_checked_before_the_model_is_loaded
  command line: one name, or weights as text  test_command_line_takes_several_names
  one name not made a list                    test_config_through_json_and_arguments
  the default a name, lost by the argument parser   test_config_through_json_and_arguments
"""

import json

import pytest
import torch
import torch.nn.functional as F
from helpers.preference import LOG_ROUNDING, config, logs, make_features, make_model, parameters, trained
from transformers import HfArgumentParser

from sspo_ext.cli.main import build_parser
from sspo_ext.train.preference_config import StepPreferenceConfig
from sspo_ext.train.preference_trainer import StepPreferenceTrainer

MIXTURE = {"loss_type": ["sigmoid", "ipo", "sft"], "loss_weights": [0.8, -0.3, 1.5]}


def with_reference(features):
    """Reference sums far from the model's, so that no loss is at its value for u = 0."""
    g = torch.Generator().manual_seed(0)
    for feature in features:
        for side in ("chosen", "rejected"):
            steps = max(feature[f"{side}_step_ids"]) + 1
            feature[f"ref_{side}"] = (-20 * torch.rand(steps, generator=g)).tolist()
    return features


def by_hand(model, features, beta, weights):
    """The mixture's sum, sequence by sequence from log_softmax; nothing of this package."""
    winners, losers = [], []
    for feature in features:
        sides = {}
        for side in ("chosen", "rejected"):
            ids = torch.tensor([feature[f"{side}_input_ids"]])
            steps = torch.tensor(feature[f"{side}_step_ids"])[1:]
            logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
            sides[side] = [
                (logps[steps == k].sum(), ref, int((steps == k).sum())) for k, ref in enumerate(feature[f"ref_{side}"])
            ]
        winners += [sides["chosen"][c] for c, _ in feature["pairs"]]
        losers += [sides["rejected"][r] for _, r in feature["pairs"]]
    (s_w, r_w, n_w), (s_l, r_l, n_l) = (
        (
            torch.stack([s for s, _, _ in side]),
            torch.tensor([r for _, r, _ in side]),
            torch.tensor([n for _, _, n in side]),
        )
        for side in (winners, losers)
    )
    u_w, u_l = s_w - r_w, s_l - r_l
    losses = (
        -F.logsigmoid(beta * (u_w - u_l)).mean(),
        (u_w / n_w - u_l / n_l - 1 / (2 * beta)).square().mean(),
        -s_w.sum() / n_w.sum(),
    )
    return sum(weight * loss for weight, loss in zip(weights, losses, strict=True)), losses


@pytest.mark.parametrize("weights", [[0.8, -0.3, 1.5], None])
@pytest.mark.parametrize("route", ["linear", "logits"])
def test_update_is_the_gradient_of_the_sum(tmp_path, route, weights):
    features = with_reference(make_features(2))
    mixture = {**MIXTURE, "loss_weights": weights}
    trainer = trained(tmp_path, features, max_steps=1, learning_rate=0.01, route=route, backend="auto", **mixture)
    model = make_model()
    loss, losses = by_hand(model, features, 0.5, weights or [1.0, 1.0, 1.0])
    loss.backward()
    expected = torch.cat([(p - 0.01 * p.grad).detach().reshape(-1) for p in model.parameters()])
    assert (expected - parameters(make_model())).abs().max() > 1e-3
    torch.testing.assert_close(parameters(trainer), expected, rtol=0, atol=1e-5)
    assert logs(trainer) == pytest.approx([loss.item()], rel=1e-5, abs=LOG_ROUNDING)
    for name, value in zip(MIXTURE["loss_type"], losses, strict=True):
        assert logs(trainer, f"loss/{name}") == pytest.approx([value.item()], rel=1e-5), name


def test_accumulation_is_one_big_batch(tmp_path):
    features = with_reference(make_features(8, steps=(1, 6)))
    mixture = {"loss_type": ["sigmoid", "nll"], "loss_weights": [1.0, 0.5], "max_steps": 2}
    big = trained(tmp_path / "big", features, per_device_train_batch_size=4, **mixture)
    many = trained(tmp_path / "many", features, per_device_train_batch_size=1, gradient_accumulation_steps=4, **mixture)
    torch.testing.assert_close(parameters(many), parameters(big), rtol=0, atol=2e-6)
    for key in ("loss", "loss/sigmoid", "loss/nll"):
        assert logs(many, key) == pytest.approx(logs(big, key), rel=1e-4, abs=2 * LOG_ROUNDING), key


def test_reference_is_made_where_one_loss_takes_it(tmp_path):
    features = make_features(2)
    mixed = StepPreferenceTrainer(make_model(), config(tmp_path, loss_type=["sft", "sigmoid"]), features)
    assert "ref_chosen" in mixed.train_dataset[0]
    alone = StepPreferenceTrainer(make_model(), config(tmp_path, loss_type=["sft", "simpo"]), features)
    assert "ref_chosen" not in alone.train_dataset[0]


def test_resumed_equals_uninterrupted(tmp_path):
    features = with_reference(make_features(8))
    options = dict(MIXTURE, optim="adamw_torch", learning_rate=1e-3, max_steps=4, save_steps=2, save_strategy="steps")
    whole = trained(tmp_path / "a", features, **options)
    again = StepPreferenceTrainer(make_model(), config(tmp_path / "b", **options), features)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert torch.equal(parameters(whole), parameters(again))
    for key in ("loss", "loss/ipo"):
        assert logs(again, key) == logs(whole, key), key


def test_config_through_json_and_arguments(tmp_path):
    args = config(tmp_path, **MIXTURE)
    path = tmp_path / "args.json"
    path.write_text(json.dumps({k: v for k, v in args.to_dict().items() if k in ("output_dir", *MIXTURE)}))
    parser = HfArgumentParser(StepPreferenceConfig)
    (read,) = parser.parse_json_file(str(path))
    words = ["--loss_type", "sigmoid", "ipo", "sft", "--loss_weights", "0.8", "-0.3", "1.5"]
    (given,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), *words])
    for found in (read, given):
        assert {name: getattr(found, name) for name in MIXTURE} == MIXTURE
    (plain,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path)])
    assert plain.loss_type == ["sigmoid"] and plain.loss_weights is None
    assert config(tmp_path, loss_type="ipo").loss_type == ["ipo"]
    words = ["--loss_type", "simpo", "--loss_options", '{"simpo_gamma": 0.7}', "--output_dir", str(tmp_path)]
    (options,) = parser.parse_args_into_dataclasses(words)
    assert options.loss_options == {"simpo_gamma": 0.7}
    with pytest.raises(TypeError, match="loss_options: expected a dictionary, or its JSON, got 'simpo_gamma=0.7'"):
        config(tmp_path, loss_options="simpo_gamma=0.7")


@pytest.mark.parametrize(
    "options,error,match",
    [
        (
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]},
            ValueError,
            "loss_weights: expected 2 numbers.*got 1",
        ),
        ({"loss_type": "ipo", "loss_weights": [1.0, 2.0]}, ValueError, "loss_weights: expected 1 numbers.*got 2"),
        ({"loss_type": []}, TypeError, "loss_type: expected a name or a list of names"),
        (
            {"loss_type": ["sigmoid", "aot"]},
            ValueError,
            "loss_type: 'aot' needs more than a pair.*losses.aot_loss",
        ),
        ({"loss_type": ["sigmoid", "oreo"]}, ValueError, "loss_type: expected one of .*got 'oreo'"),
        ({"loss_type": ["sft", "nca_pair"], "reference_free": True}, ValueError, "reference_free: .*'nca_pair'"),
        (
            {"loss_type": ["sigmoid", "sft"], "loss_options": {"simpo_gamma": 1.0}},
            TypeError,
            r"simpo_gamma: .*\['sigmoid', 'sft'\]",
        ),
    ],
)
def test_arguments_are_checked_before_the_model_is_loaded(tmp_path, options, error, match):
    with pytest.raises(error, match=match):
        StepPreferenceTrainer("no-such-folder/at-all", config(tmp_path, **options), make_features(2))


def test_command_line_takes_several_names():
    words = ["train", "--model", "m", "--data", "d", "--output-dir", "o"]
    parse = build_parser().parse_args
    assert parse(words).loss_type == ["sigmoid"] and parse(words).loss_weights is None
    assert parse([*words, "--loss-type", "ipo"]).loss_type == ["ipo"]
    mixed = parse([*words, "--loss-type", "sigmoid", "sft", "--loss-weights", "1", "-0.5", "--beta", "0.2"])
    assert (mixed.loss_type, mixed.loss_weights, mixed.beta) == (["sigmoid", "sft"], [1.0, -0.5], 0.2)
