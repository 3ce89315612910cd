# SPDX-License-Identifier: Apache-2.0
"""What a call launches on a GPU, counted without one, and the time that it is PREDICTED to take.

    python -m benchmarks ledger [--rows 2048 8192 32768] [--vocab 32000 128256 151936 256000] [--hidden 4096]
                                [--head trained frozen] [--detail] [--out FOLDER]

The call runs on `meta` tensors, which have shapes and no data. A dispatch mode records every torch operation, and a
stand-in records every launch of a Triton kernel: how many, the bytes that they must read and write, the floating-point
operations of products, the copies from host to device, and whatever reads back.

PREDICTED is arithmetic, not a measurement. A product takes the longer of its operations at 73.6 % of the tensor cores'
published peak and its bytes at the published bandwidth. 73.6 % is what 42 ms for three products of 8192 x 4096 x 151936
on an H100 come to (huggingface/trl#7244). Everything else takes its bytes at 90 % of the bandwidth, and at least 2.5 us
a launch. `host` is 6 us an operation; it runs beside the device and is part of no sum.
"""

# pyright: reportMissingImports=false
# The peers' packages need not be installed.

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .record import MACHINES, Machine
from .torch_traffic import is_free, operand_bytes

PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989, "B200": 2250}  # bfloat16, dense; NVIDIA's data sheets
OF_PEAK, OF_BANDWIDTH, LAUNCH_US, HOST_US = 0.736, 0.9, 2.5, 6.0
_PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")


@dataclass
class Entry:
    """One launch on the device, or one copy or operation of the host."""

    name: str
    kind: str  # "gemm", "rows" (a Triton kernel), "torch", "to device", "read back", "host"
    loaded: int = 0  # bytes
    stored: int = 0
    flops: int = 0

    def seconds(self, machine: Machine) -> float:
        """PREDICTED time on the device."""
        moved = (self.loaded + self.stored) / (machine.bandwidth_gbs * 1e9)
        if self.kind == "gemm":
            return max(LAUNCH_US * 1e-6, moved, self.flops / (PEAK_TFLOPS[machine.name] * 1e12 * OF_PEAK))
        return max(LAUNCH_US * 1e-6, moved / OF_BANDWIDTH) if self.kind in ("rows", "torch") else 0.0


@dataclass
class Ledger:
    entries: list[Entry] = field(default_factory=list)

    def of(self, *kinds: str) -> list[Entry]:
        """The entries of these kinds, in order."""
        return [entry for entry in self.entries if entry.kind in kinds]

    @property
    def launches(self) -> int:
        """Everything that runs on the device."""
        return len(self.of("gemm", "rows", "torch"))

    @property
    def flops(self) -> int:
        """Floating-point operations of the products."""
        return sum(entry.flops for entry in self.entries)

    def ms(self, machine: Machine, *kinds: str) -> float:
        """PREDICTED milliseconds on the device, of all launches or of these kinds."""
        return 1e3 * sum(entry.seconds(machine) for entry in (self.of(*kinds) if kinds else self.entries))

    def names(self, *kinds: str) -> dict[str, int]:
        """How often each was launched, by name."""
        counts: dict[str, int] = {}
        for entry in self.of(*kinds):
            counts[entry.name] = counts.get(entry.name, 0) + 1
        return counts


class _Recorder(TorchDispatchMode):
    def __init__(self, ledger: Ledger):
        super().__init__()
        self.ledger = ledger

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "sspo":  # not the fake implementation, which meta tensors would get
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        with self:  # below autograd a composite operation, such as `to`, arrives whole
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        name = func.overloadpacket.__name__
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if name in ("_local_scalar_dense", "nonzero"):
            self.ledger.entries.append(Entry(name, "read back" if _on_device(given) else "host"))
        out = func(*args, **kwargs)
        if is_free(func):
            return out
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        loaded, stored = operand_bytes(func, args, kwargs, out)
        entry = Entry(name, "torch", loaded, stored)
        if not _on_device(given + made):
            entry.kind = "host"
        elif name in ("_to_copy", "copy_") and not _on_device(made):
            entry.kind = "read back"
        elif name in ("_to_copy", "copy_") and any(t.device.type == "cpu" for t in given):
            entry.kind = "to device"
        elif name in _PRODUCTS:
            left, right = [t for t in tree_leaves(args) if isinstance(t, Tensor)][-2:]
            entry.kind, entry.flops = "gemm", 2 * left.numel() * right.shape[-1]
        self.ledger.entries.append(entry)
        return out


def _on_device(tensors: list[Tensor]) -> bool:
    return any(t.device.type == "meta" for t in tensors)


def _kernel_bytes(name: str, arguments: dict[str, Any]) -> tuple[int, int]:
    """Bytes that a Triton kernel loads and stores. Ours by what they do; another's tensors are each read once."""

    def size(*names: str) -> int:
        return sum(t.nbytes for n in names if isinstance(t := arguments.get(n), Tensor))

    if name.startswith(("_token_logp_fwd", "_row_reductions_fwd")):
        row = arguments["V"] * arguments["logits_ptr"].itemsize * (1 + bool(arguments.get("HAS_REF")))
        return arguments["rows_ptr"].numel() * row, 0
    if name.startswith(("_token_logp_bwd", "_row_reductions_bwd")):
        row = arguments["V"] * arguments["logits_ptr"].itemsize * (1 + bool(arguments.get("HAS_REF")))
        return arguments["labels_ptr"].numel() * row, size("out_ptr")
    if name == "_scale_rows_kernel":
        return size("kept_ptr"), size("out_ptr")
    if name == "_backward_kernel" and "mm_ptr" in arguments:  # TRL's, in place
        return size("mm_ptr"), size("mm_ptr")
    return sum(t.nbytes for t in arguments.values() if isinstance(t, Tensor)), 0


@contextlib.contextmanager
def record() -> Iterator[Ledger]:
    """Records what runs inside it on `meta` tensors, with `backend="triton"`. Triton kernels are not run."""
    import sys

    from triton.runtime import interpreter, jit

    from sspo_ext import backends

    backends.load("triton")  # its modules are looked through below
    ledger, why_not = Ledger(), backends.why_not

    def launched(name: str, names: list[str], args: tuple, kwargs: dict) -> None:
        loaded, stored = _kernel_bytes(name, {**dict(zip(names, args, strict=False)), **kwargs})
        ledger.entries.append(Entry(name, "rows", loaded, stored))

    def run(self, *args, grid=None, warmup=False, **kwargs):
        launched(self.fn.__name__, self.arg_names, args, kwargs)

    def interpreted(self, *args, **kwargs):
        launched(self.fn.__name__, self.arg_names, args, kwargs)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(jit.JITFunction, "run", run))
        stack.enter_context(mock.patch.object(interpreter.GridExecutor, "__call__", interpreted))
        stack.enter_context(
            mock.patch.object(backends, "why_not", lambda n, d, t: None if n == "triton" else why_not(n, d, t))
        )
        counters = torch.zeros(1024, dtype=torch.int32, device="meta")
        for module in [m for name, m in sys.modules.items() if name.startswith("sspo_ext.backends.triton.")]:
            if hasattr(module, "arrival_counters"):
                stack.enter_context(mock.patch.object(module, "arrival_counters", lambda device: counters))
        stack.enter_context(_Recorder(ledger))
        yield ledger


@dataclass(frozen=True)
class Shape:
    """A batch of DPO pairs: N scored rows in sequences of 512, each one step, on a bfloat16 head (V, H)."""

    rows: int
    vocab: int
    hidden: int = 4096
    trained: bool = True
    bias: bool = False
    length: int = 512

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states (B, T + 1, H), weight (V, H), bias (V,) on `meta`."""
        batch = self.rows // self.length
        hidden = torch.empty(batch, self.length + 1, self.hidden, dtype=torch.bfloat16, device="meta")
        weight = torch.empty(self.vocab, self.hidden, dtype=torch.bfloat16, device="meta")
        bias = torch.empty(self.vocab, dtype=torch.bfloat16, device="meta") if self.bias else None
        return (
            hidden.requires_grad_(),
            weight.requires_grad_(self.trained),
            None if bias is None else bias.requires_grad_(self.trained),
        )

    def layout(self):
        """The layout, one step a sequence; on `meta`, what the host reads on the CPU."""
        from sspo_ext import StepLayout

        batch = self.rows // self.length
        ids = torch.zeros(batch, self.length + 1, dtype=torch.int64)
        ids[:, 0] = -1
        return StepLayout.from_step_ids(torch.zeros(batch, self.length + 1, dtype=torch.int64), ids).to("meta")


def ours(shape: Shape, **options) -> Ledger:
    """`linear_step_pref_loss` with its backward: the sigmoid loss, the reference's sums given, and further options."""
    from sspo_ext import linear_step_pref_loss

    (hidden, weight, bias), layout = shape.tensors(), shape.layout()
    ref, one = torch.zeros(layout.num_steps, device="meta"), torch.ones((), device="meta")
    with record() as ledger:
        out = linear_step_pref_loss(hidden, weight, layout, bias=bias, ref=ref, backend="triton", **options)
        out.loss.backward(one)
    return ledger


def bare(shape: Shape) -> Ledger:
    """The products alone, each over all rows at once."""
    hidden, weight, _ = (None if t is None else t.detach() for t in shape.tensors())
    assert hidden is not None and weight is not None
    rows = hidden[:, 1:].reshape(-1, shape.hidden)
    with record() as ledger:
        logits = torch.mm(rows, weight.t())
        torch.mm(logits, weight)
        if shape.trained:
            torch.mm(logits.t(), rows)
    return ledger


def plain_torch(shape: Shape) -> Ledger:
    """Logits of all rows, log_softmax in float32, DPO, backward: eager torch."""
    hidden, weight, bias = shape.tensors()
    labels = torch.zeros(shape.rows, 1, dtype=torch.int64, device="meta")
    with record() as ledger:
        logits = torch.nn.functional.linear(hidden[:, 1:], weight, bias).flatten(0, 1)
        logps = logits.float().log_softmax(-1).gather(-1, labels).view(-1, shape.length).sum(1)
        loss = -torch.nn.functional.logsigmoid(0.1 * (logps[::2] - logps[1::2])).mean()
        loss.backward(torch.ones((), device="meta"))
    return ledger


class _Torch:
    """torch as another package's module sees it, with some functions replaced; torch's own stay what they are."""

    def __init__(self, **replaced: Callable):
        self.__dict__.update(replaced)

    def __getattr__(self, name: str):
        return getattr(torch, name)


def trl_chunked(shape: Shape) -> Ledger:
    """TRL's chunked log-probs with its Triton kernels, and DPO on them."""
    from trl.kernels import chunked_logprob as trl

    hidden, weight, bias = shape.tensors()
    labels = torch.zeros(shape.rows, dtype=torch.int64, device="meta")

    def addmm(acc: Tensor, a: Tensor, b: Tensor) -> None:
        torch.addmm(acc, a, b, out_dtype=torch.float32, out=acc)

    # what TRL does on a CUDA device; autocast knows no meta device
    with (
        mock.patch.object(trl, "_use_triton", lambda d: True),
        mock.patch.object(trl, "_addmm_fp32", addmm),
        mock.patch.object(trl, "torch", _Torch(is_autocast_enabled=lambda *device: False)),
    ):
        with record() as ledger:
            rows = hidden[:, 1:].reshape(-1, shape.hidden)
            logps = trl.ChunkedLogProbFunction.apply(rows, weight, bias, labels, 1.0, 4096, None, 1.0, ())[0]
            logps = logps.view(-1, shape.length).sum(1)
            loss = -torch.nn.functional.logsigmoid(0.1 * (logps[::2] - logps[1::2])).mean()
            loss.backward(torch.ones((), device="meta"))
    return ledger


def liger_dpo(shape: Shape) -> Ledger:
    """Liger's fused linear DPO without a reference. Eager: torch.compile would fuse its elementwise operations."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss, dpo_loss

    hidden, weight, bias = shape.tensors()
    labels = torch.zeros(hidden.shape[:2], dtype=torch.int64, device="meta")
    # torch.func.grad does not let a mode see torch.tensor's detach_
    full = _Torch(tensor=lambda value, device=None: torch.full((), value, device=device))
    with mock.patch.object(dpo_loss, "torch", full), record() as ledger:
        LigerFusedLinearDPOLoss(compiled=False, use_ref_model=False)(weight, hidden, labels, bias)
    # its gradients are there; its backward asks whether the upstream gradient is 1
    ledger.entries.append(Entry("upstream gradient", "read back"))
    return ledger


METHODS: dict[str, Callable[[Shape], Ledger]] = {
    "bare GEMMs": bare,
    "sspo_ext": ours,
    "TRL chunked_logprob": trl_chunked,
    "Liger fused linear DPO, eager": liger_dpo,
    "plain torch": plain_torch,
}


def table(shapes: list[Shape], methods: list[str], machines: list[Machine]) -> str:
    """A line for each shape, method and machine."""
    lines = [
        "| rows | V | head | method | launches | GEMMs | TFLOP | other GB | copies in | reads back | "
        + " | ".join(f"{m.name}, ms | / bare" for m in machines)
        + " | of it rows, torch (H100) | host, ms |",
    ]
    lines.append("| --- " * (lines[0].count("|") - 1) + "|")
    h100 = next(m for m in MACHINES if m.name == "H100")
    for shape in shapes:
        floor = bare(shape)
        for name in methods:
            try:
                led = METHODS[name](shape)
            except ImportError as error:
                lines.append(f"| {shape.rows} | {shape.vocab} | | {name} | not counted: {error} |")
                continue
            other = sum(e.loaded + e.stored for e in led.of("rows", "torch")) / 1e9
            times = " | ".join(f"{led.ms(m):.1f} | {led.ms(m) / floor.ms(m):.2f}" for m in machines)
            lines.append(
                f"| {shape.rows} | {shape.vocab} | {'trained' if shape.trained else 'frozen'} | {name} | "
                f"{led.launches} | {len(led.of('gemm'))} | {led.flops / 1e12:.1f} | {other:.1f} | "
                f"{len(led.of('to device'))} | {len(led.of('read back'))} | {times} | "
                f"{led.ms(h100, 'rows'):.1f}, {led.ms(h100, 'torch'):.1f} | {len(led.entries) * HOST_US / 1e3:.1f} |"
            )
    return "\n".join(lines)


def detail(ledger: Ledger, machine: Machine) -> str:
    """A line for each name: how often, and its PREDICTED time."""
    lines = [f"| kind | what | count | GB | TFLOP | {machine.name}, ms |", "| --- " * 6 + "|"]
    for kind in ("gemm", "rows", "torch", "to device", "read back", "host"):
        for name in ledger.names(kind):
            same = [e for e in ledger.of(kind) if e.name == name]
            moved, flops = sum(e.loaded + e.stored for e in same) / 1e9, sum(e.flops for e in same) / 1e12
            ms = 1e3 * sum(e.seconds(machine) for e in same)
            lines.append(f"| {kind} | {name} | {len(same)} | {moved:.2f} | {flops:.1f} | {ms:.2f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks ledger", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 128256, 151936, 256000])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--head", nargs="+", choices=["trained", "frozen"], default=["trained", "frozen"])
    parser.add_argument("--method", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--detail", action="store_true", help="every operation of sspo_ext by name")
    parser.add_argument("--out", type=Path, help="folder for ledger.md")
    args = parser.parse_args(argv)
    shapes = [Shape(n, v, args.hidden, head == "trained") for head in args.head for v in args.vocab for n in args.rows]
    machines = [m for m in MACHINES if m.name in PEAK_TFLOPS]
    text = table(shapes, args.method, machines)
    if args.detail:
        h100 = next(m for m in machines if m.name == "H100")
        text += "".join(f"\n\n{shape}\n\n{detail(ours(shape), h100)}" for shape in shapes)
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        about = (__doc__ or "").split("\n\n", 2)[2].strip()  # without the command's form
        about = f"`python -m benchmarks ledger --out FOLDER`\n\n{about}"
        (args.out / "ledger.md").write_text(
            f"# What a call launches, and the time PREDICTED from it\n\n{about}\n\n{text}\n"
        )


if __name__ == "__main__":
    main()
