# SPDX-License-Identifier: Apache-2.0
"""What test_gpu.py holds a backend to on real sizes: log-probs and gradients of sampled rows against float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from helpers.truth import assert_fp64_rule
from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses.logps import step_logps

EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Size:
    rows: int  # N, each one scored
    vocab: int
    dtype: torch.dtype = torch.bfloat16
    softcap: float | None = None
    temperature: float = 1.0
    inplace: bool = False

    def __str__(self) -> str:
        parts = [f"{self.rows}x{self.vocab}", str(self.dtype).removeprefix("torch.")]
        parts += ["softcap"] if self.softcap else []
        return "-".join(parts + (["in place"] if self.inplace else []))

    @property
    def bytes(self) -> int:
        return (self.rows + 1) * self.vocab * self.dtype.itemsize


def packed_layout(rows: int, vocab: int, step: int = 32) -> StepLayout:
    """One sequence of N + 1 tokens, all but the first scored, in steps of `step`."""
    labels = torch.randint(vocab, (rows + 1,), generator=torch.Generator().manual_seed(1))
    edges = torch.arange(1, rows + 1, step)
    spans = torch.stack([edges, (edges + step).clamp(max=rows + 1)], 1)
    return StepLayout.from_offsets(labels, torch.tensor([0, rows + 1]), spans)


def needs_memory(device: str, wanted: int) -> None:
    if device == "cuda" and torch.cuda.mem_get_info()[0] < wanted:
        pytest.skip(f"needs {wanted / 2**30:.0f} GiB of free GPU memory")


def make_logits(size: Size, device: str) -> torch.Tensor:
    """(N + 1, V), a slice of rows at a time: the random numbers are float32."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.empty((size.rows + 1, size.vocab), dtype=size.dtype, device=device)
    for part in logits.split(1024):
        part.copy_(torch.randn(part.shape, generator=generator, device=device) * 4)
    return logits


def check(size: Size, backend: str, device: str) -> None:
    """One forward and backward; every row is run, some are compared, the last of them far into the buffer."""
    needs_memory(device, size.bytes * (1 if size.inplace else 2) + (2 << 30))
    layout = packed_layout(size.rows, size.vocab).to(device)
    logits = make_logits(size, device)
    sample = torch.linspace(0, size.rows - 1, min(8, size.rows)).round().long().to(device)
    kept, labels = logits[sample].clone(), layout.labels[sample].long()
    upstream = torch.linspace(-1.5, 2.0, size.rows, device=device)
    leaf = logits.requires_grad_()
    options = {"temperature": size.temperature, "logit_softcap": size.softcap, "backend": backend}
    out = step_logps(leaf, layout, inplace_backward=size.inplace, **options)
    out.tokens.backward(upstream)
    gradient = leaf.grad

    def expected(dtype: torch.dtype):
        x = kept.to(dtype).requires_grad_()
        z = x if size.softcap is None else size.softcap * torch.tanh(x / size.softcap)
        logps = (z / size.temperature).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
        (d_x,) = torch.autograd.grad(logps, x, upstream[sample].to(dtype))
        return logps.detach(), d_x

    (logps, d_x), (logps32, d_x32) = expected(torch.float64), expected(torch.float32)
    reach = max(1.0, size.softcap or 0) / size.temperature
    assert_fp64_rule(out.tokens.detach()[sample], logps32, logps, size.vocab, "log-probs", scale=reach)
    weight = 2 * EPS / torch.finfo(size.dtype).eps * upstream.abs().max().item() / size.temperature
    assert_fp64_rule(gradient[sample], d_x32.to(size.dtype), d_x, 1, "gradient", scale=weight)
    assert not gradient[size.rows].any(), "a position without a scored token has a gradient"
    if size.softcap is None:  # then a softmax's gradient adds up to nothing, in every row and not only those compared
        totals = [part.double().sum(-1).abs().max() for part in gradient[: size.rows].split(256)]
        total, coef = torch.stack(totals).max().item(), upstream.abs().max().item() / size.temperature
        assert total < 4 * torch.finfo(size.dtype).eps * coef, total
