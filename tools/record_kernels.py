# SPDX-License-Identifier: Apache-2.0
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false, reportReturnType=false, reportPrivateImportUsage=false
# (calls are made from tables of options, for the package of today and for older ones)
"""The cases of record_outputs.py for the kernels' wing: layouts, plans, log-probs, losses and their gradients.

Problems are tiny and made from seeds. Every loss, dtype and backend that runs on a CPU is in them; Triton's kernels are
interpreted, a few rows at a time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from record_outputs import Record, find
from torch import Tensor

import sspo_ext
from sspo_ext import (
    StepLayout,
    StepLogps,
    StepPairs,
    StepPrefLoss,
    linear_step_logps,
    linear_step_policy_loss,
    linear_step_pref_loss,
    pref_loss,
    step_logps,
    step_policy_loss,
    step_pref_loss,
)

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = {"fp32": FP32, "bf16": BF16, "fp16": FP16, "fp64": FP64}
_LOSS_MODULES = ("losses", "losses.unpaired", "losses.transport", "losses.lists", "losses.targets", "losses.tokens")
_OLD_LOSS_MODULES = ("batch_losses", "step_losses", "token_losses")


def loss_function(name: str):
    return find(*(f"{module}:{name}" for module in _OLD_LOSS_MODULES + _LOSS_MODULES))


def token_weight_function(name: str):
    return find(f"token_weights:{name}", f"losses.token_weights:{name}")


# ---- problems


_IDS = [
    [-1, -1, 0, 0, 0, 1, 1, 2, 2, 2, 3, -1],
    [-1, -1, -1, 0, 0, 1, 1, 1, 1, 2, 2, 2],
    [-1, 0, 0, 1, 1, 1, 3, 3, 3, 3, -1, -1],  # its step 2 is empty
    [-1, -1, 0, 0, 1, 1, 2, 2, 2, 2, 2, 2],
]


def make_layout(kind: str = "padded", vocab: int = 37, token_weights: bool = False, seed: int = 0) -> StepLayout:
    """Four sequences with holes, an empty step and a step of ignored labels: padded, packed, two tiny ones, or with
    nothing scored."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.tensor(_IDS)
    if kind == "tiny":  # Triton's interpreter takes seconds for what a kernel does in microseconds
        ids = ids[::2, 1:8]
    labels = torch.randint(0, vocab, ids.shape, generator=g)
    weights = torch.rand(ids.shape, generator=g) + 0.25
    labels[ids < 0] = -100
    labels[0, 6] = -100
    labels[-1, 4:6] = -100
    if kind == "nothing":
        labels[:] = -100
    if kind != "packed":
        return StepLayout.from_step_ids(labels, ids, token_weights=weights if token_weights else None)
    spans = []
    for b, row in enumerate(_IDS):
        for step in range(max(row) + 1):
            at = [b * 12 + t for t, s in enumerate(row) if s == step]
            spans.append([at[0], at[-1] + 1] if at else [spans[-1][1]] * 2)
    return StepLayout.from_offsets(
        labels.flatten(), torch.arange(5) * 12, torch.tensor(spans),
        token_weights=weights.flatten() if token_weights else None,
    )  # fmt: skip


def make_values(layout: StepLayout, seed: int = 0) -> SimpleNamespace:
    """Constants of every shape that the losses take."""
    g = torch.Generator().manual_seed(seed + 100)
    pairs = layout.pair_by_index()
    P, S, N, B = pairs.num_pairs, layout.num_steps, layout.num_rows, layout.num_sequences
    rand, randn = (lambda *n: torch.rand(n, generator=g)), (lambda *n: torch.randn(n, generator=g))
    return SimpleNamespace(
        pairs=pairs, ref=randn(S) * 2 - 5, ref_rows=randn(N) - 3, ref_tokens=randn(*layout.shape) - 3,
        weights=rand(P) + 0.5, margins=randn(P) * 0.1, soft_labels=rand(P), advantages=randn(S),
        row_advantages=randn(N), old=randn(N) * 0.4 - 3, values=rand(S), rewards=rand(B),
        outcomes=(rand(B) > 0.5).float(),
        row_weights=rand(N) + 0.3, levels=torch.randint(0, 3, (S,), generator=g),
        graph=torch.tensor([[0, 4], [1, 5], [2, 0], [9, 3], [1, 10]]) % S,
    )  # fmt: skip


def arguments(v: SimpleNamespace, names) -> dict:
    """Some of the values, by the names that calls have for them."""
    known_as = {"row_weights": "token_weights", "graph": "pairs"}
    return {known_as.get(name, name): getattr(v, name) for name in names}


def make_logits(layout: StepLayout, vocab: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed + 7)
    return (torch.randn(*layout.shape, vocab, generator=g, dtype=FP64) * 3).to(dtype).requires_grad_()


def make_head(layout: StepLayout, vocab: int, dtype: torch.dtype, hidden: int = 16, seed: int = 0):
    g = torch.Generator().manual_seed(seed + 13)
    shapes = ((*layout.shape, hidden), (vocab, hidden), (vocab,))
    return [torch.randn(s, generator=g, dtype=FP64).to(dtype).requires_grad_() for s in shapes]


def gradients(loss: Tensor, **leaves) -> dict:
    loss.backward()
    return {f"d_{name}": "none" if t.grad is None else t.grad for name, t in leaves.items() if t is not None}


def of_pref(out) -> dict:
    """What a StepPrefOutput says publicly."""
    return {
        "loss": out.loss, "step_logps": out.step_logps, "pair_losses": out.pair_losses, "rewards": out.rewards,
        "term_losses": out.term_losses, "loss_types": out.loss_types, "metrics": out.metrics,
    }  # fmt: skip


def of_policy(out) -> dict:
    parts = {"loss": out.loss, "tokens": out.tokens, "step_logps": out.step_logps, "metrics": out.metrics}
    return parts if out.entropy is None else {**parts, "entropy": out.entropy}


def of_logps(out: StepLogps) -> dict:
    names = ("sums", "counts", "means", "tokens", "entropy", "sum_p2", "kl")
    return {name: value for name in names if (value := getattr(out, name)) is not None}


def mixed_sum(out: StepLogps) -> Tensor:
    """A scalar with another weight on every entry, so that each gradient counts."""
    total = 0.0
    for i, name in enumerate(("sums", "tokens", "entropy", "sum_p2", "kl")):
        value = getattr(out, name)
        if value is not None:
            total = total + (value * torch.linspace(0.5 + i, 1.5 - i, len(value), dtype=value.dtype)).sum()
    return total


# ---- the logits route


def run_pref(kind: str, dtype: torch.dtype, loss_type, *, vocab: int = 37, layout=None, names=(), ref="ref", **options):
    layout = make_layout(kind, vocab) if layout is None else layout
    v = make_values(layout)
    logits = make_logits(layout, vocab, dtype)
    options.update(arguments(v, names))
    if ref is not None:
        options["ref"] = getattr(v, ref)
    inplace = options.get("inplace_backward")
    # an in-place gradient needs logits that are no leaf
    given = logits * 1 if inplace else logits
    out = step_pref_loss(given, layout, options.pop("pairs", v.pairs), loss_type=loss_type, **options)
    parts = of_pref(out)
    return {**parts, **gradients(out.loss * 1.7 if inplace else out.loss, logits=logits)}


def other_options(formula) -> dict:
    """Values that are not the defaults, of the options of one loss."""
    return {name: default * 1.3 + 0.07 for name, default in formula.options.items()}


def facts_of(formula) -> SimpleNamespace:
    """What must and what may be given beside one loss type."""
    base = {"ref": None if formula.reference == "forbidden" else "ref"}
    if formula.smoothing == "required":
        base["label_smoothing"] = 0.1
    names = ["weights"] + (["margins"] if formula.margins else [])
    return SimpleNamespace(base=base, names=names, soft=formula.soft_labels, smooth=formula.smoothing == "optional")


def pair_formulas() -> dict:
    return find("heads:PAIR_HEADS", "formulas:PAIR_FORMULAS", "formulas.registry:PAIR_FORMULAS", "formulas:PAIR_HEADS")


MIXTURES = {
    "dpo+sft": (["sigmoid", "sft"], {"loss_weights": [1.0, 0.2]}),
    "rpo": (["sigmoid", "nll"], {}),
    "flex": (["flex_dpo", "nll", "nll_rejected"], {"loss_weights": [1.0, 0.3, -0.1], "beta_rejected": 0.2}),
    "cpo+sft": (["cpo", "sft"], {"loss_weights": [1, 0.7], "cpo_alpha": 0.0, "ref": None}),
    "hinge+ipo+bco": (["hinge", "ipo", "bco_pair"], {"names": ("weights", "margins"), "beta": 0.3}),
    "robust+simpo": (["robust", "simpo"], {"label_smoothing": 0.2}),
}


def varied(rec: Record, prefix: str, run, **fixed):
    """A function that records `run` under prefix/name, with what is fixed and what is given."""

    def one(name: str, kind: str = "padded", **more) -> None:
        rec.case(f"{prefix}/{name}", run, kind, **{**fixed, **more})

    return one


def logits_pref(rec: Record) -> None:
    for loss_type, formula in pair_formulas().items():
        facts = facts_of(formula)
        for backend in ("cpu", "reference", "auto"):
            for name, dtype in DTYPES.items():
                one = varied(rec, f"{loss_type}/{backend}/{name}", run_pref, dtype=dtype, loss_type=loss_type,
                             backend=backend, **facts.base)  # fmt: skip
                one("default")
                if backend == "auto" or name not in ("fp32", "fp64"):
                    continue
                one("options", **other_options(formula))
                one("per pair", names=facts.names, **({"label_smoothing": 0.15} if facts.smooth else {}))
                one("packed", "packed", reduction="sum")
                if facts.soft:
                    one("soft labels", names=["soft_labels"], label_smoothing=0.0)
    for loss_type in ("sigmoid", "ipo", "simpo"):
        ref = None if loss_type == "simpo" else "ref"
        for backend in ("cpu", "reference"):
            for name, dtype in DTYPES.items():
                one = varied(rec, f"call/{loss_type}/{backend}/{name}", run_pref, dtype=dtype, loss_type=loss_type,
                             backend=backend, ref=ref)  # fmt: skip
                general_variants(one, ref)
                if backend == "cpu":
                    one("inplace", inplace_backward=True)
                    one("inplace, packed", "packed", inplace_backward=True, logit_softcap=5.0)
    # one interpreted pass over the rows for all the losses
    every = {"loss_type": list(pair_formulas()), "label_smoothing": 0.1, "vocab": 11}
    for dtype, variants in {
        "fp32": {
            "all losses": every, "softcap": {"logit_softcap": 4.0, "temperature": 0.7}, "nothing": {"kind": "nothing"},
            "all losses, soft labels": {**every, "label_smoothing": 0.0,
                                        "names": ["weights", "margins", "soft_labels"]},
            "inplace": {"inplace_backward": True}, "packed": {"kind": "packed", "vocab": 11}, "large": {"vocab": 2100},
        },
        "bf16": {"plain": {}, "softcap": {"logit_softcap": 4.0}, "large": {"vocab": 2100}},
        "fp16": {"plain": {}, "inplace": {"inplace_backward": True}},
    }.items():  # fmt: skip
        for name, more in variants.items():
            rec.case(f"triton/{dtype}/{name}", run_pref, **{"kind": "tiny", "dtype": DTYPES[dtype],
                     "loss_type": "sigmoid", "backend": "triton", **more})  # fmt: skip
    for name, (loss_type, more) in MIXTURES.items():
        for backend in ("cpu", "reference"):
            for dtype in DTYPES:
                rec.case(f"mixture {name}/{backend}/{dtype}", run_pref, "padded", DTYPES[dtype], loss_type,
                         backend=backend, **more)  # fmt: skip
    rec.case("module", run_module)
    rec.case("plain tensors", run_plain_tensors)
    rec.case("refusals", refusals)


def general_variants(one, ref) -> None:
    """Arguments that every pair loss of every route has."""
    one("sum", reduction="sum")
    one("num_items", num_items=7)
    one("num_items tensor", num_items=torch.tensor(5.0))
    one("no items", num_items=0)
    one("map", temperature=0.7, logit_softcap=6.0, logit_scale=0.5)
    one("scale", temperature=1.3, logit_scale=2.0)
    one("token weights", layout=make_layout(token_weights=True))
    one("row weights", names=["row_weights"])
    one("packed, token weights", layout=make_layout("packed", token_weights=True))
    one("nothing", "nothing")
    one("graph", names=["graph"])
    one("wide", vocab=1031)
    if ref is not None:
        one("ref rows", ref="ref_rows")
        one("ref tokens", ref="ref_tokens")
        one("no ref", ref=None)


def run_module() -> dict:
    layout = make_layout()
    v, logits = make_values(layout), make_logits(layout, 37, FP32)
    criterion = StepPrefLoss(loss_type="ipo", beta=0.2)
    out = criterion(logits, layout, v.pairs, ref=v.ref)
    return {"repr": repr(criterion), **of_pref(out), **gradients(out.loss, logits=logits)}


def run_plain_tensors() -> dict:
    ids = torch.tensor(_IDS)
    labels = torch.randint(0, 37, ids.shape).masked_fill(ids < 0, -100)
    logits = torch.randn(*ids.shape, 37, requires_grad=True)
    out = step_pref_loss(logits, labels, ids, token_weights=torch.rand(ids.shape) + 0.1)
    logps = step_logps(logits, labels, ids)
    return {"pref": of_pref(out), "logps": of_logps(logps), **gradients(out.loss, logits=logits)}


def refusals() -> dict:
    """What wrong arguments are answered. Messages that name modules are left out: a move renames those."""
    layout = make_layout()
    v, logits = make_values(layout), make_logits(layout, 37, FP32)
    hidden, weight, _ = make_head(layout, 37, FP32)
    calls = {
        "loss_type": lambda: step_pref_loss(logits, layout, loss_type="dpo"),
        "option": lambda: step_pref_loss(logits, layout, loss_type="sigmoid", simpo_gamma=1.0),
        "needs ref": lambda: step_pref_loss(logits, layout, loss_type="sppo"),
        "forbids ref": lambda: step_pref_loss(logits, layout, loss_type="simpo", ref=v.ref),
        "shape": lambda: step_pref_loss(logits[:, :-1], layout),
        "labels": lambda: step_pref_loss(logits[..., :5], layout),
        "temperature": lambda: step_logps(logits, layout, temperature=0.0),
        "pairs": lambda: step_pref_loss(logits, layout, torch.tensor([[0, 99]])),
        "same step": lambda: StepPairs.from_index(layout, torch.tensor([[3, 3]])),
        "ids": lambda: StepLayout.from_step_ids(torch.zeros(1, 4, dtype=torch.long), torch.tensor([[0, 1, 0, 1]])),
        "backend": lambda: step_logps(logits, layout, backend="cuda"),
        "advantages": lambda: step_policy_loss(logits, layout, v.advantages[:2]),
        "weight": lambda: linear_step_logps(hidden, weight[:, :3], layout),
        "chunk": lambda: linear_step_logps(hidden, weight, layout, chunk_bytes=0),
        "ppo": lambda: step_policy_loss(logits, layout, v.advantages, loss_type="ppo", delta=1.0),
    }
    told = {}
    for name, call in calls.items():
        try:
            call()
            told[name] = "accepted"
        except Exception as error:
            told[name] = f"{type(error).__name__}: {error}"
    return told


def run_logps(kind: str, dtype: torch.dtype, *, vocab: int = 37, layout=None, kl: bool = False, **options) -> dict:
    layout = make_layout(kind, vocab) if layout is None else layout
    logits = make_logits(layout, vocab, dtype)
    if kl:
        options["kl_ref_logits"] = make_logits(layout, vocab, dtype, seed=5)
    inplace = options.get("inplace_backward")
    out = step_logps(logits * 1 if inplace else logits, layout, **options)
    return {**of_logps(out), **gradients(mixed_sum(out), logits=logits)}


REDUCTIONS = {
    "plain": {}, "entropy": {"entropy": True}, "sum_p2": {"sum_p2": True}, "kl": {"kl": True},
    "all": {"entropy": True, "sum_p2": True, "kl": True},
}  # fmt: skip


def logits_logps(rec: Record) -> None:
    for backend in ("cpu", "reference", "triton"):
        interpreted = backend == "triton"
        for name, dtype in list(DTYPES.items())[: 3 if interpreted else 4]:
            for asked, options in REDUCTIONS.items():
                if interpreted and name != "fp32" and asked != "all":
                    continue
                one = varied(rec, f"{backend}/{name}/{asked}", run_logps, dtype=dtype, backend=backend, **options)
                if interpreted:
                    one("tiny", "tiny")
                else:
                    one("padded")
                    one("packed", layout=make_layout("packed", token_weights=True))
                    one("wide", vocab=1031)
                if not interpreted or (name == "fp32" and asked == "all"):
                    one("map", "tiny", temperature=0.8, logit_softcap=5.0, logit_scale=1.5)
                    one("nothing", "nothing")
                    one("large", "tiny", vocab=2100)
                if backend == "cpu":
                    one("inplace", inplace_backward=True)


# ---- the linear route


def run_linear(
    kind: str, dtype: torch.dtype, call, of, *, vocab: int = 37, layout=None, names=(), ref=None, needs=(1, 1, 0),
    rows: int | None = None, first=(), weight_dtype=None, upstream: float = 1.0, buffer=None, kl: bool = False,
    with_bias: bool | None = None, twice: bool = False, autocast=None, **options,
) -> dict:  # fmt: skip
    """One call of a function of the linear route, and its gradients: `rows` a chunk, those that are in `needs`."""
    layout = make_layout(kind, vocab) if layout is None else layout
    v = make_values(layout)
    made = zip(make_head(layout, vocab, dtype), needs, strict=True)
    hidden, weight, bias = (t.detach().requires_grad_(bool(n)) for t, n in made)
    if weight_dtype is not None:
        weight = weight.detach().to(weight_dtype).requires_grad_(bool(needs[1]))
    bias = bias if (needs[2] if with_bias is None else with_bias) else None
    options.update(arguments(v, names))
    first = [getattr(v, name) for name in first]
    if ref is not None:
        options["ref"] = getattr(v, ref)
    if rows is not None:
        options["chunk_bytes"] = rows * vocab * dtype.itemsize
    if kl:
        options["kl_ref_hidden"] = make_head(layout, vocab, dtype, seed=3)[0]
        if kl == "own head":
            options["kl_ref_hidden"], options["kl_ref_weight"], options["kl_ref_bias"] = (
                t.detach() for t in make_head(layout, vocab, dtype, hidden=8, seed=3)
            )
    if buffer is not None:
        options["weight_grad"] = torch.full(weight.shape, 0.5, dtype=buffer)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        out = call(hidden, weight, layout, *first, bias=bias, **options)
    loss = mixed_sum(out) if isinstance(out, StepLogps) else out.loss
    made = of(out)
    if loss.requires_grad:
        if twice:
            (loss * upstream).backward(retain_graph=True)
        made.update(gradients(loss * upstream, hidden=hidden, weight=weight, bias=bias))
    if buffer is not None:
        made["buffer"] = options["weight_grad"]
    return made


LINEAR_VARIANTS = {
    "trained": {}, "trained, 6 rows": {"rows": 6}, "recompute": {"rows": 2}, "frozen": {"needs": (1, 0, 0)},
    "frozen, 6 rows, scaled": {"needs": (1, 0, 0), "rows": 6, "upstream": -0.7}, "bias": {"needs": (1, 1, 1),
    "rows": 6},
    "bias, recompute": {"needs": (1, 1, 1), "rows": 3, "upstream": 3.0}, "weight alone": {"needs": (0, 1, 0)},
    "bias alone": {"needs": (0, 0, 1), "rows": 5}, "constant bias": {"needs": (1, 1, 0), "with_bias": True},
    "no gradient": {"needs": (0, 0, 0), "rows": 6}, "packed": {"kind": "packed", "rows": 8},
    "scaled": {"rows": 6, "upstream": 1.7}, "twice": {"rows": 6, "twice": True},
    "map": {"temperature": 0.7, "logit_softcap": 6.0, "logit_scale": 0.5, "rows": 7},
    "nothing": {"kind": "nothing"}, "wide": {"vocab": 1031, "rows": 7}, "one row": {"rows": 1},
    "weighted": {"layout": "weighted", "rows": 6}, "row weights": {"names": ["row_weights"], "rows": 6},
}  # fmt: skip


def linear_variants(dtype: str) -> dict:
    """The variants that a dtype has: buffers and mixed dtypes differ."""
    made = dict(LINEAR_VARIANTS)
    for name, more in {
        "buffer": {"buffer": FP64 if dtype == "fp64" else FP32, "rows": 6},
        "buffer, scaled": {"buffer": DTYPES[dtype], "rows": 3, "upstream": 0.3},
        "accum": {"accum_dtype": DTYPES[dtype], "rows": 6},
    }.items():
        made[name] = more
    if dtype in ("bf16", "fp16"):
        made["fp32 weight"] = {"weight_dtype": FP32, "rows": 6}
    if dtype == "fp32":
        made["bf16 weight"] = {"weight_dtype": BF16, "rows": 6}
        made["autocast"] = {"autocast": BF16, "rows": 6}
    return made


def run_all_linear(rec: Record, prefix: str, call, of, dtypes=DTYPES, skip=(), reference=(), **fixed) -> None:
    """Every variant on the CPU's kernels and, for those in `reference`, on the reference."""
    for dtype in dtypes:
        for name, more in linear_variants(dtype).items():
            if name in skip:
                continue
            options = {"kind": "padded", **fixed, **more}
            if options.get("layout") == "weighted":
                options["layout"] = make_layout(token_weights=True)
            rec.case(f"{prefix}/{dtype}/{name}", run_linear, dtype=DTYPES[dtype], call=call, of=of, **options)
            if name in reference:
                rec.case(f"{prefix}/{dtype}/{name}, reference", run_linear, dtype=DTYPES[dtype], call=call, of=of,
                         backend="reference", **options)  # fmt: skip


SOME = ("trained", "frozen", "bias", "no gradient", "packed", "map", "nothing", "weighted")


def linear(rec: Record) -> None:
    for loss_type, formula in pair_formulas().items():
        facts = facts_of(formula)
        for dtype in DTYPES:
            for name, more in {"trained": {"rows": 6}, "frozen": {"needs": (1, 0, 0)}}.items():
                rec.case(f"pref/{loss_type}/{dtype}/{name}", run_linear, "padded", DTYPES[dtype], linear_step_pref_loss,
                         of_pref, names=facts.names, loss_type=loss_type, **facts.base, **more)  # fmt: skip
        rec.case(f"pref/{loss_type}/options", run_linear, "padded", FP32, linear_step_pref_loss, of_pref, rows=6,
                 loss_type=loss_type, **facts.base, **other_options(formula))  # fmt: skip
    run_all_linear(rec, "pref, all", linear_step_pref_loss, of_pref, ref="ref", reference=SOME)
    run_all_linear(rec, "pref, graph", linear_step_pref_loss, of_pref, ref="ref", names=["graph"], skip=["row weights"],
                   dtypes=("fp32", "fp16"))  # fmt: skip
    for name, (loss_type, more) in MIXTURES.items():
        for dtype in DTYPES:
            rec.case(f"mixture {name}/{dtype}", run_linear, "padded", DTYPES[dtype], linear_step_pref_loss, of_pref,
                     loss_type=loss_type, rows=6, **{"ref": "ref", **more})  # fmt: skip
    for asked, more in {**REDUCTIONS, "kl, own head": {"kl": "own head"}}.items():
        run_all_linear(rec, f"logps/{asked}", linear_step_logps, of_logps, reference=SOME, skip=["row weights"], **more)
    for dtype in ("fp32", "bf16"):
        for name, call, of, more in (
            ("pref", linear_step_pref_loss, of_pref, {"ref": "ref"}),
            ("logps", linear_step_logps, of_logps, REDUCTIONS["all"]),
            ("policy", linear_step_policy_loss, of_policy, {"first": ["advantages"], "entropy_coef": 0.1}),
        ):
            rec.case(f"triton/{name}/{dtype}", run_linear, "tiny", DTYPES[dtype], call, of, backend="triton", rows=8,
                     needs=(1, 1, 1), **more)  # fmt: skip
    rec.case("one shard", run_one_shard)


def run_one_shard() -> dict:
    """The vocabulary-parallel route on a group of one process."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group, made = dist.group.WORLD, {}
        for name, call, of, more in (
            ("pref", linear_step_pref_loss, of_pref, {"ref": "ref"}),
            ("logps", linear_step_logps, of_logps, REDUCTIONS["all"]),
            ("policy", linear_step_policy_loss, of_policy, {"first": ["advantages"], "entropy_coef": 0.1}),
        ):
            for dtype in DTYPES:
                for variant, needs in {"trained": (1, 1, 1), "frozen": (1, 0, 0)}.items():
                    made[f"{name}/{dtype}/{variant}"] = run_linear(
                        "padded", DTYPES[dtype], call, of, rows=6, needs=needs, tp_group=group, **more
                    )
        return made
    finally:
        dist.destroy_process_group()


# ---- policy losses


def policy_options() -> dict:
    """Options of policy losses by name."""
    made = {}
    for head in ("reinforce", "ppo", "cispo"):
        old = {} if head == "reinforce" else {"names": ["old"]}
        for aggregation in ("token", "step", "sequence", "sum"):
            made[f"{head}/{aggregation}"] = {"loss_type": head, "aggregation": aggregation, **old}
        for estimator in ("k1", "k2", "k3"):
            made[f"{head}/{estimator}"] = {"loss_type": head, "kl_coef": 0.2, "kl_estimator": estimator,
                                           "ref": "ref_rows", **old}  # fmt: skip
        made[f"{head}/entropy"] = {"loss_type": head, "entropy_coef": 0.05, **old}
        made[f"{head}/threshold"] = {"loss_type": head, "prob_threshold": 0.05, "names": ["old"], "aggregation": "step"}
        made[f"{head}/tokens"] = {"loss_type": head, "first": ["row_advantages"], "num_items": 11, **old}
        made[f"{head}/all"] = {
            "loss_type": head, "kl_coef": 0.1, "ref": "ref_tokens", "entropy_coef": 0.02, "prob_threshold": 0.2,
            "names": ["old"], "aggregation": "sequence", "num_items": torch.tensor(3),
        }  # fmt: skip
        if head == "reinforce":
            continue
        made[f"{head}/without old"] = {"loss_type": head}
        for level in ("step", "sequence"):
            for normalize in (True, False):
                made[f"{head}/{level}/{normalize}"] = {
                    "loss_type": head, "importance_sampling_level": level, "length_normalize": normalize,
                    "entropy_coef": 0.03 if normalize else 0.0, **old,
                }  # fmt: skip
    made["ppo/clip"] = {"loss_type": "ppo", "epsilon": 0.1, "epsilon_high": 0.28, "delta": 1.5, "names": ["old"]}
    made["cispo/clip"] = {"loss_type": "cispo", "epsilon_high": 1.1, "names": ["old"]}
    return made


def run_policy(
    kind: str, dtype: torch.dtype, *, vocab: int = 37, layout=None, names=(), ref=None, first=None, **options
):
    layout = make_layout(kind, vocab) if layout is None else layout
    v = make_values(layout)
    logits = make_logits(layout, vocab, dtype)
    options.update(arguments(v, names))
    if ref is not None:
        options["ref"] = getattr(v, ref)
    inplace = options.get("inplace_backward")
    out = step_policy_loss(
        logits * 1 if inplace else logits, layout, getattr(v, (first or ["advantages"])[0]), **options
    )
    return {**of_policy(out), **gradients(out.loss, logits=logits)}


def policy(rec: Record) -> None:
    for name, options in policy_options().items():
        for dtype in DTYPES:
            for backend in ("cpu", "reference"):
                rec.case(
                    f"logits/{name}/{backend}/{dtype}", run_policy, "padded", DTYPES[dtype], backend=backend, **options
                )
            linear_options = {"first": ["advantages"], **options}
            for variant, more in {
                "trained": {"rows": 6}, "frozen": {"needs": (1, 0, 0)}, "bias, small": {"needs": (1, 1, 1), "rows": 2},
            }.items():  # fmt: skip
                rec.case(f"linear/{name}/{dtype}/{variant}", run_linear, "padded", DTYPES[dtype],
                         linear_step_policy_loss, of_policy, **linear_options, **more)  # fmt: skip
        rec.case(
            f"logits/{name}/packed", run_policy, None, FP32, layout=make_layout("packed", token_weights=True), **options
        )
        rec.case(f"linear/{name}/packed", run_linear, None, FP32, linear_step_policy_loss, of_policy, rows=9,
                 layout=make_layout("packed", token_weights=True), **linear_options)  # fmt: skip
    for name in ("ppo/all", "ppo/step/True", "reinforce/token"):
        options = policy_options()[name]
        run_all_linear(rec, f"linear, all/{name}", linear_step_policy_loss, of_policy, dtypes=("fp32", "bf16", "fp16"),
                       reference=SOME, **{"first": ["advantages"], **options}, skip=["row weights"])  # fmt: skip
        rec.case(f"logits/{name}/nothing", run_policy, "nothing", FP32, **options)
        rec.case(f"logits/{name}/inplace", run_policy, "padded", BF16, inplace_backward=True, **options)
        rec.case(f"logits/{name}/triton", run_policy, "tiny", FP32, backend="triton", **options)
        rec.case(f"logits/{name}/map", run_policy, "padded", FP32, temperature=0.7, logit_softcap=4.0, **options)


# ---- losses of step log-probs


def run_function(name: str, dtype: torch.dtype, kind: str, linear: bool, extra, token_weights: bool = False) -> dict:
    """A loss of torch ops on log-probs of either route; `extra` gives its further arguments."""
    layout = make_layout(kind, token_weights=token_weights)
    v = make_values(layout)
    if linear:
        leaves = make_head(layout, 37, dtype)
        logps = linear_step_logps(leaves[0], leaves[1], layout, bias=leaves[2], sum_p2=True, chunk_bytes=1000,
                                  kl_ref_hidden=make_head(layout, 37, dtype, seed=2)[0])  # fmt: skip
    else:
        leaves = [make_logits(layout, 37, dtype)]
        logps = step_logps(leaves[0], layout, sum_p2=True, kl_ref_logits=make_logits(layout, 37, dtype, seed=2))
    args, options = extra(v, logps)
    out = loss_function(name)(logps, layout, *args, **options)
    made = {"loss": out.loss, "losses": out.losses, "rewards": out.rewards, "metrics": out.metrics}
    extra_leaves = {f"arg{i}": a for i, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad}
    return {**made, **gradients(out.loss, **{f"leaf{i}": t for i, t in enumerate(leaves)}, **extra_leaves)}


_LISTS = torch.tensor([[0, 4, 8], [1, 5, -1], [3, 10, 2]])


def given(*args, **options) -> tuple[tuple, dict]:
    return args, options


def function_arguments() -> dict:
    """Loss -> variant -> (values, log-probs) -> what it is given beside log-probs and layout."""
    scores = torch.tensor([[0.3, -1.0, 2.0], [0.0, 0.5, 9.0], [1.0, 1.0, 0.2]])
    gold, sequences = torch.tensor([0, 3, 5]), torch.tensor([[0, 1], [2, 3], [3, 0]])
    three = torch.tensor([1.0, 0.5, 2.0])
    return {
        "kto_loss": {
            "default": lambda v, p: given(v.levels > 0, ref=v.ref),
            "options": lambda v, p: given(
                v.levels > 0, ref=v.ref_rows, reference_point=torch.tensor(0.7), beta=0.3, desirable_weight=1.3,
                undesirable_weight=0.4, num_items=6,
            ),
        },
        "apo_zero_unpaired_loss": {
            "default": lambda v, p: given(v.levels > 0, ref=v.ref),
            "options": lambda v, p: given(v.levels > 0, ref=v.ref, beta=0.4, undesirable_weight=2.0, reduction="sum"),
        },
        "aot_loss": {
            "default": lambda v, p: given(ref=v.ref),
            "options": lambda v, p: given(v.pairs, ref=v.ref, beta=0.4, label_smoothing=0.1, reduction="sum"),
        },
        "aot_unpaired_loss": {
            "default": lambda v, p: given(ref=v.ref),
            "options": lambda v, p: given(v.graph, ref=v.ref, label_smoothing=0.2, num_items=3),
        },
        "plackett_luce_loss": {
            "default": lambda v, p: given(_LISTS, ref=v.ref),
            "options": lambda v, p: given(_LISTS, beta=0.5, weights=three, reduction="sum"),
        },
        "listwise_loss": {
            "default": lambda v, p: given(_LISTS, scores, ref=v.ref),
            "options": lambda v, p: given(_LISTS, scores, score_temperature=0.5, weights=three, num_items=2),
        },
        "tpo_loss": {
            "default": lambda v, p: given(v.pairs, gold),
            "options": lambda v, p: given(v.graph, gold, beta=0.2, tpo_alpha=0.3, label_smoothing=0.1),
        },
        "tpo_l_loss": {
            "default": lambda v, p: given(v.pairs, gold),
            "options": lambda v, p: given(v.pairs, gold, tpo_l_gamma=0.1, tpo_alpha=2.0, reduction="sum"),
        },
        "trpa_loss": {
            "default": lambda v, p: given(v.pairs, v.weights > 1, ref=v.ref),
            "options": lambda v, p: given(v.pairs, v.weights > 1, ref=v.ref, beta=2.0, top_scale=1.5, num_items=9),
        },
        "direct_advantage_loss": {
            "default": lambda v, p: given(v.advantages, ref=v.ref),
            "options": lambda v, p: given(v.advantages, beta=0.7, weights=v.values, num_items=torch.tensor(4.0)),
        },
        "oreo_loss": {
            "default": lambda v, p: given(v.values, v.rewards, ref=v.ref),
            "options": lambda v, p: given(v.values, v.rewards, ref=v.ref, beta=0.1, kl_coef=0.1),
            "kl": lambda v, p: given(v.values, v.rewards, ref=v.ref, kl_coef=0.1, kl=p.tokens.square()),
        },
        "oreo_value_loss": {
            "default": lambda v, p: given(v.values.clone().requires_grad_(), v.rewards, ref=v.ref),
            "options": lambda v, p: given(v.values.clone().requires_grad_(), v.rewards, ref=v.ref, reduction="sum"),
        },
        "implicit_prm_loss": {
            "default": lambda v, p: given(v.outcomes, ref=v.ref),
            "options": lambda v, p: given(v.rewards, ref=v.ref, beta=0.2, weights=v.rewards + 1),
        },
        "tdpo1_loss": {
            "default": lambda v, p: given(ref=v.ref),
            "options": lambda v, p: given(v.graph, ref=v.ref_rows, beta=0.4, reduction="sum"),
        },
        "tdpo2_loss": {
            "default": lambda v, p: given(v.pairs, ref=v.ref),
            "options": lambda v, p: given(v.pairs, ref=v.ref, tdpo_alpha=0.2, weights=v.weights),
        },
        "full_step_dpo_loss": {
            "default": lambda v, p: given(sequences, v.values, ref=v.ref_rows),
            "options": lambda v, p: given(
                sequences, v.values, ref=v.ref_tokens, tau=0.5, kappa=0.0, reduction="sum"
            ),
        },
    }  # fmt: skip


def functions(rec: Record) -> None:
    for name, variants in function_arguments().items():
        for variant, extra in variants.items():
            for dtype in DTYPES:
                for linear in (False, True):
                    rec.case(f"{name}/{variant}/{dtype}/{'linear' if linear else 'logits'}", run_function, name,
                             DTYPES[dtype], "padded", linear, extra)  # fmt: skip
            rec.case(f"{name}/{variant}/packed", run_function, name, FP32, "packed", False, extra, True)
            rec.case(f"{name}/{variant}/weighted", run_function, name, FP64, "padded", False, extra, True)
    for dtype in DTYPES:
        for name, options in {
            "sigmoid": {}, "mixture": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0.5]},
            "simpo": {"loss_type": "simpo", "ref": None, "label_smoothing": 0.1},
            "soft": {"soft_labels": "soft_labels"},
            "wpo": {"weights": "wpo"}, "robust": {"loss_type": "robust", "label_smoothing": 0.2, "num_items": 4},
        }.items():  # fmt: skip
            rec.case(f"pref_loss/{name}/{dtype}", run_pref_loss, DTYPES[dtype], **options)
    rec.case("kto_reference_point", run_reference_point)
    rec.case(
        "level_pairs", lambda: loss_function("level_pairs")(make_values(make_layout()).levels, torch.arange(14) // 4)
    )
    rec.case("reward mean", run_reward_mean)
    rec.case("token weights", run_token_weights)
    rec.case("catalogue", lambda: [[e.name, e.kind, e.formula, e.source, e.use, e.options] for e in catalogue()])


def catalogue() -> list:
    return find("losses:catalogue", "losses.catalogue:entries")()


def run_pref_loss(dtype, ref="ref", weights=None, soft_labels=None, **options) -> dict:
    layout = make_layout()
    v, logits = make_values(layout), make_logits(layout, 37, dtype)
    logps = step_logps(logits, layout, sum_p2=True)
    if weights == "wpo":
        weights = loss_function("wpo_weights")(logps, layout, v.pairs)
    if soft_labels is not None:
        soft_labels = v.soft_labels
    ref = None if ref is None else v.ref
    out = pref_loss(logps, layout, v.pairs, ref=ref, weights=weights, soft_labels=soft_labels, **options)
    return {**of_pref(out), "weights": weights, **gradients(out.loss, logits=logits)}


def run_reference_point() -> Tensor:
    layout = make_layout()
    logps = step_logps(make_logits(layout, 37, FP32), layout)
    return loss_function("kto_reference_point")(logps, layout, make_values(layout).ref * 4)


def run_reward_mean() -> dict:
    made, layout = {}, make_layout()
    v = make_values(layout)
    for momentum in (None, 0.3):
        shift = find("batch_state:RewardMean", "losses.state:RewardMean", "losses:RewardMean")(momentum)
        for i in range(3):
            out = step_pref_loss(make_logits(layout, 37, FP32, seed=i), layout, v.pairs, ref=v.ref,
                loss_type="bco_pair",
                                 margins=shift.margins(v.pairs))  # fmt: skip
            shift.update(out)
            made[f"{momentum}/{i}"] = {"loss": out.loss, **shift.state_dict()}
        made[f"{momentum}/repr"] = repr(shift)
    return made


def run_token_weights() -> dict:
    ids = torch.tensor(_IDS)
    labels = torch.randint(0, 37, ids.shape).masked_fill(ids < 0, -100)
    values = torch.randn(ids.shape)
    weights = token_weight_function
    return {
        "ld_dpo": weights("ld_dpo_weights")(labels, 0.3),
        "tgdpo": weights("tgdpo_weights")(values, torch.tensor([True, True, False, False]), beta=0.1, tgdpo_alpha=0.5),
        "spo": weights("spo_weights")(values - 1, 0.5),
        "full_step": weights("full_step_weights")(torch.randn(4, 4), ids, tau=0.7, better=True),
        "full_step, worse": weights("full_step_weights")(torch.randn(4, 4), ids, tau=0.7, better=False),
    }


# ---- layouts and plans


def layouts(rec: Record) -> None:
    for kind in ("padded", "packed", "nothing"):
        for weighted in (False, True):
            layout = make_layout(kind, token_weights=weighted)
            v = make_values(layout)
            rec.add(f"{kind}/{weighted}/layout", layout)
            rec.add(f"{kind}/{weighted}/repr", repr(layout))
            rec.add(f"{kind}/{weighted}/counts", layout.counts)
            pairs = v.pairs.with_values(weights=v.weights, margins=v.margins, soft_labels=v.soft_labels)
            rec.add(f"{kind}/{weighted}/pairs", pairs)
            rec.add(f"{kind}/{weighted}/pairs repr", [repr(pairs), pairs.num_dropped, pairs.units().tolist()])
            graph = StepPairs.from_index(layout, v.graph)
            rec.add(f"{kind}/{weighted}/graph", graph)
            for rows in (1, 3, 6, 100):
                for dtype in DTYPES.values():
                    size = {"vocab": 37, "hidden": 16, "dtype": dtype, "chunk_bytes": rows * 37 * dtype.itemsize}
                    for needs in ((1, 1, 1), (1, 0, 0), (0, 0, 0), (0, 1, 0)):
                        names = ("hidden_gradient", "weight_gradient", "bias_gradient")
                        asked = {**size, **dict(zip(names, map(bool, needs), strict=True))}
                        key = f"plan/{kind}/{weighted}/{rows}/{str(dtype).removeprefix('torch.')}/{needs}"
                        rec.case(f"{key}/pref", plan_of, layout, None, **asked)
                        rec.case(f"{key}/graph", plan_of, layout, graph, **asked)
                        rec.case(f"{key}/logps", plan_of, layout, None, logps_only=True, **asked)
                        rec.case(f"{key}/reductions", plan_of, layout, None, reductions=True, **asked)
                        for level in ("token", "step", "sequence"):
                            rec.case(f"{key}/policy/{level}", policy_plan_of, layout, level, **asked)


def plan_of(layout: StepLayout, pairs, **asked) -> str:
    """As text: the layout's method before the move, a function of the layout after it."""
    if hasattr(layout, "plan"):
        return describe_plan(layout.plan(pairs, **asked))
    return describe_plan(find("routes.linear.plan:pref_plan")(layout, pairs, **asked))


def policy_plan_of(layout: StepLayout, level: str, **asked) -> str:
    plan = find("linear_policy:policy_plan", "routes.linear.plan:policy_plan")
    return describe_plan(plan(layout, importance_sampling_level=level, **asked))


def describe_plan(plan) -> str:
    groups = [(g.kind, g.start, g.end, g.chunks, g.steps.tolist(), g.pairs.tolist()) for g in plan.groups]
    return f"{plan}; {plan.gemm_rows}, {plan.weight_chunks}; {groups}"


# ---- instruction sets


def instruction_sets(rec: Record) -> None:
    """Rows of every dtype by the instruction sets that this process does not use: each needs a process of its own."""
    from sspo_ext import _C

    rec.add("sets", sorted(_C.isas()))
    for isa in [name for name, reason in _C.isas().items() if not reason and name != _C.isa()]:
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / "made.pt"
            command = [
                sys.executable,
                str(Path(__file__).with_name("record_outputs.py")),
                "record",
                str(made),
                "--only",
                "row kernels",
                "--quiet",
            ]
            here = os.pathsep.join([str(Path(sspo_ext.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
            subprocess.run(command, check=True, env={**os.environ, "SSPO_CPU_ISA": isa, "PYTHONPATH": here})
            for key, value in torch.load(made, weights_only=True)["outputs"].items():
                rec.add(f"{isa}/{key}", value)


def rows(rec: Record) -> None:
    """The row kernels of the CPU at sizes around the vectors' widths."""
    from sspo_ext import _C

    rec.add("isa", _C.isa())
    for vocab in (1, 2, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 1000, 1031):
        for dtype in DTYPES:
            for name, more in {
                "plain": {}, "softcap": {"logit_softcap": 3.0, "temperature": 0.6}, "all": REDUCTIONS["all"],
                "all, softcap": {**REDUCTIONS["all"], "logit_softcap": 3.0}, "inplace": {"inplace_backward": True},
            }.items():  # fmt: skip
                rec.case(
                    f"{vocab}/{dtype}/{name}", run_logps, "padded", DTYPES[dtype], vocab=vocab, backend="cpu", **more
                )
    for dtype in DTYPES:
        rec.case(f"huge/{dtype}", run_huge, DTYPES[dtype])


def run_huge(dtype: torch.dtype) -> dict:
    """Infinities, NaN and large logits."""
    layout = make_layout()
    logits = make_logits(layout, 37, dtype).detach()
    logits[0, 2, 3:] = -torch.inf
    logits[1, 4] *= 500
    logits[2, 1, 5] = torch.nan
    logits[3, 3, 7] = torch.inf
    logits.requires_grad_()
    out = step_logps(logits, layout, entropy=True, sum_p2=True)
    return {**of_logps(out), **gradients(mixed_sum(out), logits=logits)}


CHAPTERS = {
    "logits pref": logits_pref, "logits logps": logits_logps, "linear": linear, "policy": policy,
    "functions": functions, "layouts": layouts, "row kernels": rows, "instruction sets": instruction_sets,
}  # fmt: skip
