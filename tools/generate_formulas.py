# SPDX-License-Identifier: Apache-2.0
"""Writes the fused formulas: traces each definition in sspo_ext/formulas/ and its derivative, prints C++ and Triton.

    python -m tools.generate_formulas [--check]

The traced graph is ATen pointwise ops on scalars, so printing it takes one line for each op. `--check` writes nothing
and fails if a file is stale.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.torch_version import TorchVersion

from sspo_ext.formulas.policy import KL_ESTIMATORS, MOST_POLICY_OPTIONS, POLICY_FORMULAS, PolicyFormula, PolicyScores
from sspo_ext.formulas.registry import MAX_OPTIONS, PAIR_FORMULAS, PairFormula, PairScores

ROOT = Path(__file__).resolve().parents[1]

CPP_FILE = ROOT / "csrc" / "formulas_generated.h"

HASH_FILE = ROOT / "sspo_ext" / "formulas" / "generated_hash.py"

TRITON_FILE = ROOT / "sspo_ext" / "backends" / "triton" / "formulas_generated.py"

POLICY_FILE = TRITON_FILE.with_name("policy_formulas_generated.py")  # only Triton has policy losses in a kernel

aten = torch.ops.aten


def traced(definition: PairFormula) -> torch.fx.GraphModule:
    """Graph from the scores and options of one pair to (loss, d loss/d u_w, d loss/d u_l)."""
    inputs = [*PairScores._fields, *definition.options]

    def loss_and_grads(*values):
        named = dict(zip(inputs, values, strict=True))
        options = {name: named[name] for name in definition.options}

        def loss(u_w, u_l):
            return definition.fn(
                PairScores(**{f: named[f] for f in PairScores._fields} | {"u_w": u_w, "u_l": u_l}), **options
            )

        value, pull, *_ = torch.func.vjp(loss, named["u_w"], named["u_l"])
        return (value, *pull(torch.ones_like(value)))

    return _graph(loss_and_grads, inputs)


def traced_policy(definition: PolicyFormula) -> torch.fx.GraphModule:
    """Graph from the scores and options of one token to (loss, d loss/d logp, d loss/d ratio)."""
    inputs = [*PolicyScores._fields, *definition.options]

    def loss_and_grads(*values):
        named = dict(zip(inputs, values, strict=True))
        options = {name: named[name] for name in definition.options}

        def loss(logp, ratio):
            return definition.fn(PolicyScores(logp, ratio, named["advantage"]), **options)

        value, pull, *_ = torch.func.vjp(loss, named["logp"], named["ratio"])
        return (value, *pull(torch.ones_like(value)))

    return _graph(loss_and_grads, inputs)


def traced_kl(estimator: Callable[..., Any]) -> torch.fx.GraphModule:
    """Graph from d = log pi - log ref to (estimate, its derivative)."""

    def value_and_slope(d):
        value, pull, *_ = torch.func.vjp(estimator, d)
        return (value, *pull(torch.ones_like(value)))

    return _graph(value_and_slope, ["d"])


def _graph(fn: Callable[..., Any], inputs: list[str]) -> torch.fx.GraphModule:
    graph = make_fx(fn)(*[torch.tensor(0.5, dtype=torch.float64) for _ in inputs])
    for node, name in zip([n for n in graph.graph.nodes if n.op == "placeholder"], inputs, strict=True):
        node._rename(name)
    graph.graph.eliminate_dead_code()
    return graph


@dataclass(frozen=True)
class Language:
    """How one target writes numbers and operations; {0}, {1} are the arguments."""

    number: Callable[[float], str]
    spell: dict[str, str]


def _infix(symbol: str) -> str:
    return f"({{0}} {symbol} {{1}})"


_COMMON = {
    "add": _infix("+"),
    "sub": _infix("-"),
    "mul": _infix("*"),
    "div": _infix("/"),
    "le": _infix("<="),
    "lt": _infix("<"),
    "gt": _infix(">"),
    "ge": _infix(">="),
    "eq": _infix("=="),
    "neg": "(-{0})",
}

CPP = Language(
    lambda v: f"T({v!r})",
    _COMMON | {
        "exp": "exp_({0})", "logsigmoid": "logsigmoid_({0})", "sigmoid": "sigmoid_({0})", "relu": "relu_({0})",
        "where": "({0} ? {1} : {2})", "log": "log_({0})", "log1p": "log1p_({0})", "expm1": "expm1_({0})",
    },
)  # fmt: skip

TRITON = Language(
    repr,
    _COMMON | {
        "exp": "tl.exp({0})", "logsigmoid": "_logsigmoid({0})", "sigmoid": "_sigmoid({0})", "relu": "_relu({0})",
        "where": "tl.where({0}, {1}, {2})", "log": "tl.log({0})", "log1p": "_log1p({0})", "expm1": "_expm1({0})",
        "and": "({0} & {1})",
    },
)  # fmt: skip

_BINARY = {
    aten.add: "add", aten.sub: "sub", aten.mul: "mul", aten.div: "div", aten.le: "le", aten.gt: "gt", aten.ge: "ge",
    aten.eq: "eq", aten.lt: "lt", aten.logical_and: "and",
}  # fmt: skip

_UNARY = {
    aten.exp: "exp", aten.sigmoid: "sigmoid", aten.relu: "relu", aten.neg: "neg", aten.log: "log",
    aten.log1p: "log1p", aten.expm1: "expm1",
}  # fmt: skip


class Printer:
    """Prints one graph as assignments, folding the constants 0 and 1 that autograd leaves behind."""

    def __init__(self, language: Language):
        self.language = language
        self.value: dict[torch.fx.Node, Any] = {}  # an expression or a number; a tuple for an op with two outputs
        self.lines: list[tuple[str, str]] = []

    def get(self, arg: Any) -> Any:
        """An argument's value: a number, or the text of an expression."""
        return self.value[arg] if isinstance(arg, torch.fx.Node) else float(arg)

    def text(self, value: str | float) -> str:
        """A value in the target language."""
        return value if isinstance(value, str) else self.language.number(value)

    def emit(self, op: str, *args: Any) -> str:
        """The text of an operation."""
        return self.language.spell[op].format(*(self.text(a) for a in args))

    def binary(self, op: str, x: Any, y: Any) -> str | float:
        """A binary operation, folded where a constant allows it."""
        if isinstance(x, float) and isinstance(y, float):
            return float(getattr(operator, {"div": "truediv"}.get(op, op))(x, y))
        if op == "mul" and 1.0 in (x, y):
            return y if x == 1.0 else x
        if op == "mul" and -1.0 in (x, y):
            return self.emit("neg", y if x == -1.0 else x)
        if (op == "div" and y == 1.0) or (op in ("add", "sub") and y == 0.0):
            return x
        if op == "add" and x == 0.0:
            return y
        return self.emit(op, x, y)

    def expression(self, node: torch.fx.Node) -> Any:
        """The value of a call: a number, the text of an expression, or a tuple for an op with two outputs."""
        op = getattr(node.target, "overloadpacket", None)
        args: list[Any] = [self.get(a) if isinstance(a, (torch.fx.Node, int, float)) else a for a in node.args]
        if op in (aten.add, aten.sub) and node.kwargs.get("alpha", 1) != 1:
            raise NotImplementedError(f"{node.format_node()}: alpha")
        if op in _BINARY:
            return self.binary(_BINARY[op], args[0], args[1])
        if op is aten.rsub:
            return self.binary("sub", args[1], args[0])
        if op in _UNARY:
            return -args[0] if op is aten.neg and isinstance(args[0], float) else self.emit(_UNARY[op], args[0])
        if op is aten.reciprocal:
            return self.binary("div", 1.0, args[0])
        if op in (aten.detach, aten.alias, aten.clone):
            return args[0]
        if op in (aten.ones_like, aten.scalar_tensor, aten.zeros_like):
            return {aten.ones_like: 1.0, aten.zeros_like: 0.0}.get(op, args[0])
        if op is aten.square or (op is aten.pow and args[1] == 2.0):
            return self.emit("mul", args[0], args[0])
        if op is aten.pow and args[1] == 1.0:
            return args[0]
        if op is aten.log_sigmoid_forward:
            return (self.emit("logsigmoid", args[0]), 0.0)
        if op is aten.log_sigmoid_backward:
            return self.binary("mul", args[0], self.emit("sigmoid", self.emit("neg", args[1])))
        if op is aten.sigmoid_backward:
            return self.binary("mul", args[0], self.binary("mul", self.binary("sub", 1.0, args[1]), args[1]))
        if op is aten.full_like:
            return args[1]
        if op is aten.where:
            return self.emit("where", *args)
        if op is aten.masked_fill_:
            # of a traced graph only the result is used
            return self.emit("where", args[1], args[2], args[0])
        if op is aten.minimum:
            # with a NaN on either side it is a NaN
            smaller = self.emit("where", self.emit("lt", args[1], args[0]), args[1], args[0])
            return self.emit("where", self.emit("eq", args[1], args[1]), smaller, args[1])
        if op is aten.clamp:
            # with the comparisons in this order a NaN stays a NaN
            value, low, high = (*args, None)[:3]
            value = value if low is None else self.emit("where", self.emit("lt", value, low), low, value)
            return value if high is None else self.emit("where", self.emit("gt", value, high), high, value)
        if op is aten.threshold_backward:
            # with this comparison a NaN passes the gradient on, as in torch
            return self.emit("where", self.emit("le", args[1], args[2]), 0.0, args[0])
        raise NotImplementedError(f"no spelling for {node.format_node()}: add one line to generate_formulas.py")

    def run(self, graph: torch.fx.Graph) -> list[str]:
        """Fills self.lines and gives the texts of the outputs."""
        _include_bounds(graph)
        for node in graph.nodes:
            if node.op == "placeholder":
                self.value[node] = node.name
            elif node.op == "output":
                (outputs,) = node.args
                assert isinstance(outputs, (list, tuple))
                return [self.text(self.get(a)) for a in outputs]
            elif node.target is operator.getitem:
                source, index = node.args
                assert isinstance(source, torch.fx.Node)
                self.value[node] = self.value[source][index]
            else:
                value = self.expression(node)
                if isinstance(value, str) and not value.isidentifier():
                    self.lines.append((node.name, value))
                    value = node.name
                elif isinstance(value, tuple):
                    self.lines.append((node.name, value[0]))
                    value = (node.name, value[1])
                self.value[node] = value
        raise AssertionError("a graph ends with its output")


def _include_bounds(graph: torch.fx.Graph) -> None:
    """Makes the gradient of clamp at a bound itself that of the inside, as torch before 2.14; since then it is 0."""
    for node in graph.nodes:
        if node.target is aten.lt.Scalar:
            node.target, node.name = aten.le.Scalar, node.name.replace("lt", "le")


def _strip(expression: str) -> str:
    """Without its outer parentheses, if there are no others."""
    return (
        expression[1:-1]
        if expression.startswith("(") and expression.endswith(")") and expression.count("(") == 1
        else expression
    )


_CPP_PRELUDE = """\
// SPDX-License-Identifier: Apache-2.0
// Generated from sspo_ext/formulas/ by `python -m tools.generate_formulas`. Do not edit.
// clang-format off
#pragma once
#include <cmath>

#if defined(__CUDACC__)
#define SSPO_HD __host__ __device__
#else
#define SSPO_HD
#endif

namespace sspo {

template <class T> struct PairGrad { T loss, du_w, du_l; };
template <class T> struct PairScores { T u_w, u_l, n_w, n_l, margin, label; };

template <class T> SSPO_HD inline T exp_(T x) { using std::exp; return exp(x); }
template <class T> SSPO_HD inline T log_(T x) { using std::log; return log(x); }
template <class T> SSPO_HD inline T log1p_(T x) { using std::log1p; return log1p(x); }
template <class T> SSPO_HD inline T expm1_(T x) { using std::expm1; return expm1(x); }
template <class T> SSPO_HD inline T relu_(T x) { return x > T(0) || x != x ? x : T(0); }
template <class T> SSPO_HD inline T logsigmoid_(T x) {
  using std::exp; using std::fabs; using std::log1p;
  return (x < T(0) ? x : (x != x ? x : T(0))) - log1p(exp(-fabs(x)));
}
template <class T> SSPO_HD inline T sigmoid_(T x) {
  using std::exp;
  const T e = x < T(0) ? exp(x) : exp(-x);
  return (x < T(0) ? e : T(1)) / (T(1) + e);
}
"""

_TRITON_PRELUDE = '''\
# SPDX-License-Identifier: Apache-2.0
"""Generated from sspo_ext/formulas/ by `python -m tools.generate_formulas`. Do not edit."""
# ruff: noqa
import triton
import triton.language as tl


@triton.jit
def _relu(x):
    return tl.where(x < 0, 0.0, x)


@triton.jit
def _log1p(x):
    # Kahan's: what rounding lost in u, it lost in u - 1 too
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * (x / tl.where(u == 1, 1.0, u - 1)))


@triton.jit
def _expm1(x):
    # Kahan's, for x <= 0, where e^x does not overflow
    u = tl.exp(x)
    y = u - 1
    small = (u == 1) | (y == -1)
    return tl.where(u == 1, x, tl.where(y == -1, -1.0, y * (x / tl.where(small, 1.0, tl.log(u)))))


@triton.jit
def _logsigmoid(x):
    return tl.where(x > 0, 0.0, x) - _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1 + e)
'''


_HASH = "@hash@"  # stands in the C++ until the hash of all of it is known


def formulas_hash() -> str:
    """A hash of the generated formulas, which a compiled module and the Python code must share."""
    return hashlib.sha256((_cpp_text() + triton_source()).encode()).hexdigest()[:16]


def cpp_source() -> str:
    """The text of csrc/formulas_generated.h."""
    return _cpp_text().replace(_HASH, formulas_hash())


def hash_source() -> str:
    """The text of formulas/generated_hash.py."""
    return (
        "# SPDX-License-Identifier: Apache-2.0\n"
        '"""Generated from sspo_ext/formulas/ by `python -m tools.generate_formulas`. Do not edit."""\n\n'
        f'FORMULAS_HASH = "{formulas_hash()}"\n'
    )


@functools.cache
def _cpp_text() -> str:
    parts, cases = [_CPP_PRELUDE], []
    for i, definition in enumerate(PAIR_FORMULAS.values()):
        printer = Printer(CPP)
        out = printer.run(traced(definition).graph)
        unpack = "".join(f"  const T {f} = s.{f}; (void){f};\n" for f in PairScores._fields)
        unpack += "".join(f"  const T {name} = o[{j}]; (void){name};\n" for j, name in enumerate(definition.options))
        body = "".join(f"  const auto {name} = {_strip(text)};\n" for name, text in printer.lines)
        parts.append(
            f"// {definition.formula}\ntemplate <class T> "
            f"SSPO_HD inline PairGrad<T> {definition.name}_formula(const PairScores<T>& s, const T* o) {{\n"
            f"{unpack}{body}  return {{{', '.join(out)}}};\n}}\n"
        )
        cases.append(f"    case {i}: return {definition.name}_formula(s, o);\n")
    parts.append(
        f'constexpr const char kFormulasHash[] = "{_HASH}";\n'
        f"constexpr int kNumPairFormulas = {len(PAIR_FORMULAS)};\nconstexpr int kMaxOptions = {MAX_OPTIONS};\n\n"
        "template <class T> SSPO_HD inline PairGrad<T> pair_formula(int formula, const PairScores<T>& s, "
        "const T* o) {\n"
        f"  switch (formula) {{\n{''.join(cases)}    default: return {{T(NAN), T(NAN), T(NAN)}};\n  }}\n}}\n\n"
        "}  // namespace sspo\n"
    )
    return "\n".join(parts)


@functools.cache
def triton_source() -> str:
    """The text of backends/triton/formulas_generated.py."""
    scores = ", ".join(PairScores._fields)
    options = [f"o{i}" for i in range(MAX_OPTIONS)]
    parts, cases = [_TRITON_PRELUDE], []
    for i, definition in enumerate(PAIR_FORMULAS.values()):
        printer = Printer(TRITON)
        out = printer.run(traced(definition).graph)
        body = "".join(f"    {name} = {_strip(text)}\n" for name, text in printer.lines)
        names = "".join(f", {name}" for name in definition.options)
        parts.append(
            f"@triton.jit\ndef _{definition.name}_formula({scores}{names}):\n"
            f"    # {definition.formula}\n{body}    return {', '.join(out)}\n"
        )
        args = "".join(f", {o}" for o in options[: len(definition.options)])
        keyword = "if" if i == 0 else "elif"
        call = f"_{definition.name}_formula({scores}{args})"
        cases.append(f"    {keyword} FORMULA == {i}:\n        loss, du_w, du_l = {call}\n")
    parts.append(
        f"@triton.jit\ndef _pair_formula(FORMULA: tl.constexpr, {scores}, {', '.join(options)}):\n"
        f"{''.join(cases)}    return loss, du_w, du_l\n"
    )
    return "\n\n".join(parts)


_POLICY_PRELUDE = '''\
# SPDX-License-Identifier: Apache-2.0
"""Generated from sspo_ext/formulas/ by `python -m tools.generate_formulas`. Do not edit."""
# ruff: noqa
import triton
import triton.language as tl

from .formulas_generated import _expm1 as _expm1_below_0


@triton.jit
def _expm1(x):
    # far above 0 nothing of the 1 is left
    return tl.where(x > 20.0, tl.exp(x), _expm1_below_0(x))
'''


@functools.cache
def policy_source() -> str:
    """The text of backends/triton/policy_formulas_generated.py."""
    scores, options = ", ".join(PolicyScores._fields), [f"o{i}" for i in range(MOST_POLICY_OPTIONS)]
    parts, cases = [_POLICY_PRELUDE], []
    for i, definition in enumerate(POLICY_FORMULAS.values()):
        names = "".join(f", {name}" for name in definition.options)
        body = _triton_body(traced_policy(definition))
        parts.append(
            f"@triton.jit\ndef _{definition.name}_formula({scores}{names}):\n    # {definition.formula}\n{body}"
        )
        args = "".join(f", {o}" for o in options[: len(definition.options)])
        cases.append((i, f"loss, d_logp, d_ratio = _{definition.name}_formula({scores}{args})"))
    parts.append(
        f"@triton.jit\ndef _policy_formula(FORMULA: tl.constexpr, {scores}, {', '.join(options)}):\n"
        f"{_choice('FORMULA', cases)}    return loss, d_logp, d_ratio\n"
    )
    for name, estimator in KL_ESTIMATORS.items():
        parts.append(f"@triton.jit\ndef _{name}(d):\n{_triton_body(traced_kl(estimator))}")
    cases = [(i, f"value, slope = _{name}(d)") for i, name in enumerate(KL_ESTIMATORS)]
    parts.append(
        "@triton.jit\ndef _kl_estimate(ESTIMATOR: tl.constexpr, d):\n"
        f"{_choice('ESTIMATOR', cases)}    return value, slope\n"
    )
    return "\n\n".join(parts)


def _triton_body(graph: torch.fx.GraphModule) -> str:
    printer = Printer(TRITON)
    out = printer.run(graph.graph)
    body = "".join(f"    {name} = {_strip(text)}\n" for name, text in printer.lines)
    return f"{body}    return {', '.join(out)}\n"


def _choice(name: str, cases: list[tuple[int, str]]) -> str:
    return "".join(f"    {'elif' if i else 'if'} {name} == {i}:\n        {line}\n" for i, line in cases)


def main(argv: list[str] | None = None) -> int:
    """The command; 1 for a stale file with --check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a generated file is stale")
    check = parser.parse_args(argv).check
    stale = False
    sources = {CPP_FILE: cpp_source(), TRITON_FILE: triton_source(), HASH_FILE: hash_source()}
    if TorchVersion(torch.__version__) < "2.14":
        sources[POLICY_FILE] = policy_source()
    else:  # it halves the gradient of clamp at a bound that is a tensor; the kernels keep that of the inside
        print(f"left alone: {POLICY_FILE.name}, which is made with torch before 2.14")
    for path, source in sources.items():
        if path.exists() and path.read_text() == source:
            continue
        stale = True
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        print(f"{'stale' if check else 'wrote'}: {path.relative_to(ROOT)}")
    return int(check and stale)


if __name__ == "__main__":
    sys.exit(main())
