# SPDX-License-Identifier: Apache-2.0
"""The console script `sspo-ext`. A mistake in its input gives one message and exit code 2."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from .._help import DefaultsFormatter
from . import probe, rl, trace, train
from .arguments import positive
from .config import add_config, with_config
from .training import Interrupted

# Modules that are in another extra than the command's own.
_EXTRAS = {"math_verify": "graders", "reasoning_gym": "graders", "vllm": "vllm"}


class _CommandFormatter(DefaultsFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of description and example."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments; None: those of the process.

    Returns:
        Exit code: 0; 2 if the arguments, a file or the installation do not allow what was asked; 130 after Ctrl-C, 143
        after SIGTERM.
    """
    options = parsed(sys.argv[1:] if argv is None else argv)
    try:
        options.run(options)
        _leave_processes()
        return 0
    except ModuleNotFoundError as error:
        root = (error.name or "").partition(".")[0]
        graders = getattr(options, "grader", [])
        names = [graders] if isinstance(graders, str) else graders
        own = [name.partition(":")[0].partition(".")[0] for name in names]  # a grader's module is in no extra
        extra = None if root in own else _EXTRAS.get(root, options.extra)
        message = f"{error}; install it with: pip install 'sspo-ext[{extra}]'" if extra else str(error)
    except (ValueError, TypeError, OSError, ImportError) as error:
        if options.traceback:
            raise
        message = str(error)
    except Interrupted as stop:
        print(f"\nsspo-ext {options.command}: {stop}", file=sys.stderr)
        return stop.status
    except KeyboardInterrupt:
        # what a command keeps on the disk is whole at any moment
        begun = hasattr(options, "resume") and Path(options.output_dir).is_dir()
        more = "; give the same command with --resume to go on" if begun else ""
        print(f"\nsspo-ext {options.command}: interrupted{more}", file=sys.stderr)
        return 130
    print(f"sspo-ext {options.command}: error: {message}", file=sys.stderr)
    return 2


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The options of a command, of its config file too. A mistake ends the process with exit code 2."""
    parser = build_parser()
    (commands,) = (a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    command = commands.get(argv[0]) if argv else None
    if command is not None:
        try:
            argv = [argv[0], *with_config(command, argv[1:])]
        except (ValueError, OSError, ModuleNotFoundError) as error:
            command.error(str(error))
    return parser.parse_args(argv)


def _leave_processes() -> None:
    """Ends the processes' group and what holds it, while the interpreter is whole.

    The threads of a group that ends with the interpreter may want it once more, and abort the process.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        gc.collect()  # a trainer is in cycles, and its DDP model holds the group
        distributed.destroy_process_group()


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="sspo-ext",
        description="Step-wise preference optimisation for causal language models.",
        epilog="sspo-ext COMMAND --help shows the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"sspo-ext {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")

    def command(name: str, run: Callable[[argparse.Namespace], None], extra: str | None, text: str, **more: Any):
        more = {"description": text[0].upper() + text[1:] + ".", "usage": f"sspo-ext {name} [options]", **more}
        sub = commands.add_parser(name, help=text, formatter_class=_CommandFormatter, **more)
        add_config(sub)
        sub.add_argument("--traceback", action="store_true", help="show where an error came from")
        sub.set_defaults(run=run, extra=extra, default_of=sub.get_default)
        return sub

    command("info", _info, None, "show versions and backends, and why a backend cannot run")
    for module, name, text in (
        (train, "train", "train a causal LM on preference rows"),
        (rl, "rl", "train a causal LM by SSPO on prompts with answers"),
        (probe, "probe", "find the probe that makes a causal LM answer"),
        (trace, "trace", "compute values, advantages and step preferences of given chains"),
    ):
        more = {"description": module.DESCRIPTION, "epilog": f"example:\n  {module.EXAMPLE}"}
        folder = "" if module is probe else " --output-dir DIR"
        more["usage"] = f"sspo-ext {name} --model MODEL --data JSONL [JSONL ...]{folder} [options]"
        module.add_arguments(command(name, module.run, "train", text, **more))
    text = "train a small model to reason correctly and briefly: offline, in two minutes"
    demo = command("demo", _demo, "demo", text)
    demo.add_argument("--output-dir", default="sspo-demo", help="folder for the picture, the numbers and the model")
    demo.add_argument("--seed", type=int, default=0, help="seed of the problems and of the samples")
    text = "updates of each of the two trainings, in place of the demo's own number"
    demo.add_argument("--updates", type=positive, help=text)
    return parser


def _info(options: argparse.Namespace) -> None:
    from .info import report

    print(report())


def _demo(options: argparse.Namespace) -> None:
    from ..demo import DemoConfig, run

    given = {} if options.updates is None else {"updates": options.updates}
    run(options.output_dir, DemoConfig(seed=options.seed, **given))


if __name__ == "__main__":
    sys.exit(main())
