# SPDX-License-Identifier: Apache-2.0
"""What `sspo-ext train` and `sspo-ext rl` share: from their options to a trained and saved model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..train.base import StepTrainer

_SAME = (
    "output_dir loss_type beta route chunk_bytes backend disable_dropout prefix_sharing warmup_steps optim max_steps "
    "bf16 seed logging_steps save_steps eval_steps report_to weight_decay save_total_limit push_to_hub hub_model_id"
).split()

_RENAMED = {
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "gradient_accumulation": "gradient_accumulation_steps",
}


class Interrupted(Exception):
    """A signal ended the command early, in good order.

    Args:
        message: What there is, and how to go on.
        status: The exit status.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def checkpoint_of(options: argparse.Namespace) -> str | None:
    """The newest whole checkpoint to resume from; None to start from the beginning.

    ValueError if the folder does not fit --resume: no run began there, or one did and the option is missing.
    """
    from ..train.checkpoints import checkpoint_folders, newest_checkpoint

    folder = Path(options.output_dir)
    if not options.resume and checkpoint_folders(folder):
        raise ValueError(
            f"--output-dir: {str(folder)!r} has checkpoints of another run; give --resume or another folder"
        )
    if options.resume and not folder.is_dir():
        raise ValueError(f"--resume: no checkpoint in {str(folder)!r}, and no run has begun there")
    checkpoint = newest_checkpoint(folder) if options.resume else None
    return None if checkpoint is None else str(checkpoint)


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
    names = options.lora_target_modules
    targets = names[0] if names == ["all-linear"] else names
    return LoraConfig(r=options.lora_r, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")


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
        "hub_strategy": "end",  # the result; of checkpoints nothing is uploaded
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


def train_and_save(
    trainer: StepTrainer, options: argparse.Namespace, checkpoint: str | None, *, evaluated: bool
) -> list[dict[str, float]] | None:
    """Train and save the model.

    Returns:
        The evaluations before and after, or none; None if the run was finished before, and nothing was done.

    Raises:
        Interrupted: After Ctrl-C or SIGTERM, which ends the training with a checkpoint.
    """
    from ..train.checkpoints import updates_done

    first, planned, folder = trainer.is_world_process_zero(), trainer.planned_updates(), options.output_dir
    done = updates_done(folder) if options.resume else None
    if done is not None and done >= planned:
        if first:
            print(f"{folder} is finished, after {done} updates; nothing is changed")
        return None
    if options.resume and first:
        print(f"going on from {checkpoint}" if checkpoint else f"no checkpoint in {folder}; starting anew")
    before = [trainer.evaluate()] if evaluated else []
    _train(trainer, checkpoint, planned)
    # before the model is saved: with a loss that is not finite it is not
    after = [trainer.evaluate()] if evaluated else []
    trainer.save_result()
    return before + after


def _train(trainer: StepTrainer, checkpoint: str | None, planned: int) -> None:
    from ..train.interrupt import StopOnSignal

    if trainer.args.world_size > 1:  # they would have to agree on the update after which they stop
        trainer.train(resume_from_checkpoint=checkpoint)
        return
    stop = StopOnSignal()
    trainer.add_callback(stop)
    with stop.installed():
        trainer.train(resume_from_checkpoint=checkpoint)
    if stop.received is not None:
        done = trainer.state.global_step
        place = Path(trainer.args.output_dir) / f"checkpoint-{done}"
        raise Interrupted(
            f"stopped after update {done} of {planned}; it is in {place}; give the same command with --resume to go on",
            128 + stop.received,
        )


def comparison(title: str, names: Sequence[str], before: dict[str, float], after: dict[str, float]) -> str:
    """A table of metrics before and after training."""
    rows = [f"| {name} | {before[f'eval_{name}']:.4f} | {after[f'eval_{name}']:.4f} |" for name in names]
    return "\n".join([f"| {title} | before | after |", "| --- | --- | --- |", *rows])
