"""The console script `sspo-ext`. What is wrong with its input is one message, and exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .._help import DefaultsFormatter
from . import rl, trace, train
from .arguments import checkpoint_of, lora_of, positive

# What is not in the command's own extra.
_EXTRAS = {"math_verify": "graders", "reasoning_gym": "graders", "vllm": "vllm"}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 when the arguments, a file or the installation do not allow what was asked."""
    parser = build_parser()
    options = parser.parse_args(argv)
    try:
        options.run(options)
        return 0
    except ModuleNotFoundError as error:
        root = (error.name or "").partition(".")[0]
        own = getattr(options, "grader", "").partition(":")[0].partition(".")[0]  # a grader's module is in no extra
        extra = None if root == own else _EXTRAS.get(root, options.extra)
        message = f"{error}; install it with: pip install 'sspo-ext[{extra}]'" if extra else str(error)
    except (ValueError, TypeError, OSError) as error:
        if options.traceback:
            raise
        message = str(error)
    print(f"sspo-ext {options.command}: error: {message}", file=sys.stderr)
    return 2


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sspo-ext", description="Step-wise preference optimisation for causal language models."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, extra: str | None, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            formatter_class=DefaultsFormatter,
        )
        sub.add_argument("--traceback", action="store_true", help="show where an error came from")
        sub.set_defaults(run=run, extra=extra)
        return sub

    command("info", _info, None, "versions, backends, and why a backend cannot run")
    train.add_arguments(command("train", train.run, "train", "train a causal LM on preference rows"))
    rl.add_arguments(command("rl", _rl, "train", "train a causal LM by SSPO on prompts with answers"), positive)
    trace.add_arguments(
        command("trace", trace.run, "train", "values, advantages and step preferences of given chains"), positive
    )
    demo = command("demo", _demo, "demo", "a small model learns to reason right and short, offline, in three minutes")
    demo.add_argument("--output-dir", default="sspo-demo", help="picture, numbers and model go here")
    demo.add_argument("--seed", type=int, default=0, help="of the problems and the samples")
    demo.add_argument("--updates", type=positive, default=40, help="of each arm")
    return parser


def _info(options: argparse.Namespace) -> None:
    from .info import report

    print(report())


def _demo(options: argparse.Namespace) -> None:
    from ..demo import DemoConfig, run

    run(options.output_dir, DemoConfig(seed=options.seed, updates=options.updates))


def _rl(options: argparse.Namespace) -> None:
    checkpoint = checkpoint_of(options)
    rl.run(options, checkpoint, lora_of(options))


if __name__ == "__main__":
    sys.exit(main())
