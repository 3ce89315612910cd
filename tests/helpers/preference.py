# SPDX-License-Identifier: Apache-2.0
"""A tiny random Llama, rows of pairs and a short training: for StepPreferenceTrainer's tests."""

import numpy as np
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from sspo_ext.data.collator import StepPreferenceCollator
from sspo_ext.losses.pref import step_pref_loss
from sspo_ext.train.preference_config import StepPreferenceConfig
from sspo_ext.train.preference_trainer import StepPreferenceTrainer

VOCAB = 61
OLD_TRAINER = int(transformers.__version__.split(".")[0]) < 5
LOG_ROUNDING = 5.1e-5 if OLD_TRAINER else 0  # transformers 4 logs losses with four decimals


def make_model(seed=0, dropout=0.0, scale=4.0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        attention_dropout=dropout,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # default weights are so small that a mistake in the context would hardly show
        for p in model.parameters():
            if p.ndim == 2:
                p *= scale
    return model


def make_features(rows=8, seed=0, steps=(1, 4)):
    rng = np.random.default_rng(seed)
    features = []
    for row in range(rows):
        prompt = rng.integers(2, VOCAB, rng.integers(2, 6)).tolist()
        feature = {"weight": 1.0, "margin": 0.0, "source": f"test:{row + 1}"}
        counts = {}
        for side in ("chosen", "rejected"):
            counts[side] = int(rng.integers(*steps))
            lengths = rng.integers(1, 5, counts[side])
            response = rng.integers(2, VOCAB, lengths.sum()).tolist()
            feature[f"{side}_input_ids"] = prompt + response
            feature[f"{side}_labels"] = [-100] * len(prompt) + response
            feature[f"{side}_step_ids"] = [-1] * len(prompt) + np.repeat(np.arange(counts[side]), lengths).tolist()
        feature["pairs"] = [[k, k] for k in range(min(counts.values()))]
        features.append(feature)
    return features


def config(folder, **options):
    defaults = dict(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=4,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        backend="reference",
        beta=0.5,
    )
    return StepPreferenceConfig(**{**defaults, **options})


def trained(folder, features, model=None, **options):
    trainer = StepPreferenceTrainer(model or make_model(), config(folder, **options), train_dataset=features)
    trainer.train()
    return trainer


def logs(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def parameters(trainer_or_model):
    model = trainer_or_model.model if isinstance(trainer_or_model, StepPreferenceTrainer) else trainer_or_model
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def batch_loss(model, features, **options):
    batch = StepPreferenceCollator(0)(features)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return step_pref_loss(logits, batch["layout"], batch["pairs"], backend="reference", **options)
