# SPDX-License-Identifier: Apache-2.0
"""StepPreferenceTrainer's reference: computed once, without dropout and adapters, shared, given, refused."""

import os

import numpy as np
import pytest
import torch
from helpers.preference import (
    LOG_ROUNDING,
    batch_loss,
    config,
    logs,
    make_features,
    make_model,
    trained,
)  # fmt: skip

from sspo_ext.data.collator import StepPreferenceCollator
from sspo_ext.losses.logps import step_logps
from sspo_ext.train.preference_trainer import StepPreferenceTrainer
from sspo_ext.train.reference_cache import ReferenceCache, add_reference, reference_key


def reference_columns(features, model):
    layout_sums = []
    for feature in features:
        batch = StepPreferenceCollator(0)([feature])
        with torch.no_grad():
            logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        sums = step_logps(logits, batch["layout"], backend="reference").sums
        chosen = int((batch["layout"].step_sequence == 0).sum())
        layout_sums.append((sums[:chosen], sums[chosen:]))
    return layout_sums


@pytest.mark.parametrize("packing", [False, True])
def test_reference_is_the_model_before_training_without_dropout(tmp_path, packing):
    features = make_features(7)
    trainer = trained(tmp_path, features, make_model(dropout=0.5), packing=packing)
    for feature, (chosen, rejected) in zip(
        trainer.train_dataset, reference_columns(features, make_model()), strict=True
    ):
        np.testing.assert_allclose(feature["ref_chosen"], chosen, atol=2e-4)
        np.testing.assert_allclose(feature["ref_rejected"], rejected, atol=2e-4)
    assert trainer.model.training  # dropout is on again


def forwards(model, count):
    model.register_forward_hook(lambda *_: count.append(1))
    return model


def test_a_process_with_fewer_batches_runs_the_model_as_often_as_the_others(tmp_path):
    features, model, calls = make_features(5), make_model(), []

    def step_sums(batch):
        calls.append(batch["layout"].num_sequences // 2)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return step_logps(logits, batch["layout"], backend="reference").sums.detach()

    def added(name, **options):
        cache = ReferenceCache(tmp_path / name, batch_size=2, progress=False, **options)
        return add_reference(features, "key", cache, StepPreferenceCollator(0), step_sums)

    alone = added("alone")
    assert calls == [2, 2, 1]
    asked = []
    assert added("beside others", most=lambda batches: asked.append(batches) or 5) == alone
    assert asked == [3] and calls[3:] == [2, 2, 1, 1, 1]
    assert added("beside others", most=lambda batches: asked.append(batches) or 2) == alone
    assert asked == [3, 0] and calls[8:] == [1, 1]


def test_reference_is_computed_once(tmp_path):
    features, folder = make_features(6), tmp_path / "cache"
    options = {
        "reference_cache": str(folder),
        "per_device_eval_batch_size": 2,
        "route": "logits",
        "prefix_sharing": False,
    }
    first, second, third, fourth = [], [], [], []
    a = StepPreferenceTrainer(forwards(make_model(), first), config(tmp_path / "a", **options), features, features[:2])
    b = StepPreferenceTrainer(forwards(make_model(), second), config(tmp_path / "b", **options), features, features[:2])
    assert len(first) == 3 + 1 and len(second) == 0
    assert a.train_dataset == b.train_dataset and a.eval_dataset == b.eval_dataset
    assert sorted(p.suffix for p in folder.iterdir()) == [".npz", ".npz"]
    # other weights, or one other token, are another entry
    StepPreferenceTrainer(forwards(make_model(1), third), config(tmp_path / "c", **options), features)
    features[0]["chosen_input_ids"] = [7, *features[0]["chosen_input_ids"][1:]]
    StepPreferenceTrainer(forwards(make_model(), fourth), config(tmp_path / "d", **options), features)
    assert len(third) == 3 and len(fourth) == 3
    assert len(list(folder.iterdir())) == 4


def test_interrupted_reference_pass_goes_on(tmp_path):
    features, model, collate = make_features(9), make_model(), StepPreferenceCollator(0)
    cache = ReferenceCache(tmp_path, batch_size=2, progress=False)
    calls = []

    def step_sums(batch):
        calls.append(len(batch["input_ids"]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return step_logps(logits, batch["layout"], backend="reference").sums

    with pytest.raises(KeyboardInterrupt):
        add_reference(features, "key", cache, collate, step_sums)
    rows = add_reference(features, "key", cache, collate, step_sums)
    assert calls == [4, 4, 4, 4, 4, 2]  # the third batch of 2 rows (4 sequences) again, the first two not
    for row, (chosen, rejected) in zip(rows, reference_columns(features, model), strict=True):
        np.testing.assert_allclose(row["ref_chosen"], chosen, atol=2e-4)
        np.testing.assert_allclose(row["ref_rejected"], rejected, atol=2e-4)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:50])  # a damaged file is computed again
    assert add_reference(features, "key", cache, collate, step_sums) == rows


def test_processes_share_the_reference_pass(tmp_path):
    features, collate, model = make_features(5), StepPreferenceCollator(0), make_model()

    def step_sums(batch):
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return step_logps(logits, batch["layout"], backend="reference").sums

    alone = add_reference(features, "k", ReferenceCache(tmp_path / "one", progress=False), collate, step_sums)

    def other_process():
        cache = ReferenceCache(
            tmp_path / "two", batch_size=1, rank=0, world_size=2, barrier=Stop().stop, progress=False
        )
        with pytest.raises(Stop):
            add_reference(features, "k", cache, collate, step_sums)

    together = ReferenceCache(
        tmp_path / "two", batch_size=1, rank=1, world_size=2, barrier=other_process, progress=False
    )
    rows = add_reference(features, "k", together, collate, step_sums)
    for a, b in zip(alone, rows, strict=True):
        np.testing.assert_allclose(a["ref_chosen"] + a["ref_rejected"], b["ref_chosen"] + b["ref_rejected"], atol=1e-4)


class Stop(Exception):
    def stop(self):
        raise self


def test_non_finite_reference_names_the_row(tmp_path):
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"train_dataset: reference log-probs of row \d+ \(test:\d+\) are not finite"):
        StepPreferenceTrainer(model, config(tmp_path, route="logits"), make_features(2))


def test_given_reference_is_used(tmp_path):
    features = [
        {
            **f,
            "ref_chosen": [-1.0] * (max(f["chosen_step_ids"]) + 1),
            "ref_rejected": [-9.0] * (max(f["rejected_step_ids"]) + 1),
        }
        for f in make_features(2)
    ]
    trainer = trained(tmp_path, features, max_steps=1)
    ref = torch.tensor([v for side in ("ref_chosen", "ref_rejected") for f in features for v in f[side]])
    assert logs(trainer)[0] == pytest.approx(
        batch_loss(make_model(), features, beta=0.5, ref=ref).loss.item(), rel=1e-5, abs=LOG_ROUNDING
    )
    assert not (tmp_path / "reference_cache").exists()


def test_a_loss_that_needs_a_reference_says_so_at_once(tmp_path):
    with pytest.raises(ValueError, match="reference_free: expected False.*'nca_pair'"):
        StepPreferenceTrainer(
            make_model(), config(tmp_path, loss_type="nca_pair", reference_free=True), make_features()
        )


@pytest.mark.parametrize("packing", [False, True])
def test_lora(tmp_path, packing):
    peft = pytest.importorskip("peft")
    features, base = make_features(6), make_model()
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    args = config(
        tmp_path,
        max_steps=3,
        optim="adamw_torch",
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=3,
        packing=packing,
    )
    trainer = StepPreferenceTrainer(base, args, features, peft_config=lora)
    # init_lora_weights=False makes an adapter that changes the output: the reference must be the model without it
    for feature, (chosen, rejected) in zip(
        trainer.train_dataset, reference_columns(features, make_model()), strict=True
    ):
        np.testing.assert_allclose(
            feature["ref_chosen"] + feature["ref_rejected"], torch.cat([chosen, rejected]), atol=2e-4
        )
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all("lora_" in n for n in changed)
    assert os.path.exists(tmp_path / "checkpoint-3" / "adapter_model.safetensors")
    assert not os.path.exists(tmp_path / "checkpoint-3" / "model.safetensors")
    key = reference_key(trainer.model, {})
    with torch.no_grad():
        next(p for n, p in trainer.model.named_parameters() if "lora_" in n).add_(1)
    assert reference_key(trainer.model, {}) == key  # adapters are not part of the reference
