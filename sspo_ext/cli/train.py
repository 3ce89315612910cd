# SPDX-License-Identifier: Apache-2.0
"""`sspo-ext train`: preference training from files of pairs. Imports nothing heavy until it runs."""

from __future__ import annotations

import argparse

from .arguments import (
    REPEATED,
    add_loading,
    add_model,
    add_optimisation,
    add_prompts,
    add_route,
    add_running,
    assignment,
    check_effect,
    check_training_effect,
    positive,
)
from .dry_run import print_pairs
from .training import checkpoint_of, comparison, load, lora_of, train_and_save, training_arguments

DESCRIPTION = """\
Train a causal language model on preference rows.
Both responses of a row are split into steps, and their steps are compared."""

EXAMPLE = "sspo-ext train --model MODEL --data pairs.jsonl --output-dir out"

_METRICS = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sspo-ext train`."""
    add_model(parser)
    add = parser.add_argument
    add(
        "--data", required=True, nargs="+", metavar="JSONL",
        help="training rows with prompt, chosen and rejected; for all forms of a row see "
        "sspo_ext.data.rows.load_preference_rows",
    )  # fmt: skip
    add("--eval-data", nargs="+", metavar="JSONL", help="held-out rows, evaluated before and after training")
    add(
        "--skip-equal",
        action="store_true",
        help="leave out rows whose chosen and rejected are the same, and count them",
    )
    add(
        "--output-dir",
        required=True,
        metavar="DIR",
        help="folder for checkpoints, the reference cache and the trained model",
    )
    add("--resume", action="store_true", help="continue from the newest whole checkpoint in --output-dir")
    _add_pairs(parser)
    _add_loss(parser)
    optimisation = add_optimisation(
        parser, unit="rows", lr=5e-6, lr_scheduler="linear", batch_size=2, eval_batch_size=8,
        eval_batch="rows in a batch of the evaluation and of the reference pass, on each device",
    )  # fmt: skip
    optimisation.add_argument(
        "--packing", action="store_true", help="put the rows of a batch into one, without padding"
    )
    add_running(parser, logging_steps=10)
    add_loading(parser)


def _add_pairs(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("steps and pairs")
    add_prompts(group)
    add = group.add_argument
    add(
        "--split-by", default="newline",
        help="where a response is split into steps: newline, blank_line, numbered, or a regular expression",
    )  # fmt: skip
    add(
        "--pairing", default="index", choices=("index", "branch", "sequence"),
        help="which steps are compared. index: step k with step k; branch: the first step that differs; sequence: the "
        "whole responses (DPO)",
    )  # fmt: skip
    add(
        "--token-weights", default="uniform", choices=("uniform", "divergence"),
        help="which tokens of a step count. uniform: all; divergence: the first one in which the two steps differ",
    )  # fmt: skip
    add("--max-length", type=positive, default=1024, help="most tokens of prompt and response")
    add(
        "--overflow", default="drop", choices=("drop", "cut", "error"),
        help="what happens to a longer row. drop: it is left out; cut: only steps that fit are compared; error: the "
        "run stops",
    )  # fmt: skip


def _add_loss(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("loss")
    add = group.add_argument
    add(
        "--loss-type", nargs="+", default=["sigmoid"], metavar="NAME",
        help="a loss of docs/losses.md, or several, which are added (default: sigmoid)",
    )  # fmt: skip
    add("--loss-weights", nargs="+", type=float, metavar="WEIGHT", help="weight of each loss (default: 1 each)")
    add("--beta", type=float, help="scale of the rewards (default: the loss's own)")
    add("--label-smoothing", type=float, default=0.0, help="probability that chosen and rejected are swapped")
    add(
        "--loss-option", type=assignment, **{**REPEATED, "metavar": "NAME=NUMBER"},
        help="option of a loss, such as simpo_gamma=0.5; repeatable",
    )  # fmt: skip
    add("--reference-free", action="store_true", help="train without a reference model")
    add(
        "--reference-cache",
        metavar="DIR",
        help="folder of cached reference log-probs (default: reference_cache in --output-dir)",
    )
    add_route(group)


def run(options: argparse.Namespace) -> None:
    """Train, evaluate before and after, and save the model."""
    from ..data.rows import load_preference_rows

    # Cheap checks come first: arguments, then rows, then the model.
    _check_options(options)
    checkpoint = checkpoint_of(options)
    skip = {"skip_equal": options.skip_equal}
    rows = load_preference_rows(options.data, **skip)
    held_out = load_preference_rows(options.eval_data, **skip) if options.eval_data else None

    from transformers import set_seed

    from ..data.tokenize import tokenize_rows
    from ..train.models import load_tokenizer
    from ..train.preference_config import StepPreferenceConfig
    from ..train.preference_trainer import StepPreferenceTrainer

    lora = lora_of(options)
    args = StepPreferenceConfig(
        **training_arguments(options, evaluated=held_out is not None),
        loss_weights=options.loss_weights,
        label_smoothing=options.label_smoothing,
        loss_options=dict(options.loss_option) or None,
        reference_free=options.reference_free,
        reference_cache=options.reference_cache,
        packing=options.packing,
    )
    tokenizer = load_tokenizer(options.model, trust_remote_code=options.trust_remote_code)
    split = {"split_by": options.split_by, "pair_by": options.pairing, "max_length": options.max_length}
    split |= {"overflow": options.overflow, "token_weights": options.token_weights}
    split |= {"chat_template_kwargs": dict(options.chat_template_option), "special_tokens": options.special_tokens}
    train_set = tokenize_rows(rows, tokenizer, **split)
    eval_set = None if held_out is None else tokenize_rows(held_out, tokenizer, **split)
    if options.dry_run:
        print_pairs(train_set, tokenizer)
        return
    model, _ = load(options, tokenizer)
    set_seed(options.seed)
    trainer = StepPreferenceTrainer(model, args, train_set, eval_set, processing_class=tokenizer, peft_config=lora)
    if trainer.is_world_process_zero():
        print(f"{len(train_set)} rows, {sum(len(f['pairs']) for f in train_set)} pairs of steps")
    evaluations = train_and_save(trainer, options, checkpoint, evaluated=eval_set is not None)
    if evaluations is None or not trainer.is_world_process_zero():
        return
    if evaluations:
        print("\n" + comparison("held-out", _METRICS, *evaluations))
    print(f"\nsaved to {options.output_dir}")


def _check_options(options: argparse.Namespace) -> None:
    """ValueError for options that do not fit, or have no effect."""
    from ..objective.pair_arguments import checked_label, checked_options, chosen_formulas
    from ..signals.split import split_text

    check_training_effect(options)
    formulas = chosen_formulas(options.loss_type, options.loss_weights)
    if options.reference_free or all(formula.reference == "forbidden" for formula, _ in formulas):
        check_effect(options, "reference_cache", "without a reference")
        if not options.eval_data:
            check_effect(options, "eval_batch_size", "without a reference and without --eval-data")
    checked_options(formulas, options.beta, dict(options.loss_option))
    checked_label(formulas, options.loss_type, options.label_smoothing, soft_labels=False)
    split_text("", options.split_by)
