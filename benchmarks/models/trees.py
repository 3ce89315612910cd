# SPDX-License-Identifier: Apache-2.0
"""Compares a tree of sequences with each sequence alone, on tiny models of many families.

    python -m benchmarks trees             # prints the table and writes benchmarks/results/trees.md (a minute)

Log-probs of scored tokens, a preference loss on both routes, and its gradient for every parameter. Every model is tiny,
its random weights are large, and sliding windows are shorter than the sequences. No weights are downloaded.
"""

from __future__ import annotations

import argparse
import os
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sspo_ext.hf.forward import forward_hidden
from sspo_ext.hf.head import model_head
from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses.logps import linear_step_logps, step_logps
from sspo_ext.losses.pref import linear_step_pref_loss, step_pref_loss
from sspo_ext.tree import TokenTree, tree_attention, tree_inputs

from .families import build

_WINDOW = dict(sliding_window=8)
_WINDOWS = _WINDOW | dict(layer_types=["sliding_attention", "full_attention"])
_MOE = dict(output_router_logits=False)

# name: (attention, options of the config)
MODELS: dict[str, tuple[str, dict]] = {
    "llama": ("sdpa", {}),
    "llama-tied": ("sdpa", {}),
    "qwen2": ("sdpa", {}),
    "qwen3": ("sdpa", {}),
    "gemma2": ("eager", _WINDOWS),
    "gemma3": ("sdpa", _WINDOWS),
    "mistral": ("sdpa", _WINDOW),
    "gpt2": ("sdpa", {}),
    "opt": ("sdpa", {}),
    "mixtral": ("sdpa", _WINDOW | _MOE),
    "qwen2-moe": ("sdpa", _MOE),
}
ATTENTIONS = ("sspo_tree", "sdpa", "eager")
ROUTES = ("logits", "linear")


@dataclass
class Batch:
    """Sequences, the chosen ones first, with the steps of each."""

    sequences: list[Tensor]
    step_ids: list[Tensor]
    labels: list[Tensor]

    @property
    def groups(self) -> list[int]:
        """The prompt of each sequence."""
        return list(range(len(self.sequences) // 2)) * 2


def batch(seed: int = 0) -> Batch:
    """Three pairs: they part in the first step, in the second one, or where the chosen sequence ends."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> list[int]:
        return torch.randint(3, 97, (n,), generator=generator).tolist()

    chosen, rejected = [], []
    for prompt, shared, ends in ((11, 0, (9, 7)), (9, 6, (8, 5)), (14, 7, (0, 6))):
        start = tokens(prompt + shared)
        for side, n in zip((chosen, rejected), ends, strict=True):
            steps = [-1] * prompt + [k // 5 for k in range(shared + n)]
            side.append((start + tokens(n), steps))
    pairs = [*chosen, *rejected]
    ids, steps = ([torch.tensor(pair[k]) for pair in pairs] for k in (0, 1))
    return Batch(ids, steps, [t.masked_fill(s < 0, -100) for t, s in zip(ids, steps, strict=True)])


class InFloat64(TorchFunctionMode):
    """A float64 model stays one: its norms, softmaxes and routers ask for float32 and get float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype in (torch.float64, torch.int64):
            if func is Tensor.float or func is Tensor.to and torch.float32 in (*args[1:], *kwargs.values()):
                return args[0].double()
            if kwargs.get("dtype") == torch.float32:
                kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


def shared(model: nn.Module, b: Batch, route: str, max_tokens: int | None = None) -> tuple[Tensor, StepLayout]:
    """Logits or hidden states on a tree's grid, and the layout for them."""
    tree = TokenTree.from_sequences(b.sequences, groups=b.groups, max_tokens=max_tokens)
    return _forward(model, route, tree_inputs(model, tree)), StepLayout.from_tree(tree, b.labels, b.step_ids)


def alone(model: nn.Module, b: Batch, route: str) -> tuple[Tensor, StepLayout]:
    """The same of each sequence in a forward of its own, one after the other."""
    found = torch.cat([_forward(model, route, {"input_ids": ids[None]})[0] for ids in b.sequences])
    ends = torch.tensor([0, *map(len, b.sequences)]).cumsum(0)
    spans = [
        (int(end - len(s) + (s < k).sum()), int(end - len(s) + (s <= k).sum()))
        for s, end in zip(b.step_ids, ends[1:], strict=True)
        for k in range(int(s.max()) + 1)
    ]
    return found, StepLayout.from_offsets(torch.cat(b.labels), ends, torch.tensor(spans))


def _forward(model: nn.Module, route: str, inputs: dict[str, Any]) -> Tensor:
    dtype = next(model.parameters()).dtype
    with InFloat64() if dtype == torch.float64 else nullcontext():
        if route == "linear":
            return forward_hidden(model, **inputs)[0]
        return model(**inputs, use_cache=False).logits


def results(
    model: nn.Module, found: Tensor, layout: StepLayout, route: str
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Log-probs of the scored tokens, the loss, and its gradients."""
    model.zero_grad()
    if route == "linear":
        head = model_head(model)
        logps = linear_step_logps(found.detach(), head.weight.detach(), layout, **head.options).tokens
        out = linear_step_pref_loss(found, head.weight, layout, beta=0.7, reference_free=True, **head.options)
    else:
        logps = step_logps(found.detach(), layout).tokens
        out = step_pref_loss(found, layout, beta=0.7, reference_free=True)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logps, out.loss.detach(), grads


@dataclass
class Row:
    """The largest differences between a tree and each sequence alone."""

    d_logps: float
    d_loss: float
    d_grad: float  # over all elements of all parameters
    loss: float
    max_grad: float
    parameters: int  # tensors with a gradient


def compare(name: str, dtype: torch.dtype, route: str, attention: str = "", max_tokens: int | None = None) -> Row:
    default, options = MODELS[name]
    model, b = build(name, dtype, **options), batch()
    with tree_attention(model, attention or default):
        expected_logps, expected, expected_grads = results(model, *alone(model, b, route), route)
        logps, loss, grads = results(model, *shared(model, b, route, max_tokens), route)
    if grads.keys() != expected_grads.keys():
        raise AssertionError(f"{name}: other parameters got a gradient: {grads.keys() ^ expected_grads.keys()}")
    return Row(
        d_logps=(logps - expected_logps).abs().max().item(),
        d_loss=(loss - expected).abs().item(),
        d_grad=max((grads[k] - g).abs().max().item() for k, g in expected_grads.items()),
        loss=expected.item(),
        max_grad=max(g.abs().max().item() for g in expected_grads.values()),
        parameters=len(grads),
    )


def table() -> list[str]:
    lines = [
        "| model | attention | route | loss | max grad | Δ log-prob, fp64 | Δ loss, fp64 | Δ grad, fp64 "
        "| Δ log-prob, fp32 | Δ loss, fp32 | Δ grad, fp32 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, (default, _) in MODELS.items():
        for attention in ATTENTIONS if default == "sdpa" else (default,):
            for route in ROUTES:
                r64, r = (compare(name, dtype, route, attention) for dtype in (torch.float64, torch.float32))
                lines.append(
                    f"| {name} | {attention} | {route} | {r64.loss:.4f} | {r64.max_grad:.2g} "
                    f"| {r64.d_logps:.1e} | {r64.d_loss:.1e} | {r64.d_grad:.1e} "
                    f"| {r.d_logps:.1e} | {r.d_loss:.1e} | {r.d_grad:.1e} |"
                )
    return lines


_TEXT = """# Trees against separate sequences

Written by `python -m benchmarks trees`; change benchmarks/models/trees.py, not this file.
torch {torch}, transformers {transformers}, CPU.

Tiny random models, three pairs of sequences ({unshared} tokens, {tokens} as a tree). Sliding windows are 8 tokens, the
paths {longest}. A sigmoid loss over the pairs of steps. Each number is the largest absolute difference between one
forward of the tree and a forward of each sequence alone: of the log-probs of the scored tokens, of the loss, and of the
gradient over every element of every parameter. In float64 the models' own casts to float32 (norms, softmax, routers)
are kept in float64. Gemma-2 has no SDPA in this transformers.

{table}
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "trees.md")
    args = parser.parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore")
    import transformers

    transformers.logging.set_verbosity_error()
    rows = table()
    print("\n".join(rows))
    b = batch()
    tree = TokenTree.from_sequences(cast(Any, b.sequences), groups=b.groups)
    args.out.write_text(
        _TEXT.format(
            torch=torch.__version__.split("+")[0],
            transformers=transformers.__version__,
            unshared=tree.num_unshared_tokens,
            tokens=tree.num_tokens,
            longest=f"{min(map(len, b.sequences))} to {tree.longest}",
            table="\n".join(rows),
        )
    )


if __name__ == "__main__":
    main()
