# SPDX-License-Identifier: Apache-2.0
"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import json

REPEATED = {"action": "append", "default": [], "metavar": "NAME=VALUE"}


def add_model(parser: argparse.ArgumentParser) -> None:
    """--model."""
    parser.add_argument(
        "--model", required=True,
        help="name on the Hugging Face hub, folder of a model or of an adapter (PEFT), folder with one .gguf file, or "
        ".gguf file",
    )  # fmt: skip


def add_loading(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """How the model is loaded."""
    group = parser.add_argument_group("loading the model")
    add = group.add_argument
    add(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16", "auto"),
        help="data type of the weights; auto: the checkpoint's own",
    )  # fmt: skip
    add("--attn-implementation", help="eager, sdpa, flash_attention_2, ... (default: the model's own)")
    add("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    return group


def add_prompts(group: argparse._ActionsContainer) -> None:
    """How the texts of a row become tokens."""
    text = "option of the chat template, such as enable_thinking=false; repeatable. A row's own come first"
    group.add_argument("--chat-template-option", type=setting, **REPEATED, help=text)
    group.add_argument(
        "--special-tokens", default="error", choices=("error", "allow"),
        help="what happens to a row with a text that spells a special token, such as <|im_end|>. error: the run stops; "
        "allow: the text becomes the token",
    )  # fmt: skip


def add_probe(group: argparse._ActionsContainer) -> None:
    """The probe that makes the model answer after each step."""
    add = group.add_argument
    add("--probe", default="en", help="a language (en, zh, ...), or a text that makes the model answer at once")
    add(
        "--probe-end", action="append", metavar="TEXT",
        help="text that must follow the answer, or one of several; repeatable (default: anything may follow)",
    )  # fmt: skip
    add("--probe-turn", action="store_true", help="ask in a new turn of the user, written by the chat template")


def _sharing(text: str) -> str | bool:
    # true and false: yes and no, as YAML reads them
    known: dict[str, str | bool] = {"auto": "auto", "yes": True, "no": False, "true": True, "false": False}
    if text not in known:
        raise argparse.ArgumentTypeError(f"expected auto, yes or no, got {text!r}")
    return known[text]


def add_route(group: argparse._ActionsContainer) -> None:
    """How log-probs are computed."""
    add = group.add_argument
    add(
        "--route", default="linear", choices=("linear", "logits", "auto"),
        help="linear: log-probs from the hidden states, without storing the logits; logits: from the model's logits; "
        "auto: linear if the model's LM head allows it",
    )  # fmt: skip
    add("--chunk-bytes", type=positive, help="linear route: bytes of the logits buffer (default: sspo_ext chooses)")
    add(
        "--backend", default="auto", choices=("auto", "cpu", "triton", "cuda", "reference"),
        help="what runs the kernels; sspo-ext info shows what auto takes",
    )  # fmt: skip


def add_optimisation(
    parser: argparse.ArgumentParser,
    *,
    unit: str,
    lr: float,
    lr_scheduler: str,
    batch_size: int,
    eval_batch_size: int,
    eval_batch: str,
) -> argparse._ArgumentGroup:
    """The optimiser, its batches and the adapter, with this command's defaults. `unit`: what a batch consists of."""
    group = parser.add_argument_group("optimisation")
    add = group.add_argument
    add("--lr", type=not_negative, default=lr, help="peak learning rate")
    add("--lr-scheduler", default=lr_scheduler, help="name of the learning-rate schedule in transformers")
    add("--warmup-steps", type=count, default=0, help="updates of linear warm-up")
    add("--optim", default="adamw_torch_fused", help="name of the optimiser in transformers")
    add("--weight-decay", type=not_negative, default=0.0, help="weight decay of the optimiser")
    add("--epochs", type=not_negative, default=1.0, help="passes over the training rows")
    add("--max-steps", type=updates, default=-1, help="number of updates, instead of --epochs; -1: by --epochs")
    add("--batch-size", type=positive, default=batch_size, help=f"{unit} in a micro-batch, on each device")
    add("--gradient-accumulation", type=positive, default=1, help="micro-batches in an update")
    add("--eval-batch-size", type=positive, default=eval_batch_size, help=eval_batch)
    add(
        "--lora-r", type=count, default=0, help="rank of a new LoRA adapter; 0: train all weights, or --model's adapter"
    )
    add("--lora-alpha", type=positive, help="scale of the LoRA adapter (default: twice the rank)")
    add(
        "--lora-target-modules", nargs="+", default=["all-linear"], metavar="NAME",
        help="modules that get an adapter, such as q_proj v_proj; all-linear: all linear layers but the LM head",
    )  # fmt: skip
    add(
        "--prefix-sharing", default="auto", type=_sharing, metavar="{auto,yes,no}",
        help="compute the tokens that texts of a batch have in common once; auto: where that pays",
    )  # fmt: skip
    add(
        "--disable-dropout", action=argparse.BooleanOptionalAction, default=True,
        help="train without dropout, the model's and the adapter's",
    )  # fmt: skip
    add("--gradient-checkpointing", action="store_true", help="use less memory and more time")
    add("--bf16", action="store_true", help="run the forward pass in bfloat16 (autocast)")
    add("--seed", type=count, default=0, help="seed of everything random")
    return group


def add_running(parser: argparse.ArgumentParser, *, logging_steps: int) -> None:
    """How often a training logs, saves and evaluates."""
    add = parser.add_argument_group("logging and saving").add_argument
    add("--logging-steps", type=positive, default=logging_steps, help="updates between two log lines")
    add("--save-steps", type=positive, default=200, help="updates between two checkpoints")
    add("--save-total-limit", type=positive, metavar="N", help="keep only the newest N checkpoints (default: all)")
    add(
        "--eval-steps", type=positive,
        help="updates between two evaluations (default: evaluate only before and after training)",
    )  # fmt: skip
    add("--report-to", default="none", help="where transformers logs, such as tensorboard or wandb")
    add("--push-to-hub", action="store_true", help="upload the trained model to the Hugging Face hub, with its card")
    add("--hub-model-id", metavar="NAME", help="its name there (default: that of --output-dir)")
    add("--dry-run", action="store_true", help="print three rows as they would be trained on, and stop")


def check_effect(options: argparse.Namespace, names: str, reason: str) -> None:
    """ValueError for an option that has another value than its default, and no effect.

    Args:
        options: of the command.
        names: the options, as attributes, separated by spaces.
        reason: why they have none, such as "without --eval-data".
    """
    for name in names.split():
        if getattr(options, name) != options.default_of(name):
            raise ValueError(f"--{name.replace('_', '-')}: has no effect {reason}; leave it out, or change that")


def check_training_effect(options: argparse.Namespace) -> None:
    """`check_effect` of the options that `train` and `rl` share."""
    if not options.eval_data:
        check_effect(options, "eval_steps", "without --eval-data")
    if not options.lora_r:
        check_effect(options, "lora_alpha lora_target_modules", "without --lora-r")
    if not options.push_to_hub:
        check_effect(options, "hub_model_id", "without --push-to-hub")
    if options.route == "logits":
        check_effect(options, "chunk_bytes", "with --route logits")
    if options.max_steps > 0:
        check_effect(options, "epochs", "with --max-steps")
    if options.lr_scheduler == "constant":
        check_effect(options, "warmup_steps", "with --lr-scheduler constant (constant_with_warmup has it)")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _whole(text, 1)


def count(text: str) -> int:
    """A whole number of at least 0."""
    return _whole(text, 0)


def updates(text: str) -> int:
    """A whole number of at least 1, or -1."""
    return -1 if text.strip() == "-1" else _whole(text, 1)


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
    return value


def not_negative(text: str) -> float:
    """A finite number, 0 or above."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a finite number, 0 or above, got {text!r}")
    return value


def assignment(text: str) -> tuple[str, float]:
    """NAME=NUMBER."""
    name, _, value = text.partition("=")
    try:
        return name.strip(), float(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected NAME=NUMBER, got {text!r}") from error


def setting(text: str) -> tuple[str, object]:
    """NAME=VALUE, where the value is a number, true, false, null, or else a text."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    for read in (json.loads, float):
        try:
            return name.strip(), read(value)
        except ValueError:
            continue
    return name.strip(), value
