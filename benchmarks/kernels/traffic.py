# SPDX-License-Identifier: Apache-2.0
"""Bytes that Triton kernels load and store, ours and the peers', counted in Triton's interpreter next to the minimum.

    python -m benchmarks traffic [--vocab 32000 50257] [--dtype bfloat16] [--out FOLDER] [--json FILE]

Half of the batch's positions are scored. Forward gives log-probabilities, backward the gradient of all logits. The
minimum forward is one read of the scored rows. The minimum backward is one read of them and one write of the whole
gradient. The bytes of unmasked lanes are counted: what the program asks for, before caches and sectors. Only launches
of Triton kernels are counted. Torch operations around a peer's kernels are not, which favours the peer. For a method
made of torch operations each operand is counted once (torch_traffic.py): a lower bound. This needs no GPU and measures
no time.
"""

# pyright: reportMissingImports=false
# The peers' packages need not be installed.

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import records

from ..speed.measure import versions
from .torch_traffic import TorchTraffic, count_torch

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when a kernel is defined

VOCABULARIES = (32000, 50257, 128256, 151936, 256000)


@dataclass
class Launch:
    kernel: str
    grid: tuple[int, ...]
    loaded: int = 0  # bytes
    stored: int = 0


@dataclass
class Traffic:
    launches: list[Launch] = field(default_factory=list)

    @property
    def loaded(self) -> int:
        return sum(launch.loaded for launch in self.launches)

    @property
    def stored(self) -> int:
        return sum(launch.stored for launch in self.launches)


@contextlib.contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Counts the bytes that every Triton kernel launched inside it loads and stores.

    The kernels must be interpreted (TRITON_INTERPRET=1).
    """
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    do_load, do_store, do_atomic = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw
    do_launch = executor.__call__
    traffic = Traffic()

    def lanes(mask) -> int:
        return int(mask.data.sum())

    def size(pointers) -> int:
        return pointers.get_element_ty().primitive_bitwidth // 8

    def load(self, pointers, mask, *args):
        traffic.launches[-1].loaded += lanes(mask) * size(pointers)
        return do_load(self, pointers, mask, *args)

    def store(self, pointers, value, mask, *args):
        traffic.launches[-1].stored += lanes(mask) * size(pointers)
        return do_store(self, pointers, value, mask, *args)

    def atomic(self, op, pointers, value, mask, *args):
        traffic.launches[-1].loaded += lanes(mask) * size(pointers)
        traffic.launches[-1].stored += lanes(mask) * size(pointers)
        return do_atomic(self, op, pointers, value, mask, *args)

    def launch(self, *args, **kwargs):
        grid: Any = self.grid(kwargs) if callable(self.grid) else self.grid
        traffic.launches.append(Launch(self.fn.__name__, tuple(grid)))
        return do_launch(self, *args, **kwargs)

    memory = mock.patch.multiple(builder, create_masked_load=load, create_masked_store=store, create_atomic_rmw=atomic)
    with memory, mock.patch.object(executor, "__call__", launch):
        yield traffic


class Work:
    """A pair of sequences of one step each. Prompt positions and the last position are not scored."""

    def __init__(self, V: int, dtype: torch.dtype, T: int = 4, prompt: int = 1):
        generator = torch.Generator().manual_seed(0)
        self.logits = torch.randn(2, T, V, generator=generator).to(dtype)
        self.labels = torch.randint(V, (2, T), generator=generator)
        self.step_ids = torch.zeros(2, T, dtype=torch.int64)
        self.step_ids[:, : prompt + 1] = -1  # of the labels; the logits of a label are at the position before it
        self.shifted = torch.full((2, T), -100)
        self.shifted[:, :-1] = torch.where(self.step_ids >= 0, self.labels, -100)[:, 1:]
        self.scored_bytes = int((self.shifted != -100).sum()) * V * dtype.itemsize
        self.gradient_bytes = 2 * T * V * dtype.itemsize


# A method computes its forward from a Work and its logits, and returns what is differentiated. It raises ImportError
# if its package is missing.


def sspo_ext_loss(work: Work, logits: torch.Tensor) -> torch.Tensor:
    from sspo_ext.losses.pref import step_pref_loss

    return step_pref_loss(logits, work.labels, work.step_ids, backend="triton").loss


def sspo_ext_loss_in_place(work: Work, logits: torch.Tensor) -> torch.Tensor:
    from sspo_ext.losses.pref import step_pref_loss

    return step_pref_loss(logits * 1, work.labels, work.step_ids, backend="triton", inplace_backward=True).loss


def liger_cross_entropy(work: Work, logits: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    flat = (logits * 1).view(-1, logits.shape[-1])  # Liger writes the gradient over its input
    return LigerCrossEntropyFunction.apply(flat, work.shifted.view(-1), None, -100, 0.0, 0.0, "mean", None, False)[0]


def liger_log_probs(work: Work, logits: torch.Tensor) -> torch.Tensor:
    """The forward of Liger's GRPO loss. It has no backward."""
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    labels = work.shifted[:, :-1].contiguous()
    return fused_selective_log_softmax(logits, labels.clamp(min=0), 1.0, (labels != -100).int())


def trl_log_probs(work: Work, logits: torch.Tensor) -> torch.Tensor:
    from trl.kernels import selective_log_softmax_and_entropy

    scored = work.shifted != -100
    return selective_log_softmax_and_entropy(logits, work.shifted.clamp(min=0), 1.0, scored)[0].sum()


def torch_log_probs(work: Work, logits: torch.Tensor) -> torch.Tensor:
    """In float32, as in the original DPO code."""
    logps = logits.float().log_softmax(-1).gather(-1, work.shifted.clamp(min=0)[..., None])[..., 0]
    return (logps * (work.shifted != -100)).sum()


def trl_torch_log_probs(work: Work, logits: torch.Tensor) -> torch.Tensor:
    """What TRL's trainers call by default, without TRL's Triton kernel."""
    from trl.trainer.utils import selective_log_softmax

    return (selective_log_softmax(logits, work.shifted.clamp(min=0)) * (work.shifted != -100)).sum()


def flash_attn_cross_entropy(work: Work, logits: torch.Tensor) -> torch.Tensor:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return cross_entropy_loss(logits.view(-1, logits.shape[-1]), work.shifted.view(-1))[0].sum()


METHODS: dict[str, Callable[[Work, torch.Tensor], torch.Tensor]] = {
    "sspo_ext step_pref_loss": sspo_ext_loss,
    "sspo_ext, in place": sspo_ext_loss_in_place,
    "liger cross_entropy, upstream 1": liger_cross_entropy,
    "liger cross_entropy, upstream 0.5": liger_cross_entropy,
    "liger selective_log_softmax": liger_log_probs,
    "trl selective_log_softmax_and_entropy": trl_log_probs,
    "flash-attn cross_entropy": flash_attn_cross_entropy,
    "torch: trl selective_log_softmax": trl_torch_log_probs,
    "torch: float, log_softmax, gather": torch_log_probs,
}


@dataclass
class Row:
    method: str
    V: int
    dtype: str
    launches: int  # forward and backward
    read_forward: float  # in scored rows' bytes
    written_forward: float  # in the gradient's bytes
    read_backward: float
    written_backward: float
    # all bytes over two reads of the scored rows and one write of the gradient (one read if there is no backward)
    of_minimum: float


def measure(method: str, V: int, dtype: torch.dtype) -> Row:
    work = Work(V, dtype)
    logits = work.logits.clone().requires_grad_()
    counter = count_torch if method.startswith("torch") else count_traffic
    with counter() as forward:
        out = METHODS[method](work, logits)
    with counter() as backward:
        if out.requires_grad:
            out.backward(torch.tensor(0.5 if method.endswith("0.5") else 1.0))
    rows, gradient = work.scored_bytes, work.gradient_bytes
    minimum = 2 * rows + gradient if out.requires_grad else rows
    return Row(
        method,
        V,
        str(dtype).removeprefix("torch."),
        _launches(forward) + _launches(backward),
        forward.loaded / rows,
        forward.stored / gradient,
        backward.loaded / rows,
        backward.stored / gradient,
        (forward.loaded + forward.stored + backward.loaded + backward.stored) / minimum,
    )


def _launches(traffic: Traffic | TorchTraffic) -> int:
    return traffic.launches if isinstance(traffic, TorchTraffic) else len(traffic.launches)


def table(rows: list[Row]) -> str:
    header = "| method | V | dtype | launches | fwd read | fwd written | bwd read | bwd written | of minimum |"
    lines = [header, "| --- " * 9 + "|"]
    for r in rows:
        parts = (r.read_forward, r.written_forward, r.read_backward, r.written_backward, r.of_minimum)
        lines.append(
            f"| {r.method} | {r.V} | {r.dtype} | {r.launches} | " + " | ".join(f"{x:.3f}" for x in parts) + " |"
        )
    return "\n".join(lines)


UNITS = "read: in bytes of the scored rows. written: in bytes of the whole gradient. The minimum is 1, 0, 1, 1."


def load(path: Path) -> tuple[dict, list[Row]]:
    """(versions and the methods that were not counted, from the first line; the rows)."""
    about, *rows = records.read(path) or [{"versions": versions(), "missing": {}}]
    return about, [Row(**row) for row in rows]


def write(folder: Path, about: dict, rows: list[Row]) -> None:
    """Writes traffic.jsonl and traffic.md."""
    records.write(folder / "traffic.jsonl", [about, *map(asdict, rows)])
    (folder / "traffic.md").write_text(markdown(about, rows))


def markdown(about: dict, rows: list[Row]) -> str:
    parts = [
        "# Bytes that the kernels ask for",
        "`python -m benchmarks traffic --dtype bfloat16 float32 --out FOLDER`",
        f"Counted in Triton's interpreter on a machine without a GPU ({about['versions']}): no time is in these "
        "tables. The batch has 8 positions of which 4 are scored: so few rows that ours shares each row's vocabulary "
        "among programs, whose partial results and labels are the third decimal. " + UNITS,
        '"in place" writes the gradient over the logits. With an upstream gradient that is not 1, Liger multiplies '
        "its finished gradient in a launch of its own. `selective_log_softmax` of Liger has no backward. Lines that "
        'begin with "torch" are torch operations, each operand counted once: at least so much, and launches are '
        "operations.",
        *(f"* {method} was not counted: {reason}." for method, reason in about["missing"].items()),
        table(rows),
    ]
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks traffic", description=__doc__ and __doc__.splitlines()[0]
    )
    parser.add_argument("--vocab", type=int, nargs="+", default=VOCABULARIES)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--method", nargs="+", default=list(METHODS), help="parts of methods' names")
    parser.add_argument("--out", type=Path, help="folder for traffic.jsonl and .md; rows that are there are kept")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    about, rows = load(args.out / "traffic.jsonl") if args.out else ({"versions": versions(), "missing": {}}, [])
    done = {(row.method, row.V, row.dtype) for row in rows}
    for V in args.vocab:
        for dtype in args.dtype:
            for method in METHODS:
                if any(part in method for part in args.method) and (method, V, dtype) not in done:
                    try:
                        rows.append(measure(method, V, getattr(torch, dtype)))
                        about["versions"] = versions()
                        about["missing"].pop(method, None)
                    except ImportError as error:
                        about["missing"][method] = str(error)
            if args.out:  # after each vocabulary and dtype: interpreted kernels take minutes
                order = list(METHODS)
                rows.sort(key=lambda row: (row.V, row.dtype, order.index(row.method)))
                write(args.out, about, rows)
    print(table(rows))
    for method, reason in about["missing"].items():
        print(f"{method} was not counted: {reason}")
    print(f"\n{UNITS}")
    if args.json:
        records.write(args.json, [asdict(row) for row in rows])


if __name__ == "__main__":
    main()
