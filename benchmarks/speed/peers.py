# SPDX-License-Identifier: Apache-2.0
"""The peers behind one small interface: a name, a function, and the reason why the peer cannot run here, or None.

A logits peer maps (N, V) logits and (N,) labels to (N,) log-probs. `problems.pair_loss` makes the loss from these with
a few torch ops. A linear peer computes the loss of a whole step from a `LinearProblem`. This includes the reference,
unless its sums are cached. `.backward()` gives the gradients. No code of a peer is copied: it is imported from the
peer's package, or the peer is not run.
"""

# pyright: reportMissingImports=false
# The peers' packages need not be installed.

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import sspo_ext
from sspo_ext.routes.linear.plan import pref_plan

from .problems import BETA, LinearProblem, LinearSpec, LogitsProblem, LogitsSpec

left_out: set[str] = set()  # parts of peers' names, from `--without`


def reason(peer: LogitsPeer | LinearPeer, problem: LinearProblem | None = None) -> str | None:
    """Why this peer is not measured, or None."""
    return "left out by --without" if any(part in peer.name for part in left_out) else peer.why_not(problem)


def never(*_) -> None:
    """A `why_not` for a peer that always runs."""
    return None


def imported(function: Callable[[], object], *, gpu: bool = False) -> Callable[..., str | None]:
    """A `why_not` for a peer that lives in another package."""

    def why_not(*_) -> str | None:
        if gpu and not torch.cuda.is_available():
            return "its Triton kernels need a GPU"
        try:
            function()
        except (ImportError, AttributeError) as error:
            return f"cannot be imported ({error})"
        return None

    return why_not


@dataclass(frozen=True)
class LogitsPeer:
    name: str
    logps: Callable[[Tensor, Tensor], Tensor]  # (N, V) logits, (N,) labels -> (N,)
    why_not: Callable[..., str | None] = never


def eager_logps(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function)


def _trl_selective_log_softmax():
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax


def _trl_logps(logits: Tensor, labels: Tensor) -> Tensor:
    # TRL's trainer calls it on (2, N / 2, V). The function loops over the first dimension.
    split = (2, -1) if len(labels) % 2 == 0 else (1, -1)
    return _trl_selective_log_softmax()(logits.view(*split, logits.shape[-1]), labels.view(*split)).flatten()


def _liger_ce():
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    return LigerCrossEntropyFunction


def _flash_ce():
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return cross_entropy_loss


def _trl_kernel():
    from trl.kernels import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy


LOGITS_PEERS = [
    LogitsPeer("TRL selective_log_softmax", _trl_logps, imported(_trl_selective_log_softmax)),
    LogitsPeer(
        "TRL selective_log_softmax_and_entropy",
        lambda logits, labels: _trl_kernel()(logits, labels)[0],
        imported(_trl_kernel, gpu=True),
    ),
    LogitsPeer("eager log_softmax + gather", eager_logps),
    LogitsPeer("torch.compile of it", lambda logits, labels: _compiled(eager_logps)(logits, labels)),
    LogitsPeer("F.cross_entropy", lambda logits, labels: -F.cross_entropy(logits, labels, reduction="none")),
    LogitsPeer(
        "Liger cross entropy",
        lambda logits, labels: -_liger_ce().apply(logits, labels, None, -100, 0.0, 0.0, "none")[0],
        imported(_liger_ce, gpu=True),
    ),
    LogitsPeer(
        "flash-attn cross entropy",
        lambda logits, labels: -_flash_ce()(logits, labels)[0],
        imported(_flash_ce, gpu=True),
    ),
]


def run_logits_peer(peer: LogitsPeer, problem: LogitsProblem, leaf: Tensor) -> None:
    problem.loss(peer.logps(leaf, problem.targets)).backward()


def run_ours(problem: LogitsProblem, leaf: Tensor, inplace: bool) -> None:
    sspo_ext.step_pref_loss(
        leaf, problem.layout, problem.pairs, ref=problem.ref, beta=BETA, inplace_backward=inplace
    ).loss.backward()


@dataclass(frozen=True)
class LinearPeer:
    name: str
    loss: Callable[[LinearProblem], Tensor]
    why_not: Callable[..., str | None] = never  # of a LinearProblem, or of None


def ours_linear(problem: LinearProblem) -> Tensor:
    ref, budget = problem.ref, problem.spec.chunk_bytes
    if problem.spec.ref == "live":
        with torch.no_grad():
            ref = sspo_ext.linear_step_logps(
                problem.ref_hidden, problem.ref_weight, problem.layout, chunk_bytes=budget
            ).sums
    return sspo_ext.linear_step_pref_loss(
        problem.hidden, problem.weight, problem.layout, problem.pairs, ref=ref, beta=BETA, chunk_bytes=budget
    ).loss


def _from_token_logps(problem: LinearProblem, logps: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The loss from `logps(hidden, weight)`.

    `hidden` is (B*T, H). `logps` returns the log-probs of all positions (B*T,), or of the scored ones (N,).
    """

    def scored(hidden: Tensor, weight: Tensor) -> Tensor:
        values = logps(hidden.flatten(0, 1), weight)
        return values if values.shape[0] == problem.layout.num_rows else values[problem.layout.rows]

    ref = problem.ref
    if problem.spec.ref == "live":
        with torch.no_grad():
            ref = problem.sums(scored(problem.ref_hidden, problem.ref_weight))
    return problem.loss(scored(problem.hidden, problem.weight), ref)


def _torch_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return eager_logps(hidden @ weight.t(), labels)


def torch_loss(problem: LinearProblem) -> Tensor:
    labels = problem.targets.flatten().clamp(min=0)
    return _from_token_logps(problem, lambda h, w: _torch_logps(h, w, labels))


def torch_float_loss(problem: LinearProblem) -> Tensor:
    """As in the original DPO code: logits in the model's dtype, all that follows in float32."""
    labels = problem.targets.flatten().clamp(min=0)
    return _from_token_logps(problem, lambda h, w: eager_logps((h @ w.t()).float(), labels))


def compiled_loss(problem: LinearProblem) -> Tensor:
    labels = problem.targets.flatten().clamp(min=0)
    return _from_token_logps(problem, lambda h, w: _compiled(_torch_logps)(h, w, labels))


def torch_scored_loss(problem: LinearProblem) -> Tensor:
    rows, labels = problem.layout.rows, problem.layout.labels
    return _from_token_logps(problem, lambda h, w: _torch_logps(h[rows], w, labels))


def _linear_cross_entropy():
    return F.linear_cross_entropy, torch.nn.LinearCrossEntropyOptions


def linear_cross_entropy_loss(problem: LinearProblem) -> Tensor:
    function, options = _linear_cross_entropy()
    return _from_token_logps(
        problem,
        lambda h, w: -function(h, w, problem.targets.flatten(), reduction="none", ignore_index=-100, options=options()),
    )


def _trl_chunked():
    from trl.trainer import utils

    # private names of TRL: a version without them raises AttributeError, and is then not run
    kernel = utils._ChunkedLogProbFunction  # pyright: ignore[reportPrivateImportUsage]
    return kernel, utils._CHUNKED_LOGPROB_CHUNK_SIZE


def trl_chunked_loss(problem: LinearProblem, rows: Tensor | None = None) -> Tensor:
    function, chunk = _trl_chunked()
    labels = problem.targets.flatten().clamp(min=0) if rows is None else problem.layout.labels

    def logps(hidden: Tensor, weight: Tensor) -> Tensor:
        hidden = hidden if rows is None else hidden[rows]
        return function.apply(hidden, weight, None, labels, 1.0, chunk, None, 1.0, ())[0]

    return _from_token_logps(problem, logps)


def _liger_dpo():
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    return LigerFusedLinearDPOLoss


def liger_dpo_loss(problem: LinearProblem) -> Tensor:
    """Liger's loss, which supports one step a sequence only.

    It takes no cached reference sums. It then runs without a reference, at the same cost.
    """
    live = problem.spec.ref == "live"
    module = _liger_dpo()(beta=BETA, compiled=False, use_ref_model=live)
    extra = {"ref_input": problem.ref_hidden, "ref_weight": problem.ref_weight} if live else {}
    return module(problem.weight, problem.hidden, problem.targets, **extra)[0]


OURS = LinearPeer("sspo_ext", ours_linear)

LIGER = LinearPeer("LigerFusedLinearDPOLoss", liger_dpo_loss, imported(_liger_dpo))

TORCH = LinearPeer("plain torch", torch_loss)

TRL = LinearPeer("TRL chunked log-probs", trl_chunked_loss, imported(_trl_chunked))

LINEAR_PEERS = [
    LIGER,
    TORCH,
    LinearPeer(
        "plain torch, float32 log_softmax",
        torch_float_loss,
        lambda problem: "in float32 it is plain torch" if problem.spec.dtype == torch.float32 else None,
    ),
    LinearPeer("plain torch, scored rows only", torch_scored_loss),
    LinearPeer("torch.compile", compiled_loss),
    TRL,
    LinearPeer(
        "TRL chunked, scored rows only",
        lambda problem: trl_chunked_loss(problem, problem.layout.rows),
        imported(_trl_chunked),
    ),
    LinearPeer("F.linear_cross_entropy", linear_cross_entropy_loss, imported(_linear_cross_entropy)),
]


def run_linear(peer: LinearPeer, problem: LinearProblem) -> None:
    peer.loss(problem).backward()


class BareGemms:
    """The GEMMs of this problem's plan and nothing else: the floor for our time. Its buffers exist already."""

    def __init__(self, problem: LinearProblem):
        spec, self.problem = problem.spec, problem
        trained = spec.head == "trained"
        plan = functools.partial(
            pref_plan,
            problem.layout,
            vocab=spec.vocab,
            hidden=spec.hidden,
            dtype=spec.dtype,
            chunk_bytes=spec.chunk_bytes,
        )
        self.plan = plan(problem.pairs, weight_gradient=trained)
        self.ref_plan = (
            plan(logps_only=True, hidden_gradient=False, weight_gradient=False) if spec.ref == "live" else None
        )
        rows = problem.layout.num_rows
        device = problem.hidden.device
        make = functools.partial(torch.zeros, dtype=spec.dtype, device=device)
        self.hidden = problem.hidden.detach().flatten(0, 1)[problem.layout.rows].contiguous()
        self.logits = make((min(rows, self.plan.chunk_rows), spec.vocab))
        self.d_hidden = make((rows, spec.hidden))
        self.d_weight = make((spec.vocab, spec.hidden)) if trained else None

    def __call__(self) -> None:
        with torch.no_grad():
            weight = self.problem.weight.detach()
            for plan in (self.ref_plan, self.plan):
                for group in plan.groups if plan is not None else ():
                    again = group.chunks[:-1] if group.kind == "recompute" else []
                    for start, end in [*group.chunks, *again]:
                        torch.mm(self.hidden[start:end], weight.t(), out=self.logits[: end - start])
                    for start, end in group.chunks if group.kind != "logps" else ():
                        gradient = self.logits[: end - start]
                        torch.mm(gradient, weight, out=self.d_hidden[start:end])
                        if self.d_weight is not None:
                            self.d_weight.addmm_(gradient.t(), self.hidden[start:end], beta=float(start > 0))


def build_logits(name: str, spec: LogitsSpec) -> Callable[[], None]:
    """One loss and backward of a contestant, for a process of its own, to which only the name is sent."""

    def make(spec: LogitsSpec) -> Callable[[], None]:
        problem = LogitsProblem(spec)
        if name.startswith("sspo_ext"):
            return functools.partial(run_ours, problem, problem.leaf(), "in place" in name)
        peer = next(p for p in LOGITS_PEERS if p.name == name)
        return functools.partial(run_logits_peer, peer, problem, problem.scored_leaf())

    return _warm(make, name, spec, replace(spec, rows=8, vocab=64))


def build_linear(name: str, spec: LinearSpec) -> Callable[[], None]:
    """As `build_logits`, on the linear route."""
    peer = next(p for p in [OURS, *LINEAR_PEERS] if p.name == name)

    def make(spec: LinearSpec) -> Callable[[], None]:
        return functools.partial(run_linear, peer, LinearProblem(spec))

    return _warm(make, name, spec, replace(spec, length=8, vocab=64, hidden=16, step=None))


def _warm(make: Callable, name: str, spec, small) -> Callable[[], None]:
    """The contestant on `spec`, after a first run.

    Imports and first calls are no part of a step's memory, so a small problem runs first. torch.compile compiles for
    the shapes it sees. There the problem itself runs first, and its second run is measured.
    """
    if "torch.compile" not in name:
        make(small)()
        return make(spec)
    run = make(spec)
    run()
    for value in run.args:
        if isinstance(value, LinearProblem):
            value.clear()
        elif isinstance(value, Tensor):
            value.grad = None
    return run
