# SPDX-License-Identifier: Apache-2.0
"""What `sspo-ext train` and `sspo-ext rl` share: from their options to a trained and saved model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

_SAME = (
    "output_dir loss_type beta route chunk_bytes backend disable_dropout warmup_steps optim max_steps bf16 seed "
    "logging_steps save_steps eval_steps report_to"
).split()

_RENAMED = {
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "gradient_accumulation": "gradient_accumulation_steps",
}


def checkpoint_of(options: argparse.Namespace) -> str | None:
    """The checkpoint to resume from. ValueError if it does not fit --resume: none there, or one without the option."""
    folder = Path(options.output_dir)
    checkpoints = sorted(folder.glob("checkpoint-*"), key=_number)
    if not options.resume and checkpoints:
        raise ValueError(
            f"--output-dir: {str(folder)!r} has checkpoints of another run; give --resume or another folder"
        )
    if options.resume and not checkpoints:
        raise ValueError(f"--resume: no checkpoint in {str(folder)!r}")
    return str(checkpoints[-1]) if checkpoints else None


def _number(checkpoint: Path) -> int:
    number = checkpoint.name.split("-")[1]
    return int(number) if number.isdigit() else -1


def lora_of(options: argparse.Namespace) -> LoraConfig | None:
    """The LoRA adapter to train, if any."""
    if not options.lora_r:
        return None
    if (Path(options.model) / "adapter_config.json").is_file():
        raise ValueError(
            f"--lora-r: expected 0, since --model {options.model!r} is an adapter, which is trained on; for a new one "
            f"merge it into its base model first, got {options.lora_r}"
        )
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError(f"--lora-r: {error}; install it with: pip install peft") from error
    alpha = 2 * options.lora_r if options.lora_alpha is None else options.lora_alpha
    return LoraConfig(r=options.lora_r, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")


def training_arguments(options: argparse.Namespace, *, evaluated: bool) -> dict[str, Any]:
    """The fields of TrainingArguments, and of both trainers' configs, that the two commands share."""
    import torch
    from transformers import TrainingArguments

    given = {name: getattr(options, name) for name in _SAME}
    given |= {field: getattr(options, name) for name, field in _RENAMED.items()}
    # transformers 5.24 has renamed it, and warns of the old name
    new, old = "activation_checkpointing", "gradient_checkpointing"
    given[new if hasattr(TrainingArguments, new) else old] = options.gradient_checkpointing
    return given | {
        "eval_strategy": "steps" if options.eval_steps and evaluated else "no",
        "dataloader_pin_memory": torch.cuda.is_available(),
        # without it, each of several processes on CPUs would be a training of its own
        "use_cpu": not torch.accelerator.is_available(),
    }


def load(
    options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model as the options say, and its tokenizer."""
    from ..train.models import load_model

    return load_model(
        options.model,
        dtype=options.dtype,
        attn_implementation=options.attn_implementation,
        trust_remote_code=options.trust_remote_code,
        tokenizer=tokenizer,
    )


def train_and_save(trainer: Trainer, checkpoint: str | None, *, evaluated: bool) -> list[dict[str, float]]:
    """Train and save the model. Returns the evaluations before and after, or none."""
    before = [trainer.evaluate()] if evaluated else []
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    return [*before, trainer.evaluate()] if evaluated else []


def comparison(title: str, names: Sequence[str], before: dict[str, float], after: dict[str, float]) -> str:
    """A table of metrics before and after training."""
    rows = [f"| {name} | {before[f'eval_{name}']:.4f} | {after[f'eval_{name}']:.4f} |" for name in names]
    return "\n".join([f"| {title} | before | after |", "| --- | --- | --- |", *rows])
