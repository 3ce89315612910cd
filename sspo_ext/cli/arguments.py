"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def checkpoint_of(options: argparse.Namespace) -> str | None:
    folder = Path(options.output_dir)
    checkpoints = sorted(
        folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]) if p.name.split("-")[1].isdigit() else -1
    )
    if not options.resume and checkpoints:
        raise ValueError(
            f"--output-dir: {str(folder)!r} has checkpoints of another run; give --resume or another folder"
        )
    if options.resume and not checkpoints:
        raise ValueError(f"--resume: no checkpoint in {str(folder)!r}")
    return str(checkpoints[-1]) if checkpoints else None


def lora_of(options: argparse.Namespace):
    if not options.lora_r:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError(f"--lora-r: {error}; install it with: pip install peft") from error
    alpha = 2 * options.lora_r if options.lora_alpha is None else options.lora_alpha
    return LoraConfig(r=options.lora_r, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text}")
    return value


def setting(text: str) -> tuple[str, object]:
    """NAME=VALUE: the value is a number, true, false, null, or else a text."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    for read in (json.loads, float):
        try:
            return name.strip(), read(value)
        except ValueError:
            continue
    return name.strip(), value
