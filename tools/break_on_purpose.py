# SPDX-License-Identifier: Apache-2.0
"""Breaks one line at a time, in a copy of the checkout, and shows that the tests of its room go red.

    python -m tools.break_on_purpose [--only TEXT] [--jobs 2]

The copy has the compiled module of this checkout (`python setup.py build_ext --inplace`). A line that no test catches
is named at the end, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Break(NamedTuple):
    """A line of the package, what is planted, and the tests that must see it."""

    file: str
    line: str
    planted: str
    tests: str


BREAKS = [
    Break("layout/steps.py", "running[:, -1] + 1 if length", "running[:, -1] if length", "layout/test_steps.py"),
    Break("layout/pairs.py", "same = host[:, 0] == host[:, 1]", "same = host[:, 0] < 0", "layout/test_pairs.py"),
    Break("formulas/difference.py", "logistic(_z(s, beta), s.label)", "logistic(_z(s, beta), 1 - s.label)",
          "formulas/test_formulas.py"),
    Break("formulas/policy.py", "torch.expm1(-d) + d", "torch.expm1(d) - d", "losses/test_policy.py"),
    Break("objective/values.py", "items.reciprocal()", "items", "losses/test_policy.py losses/test_pref_arguments.py"),
    Break("objective/pair.py", "token_pair_weights if t.by_winner_tokens else", "token_pair_weights if False else",
          "objective/test_mixtures.py"),
    Break("routes/logits/route.py", "else coef * d_loss", "else coef", "losses/test_pref_backends.py"),
    Break("routes/shared.py", "constant = constant - 2 * d_s * sum_p2", "pass", "routes/test_reductions.py"),
    Break("routes/linear/plan.py", "if filled + size > chunk_rows", "if filled > chunk_rows",
          "routes/linear/test_plan.py"),
    Break("routes/linear/pref.py", "coef * d_loss).to(dtype)", "coef).to(dtype)",
          "routes/linear/test_linear_upstream.py"),
    Break("losses/transport.py", ".sort().values", "",
          "losses/test_unpaired.py losses/test_lists.py losses/test_state.py"),
    Break("losses/common.py", ".flip(1).cumsum(1).flip(1)", ".cumsum(1)", "losses/test_targets.py"),
    Break("backends/reference.py", "masked_fill(logp == -torch.inf, 0.0)", "masked_fill(logp == torch.inf, 0.0)",
          "backends/test_reference.py routes/test_reductions.py"),
    Break("backends/cpu.py", "_LARGE_BYTES = 32 << 20", "_LARGE_BYTES = -1 << 62", "backends/test_cpu_edges.py"),
    Break("hf/head.py", "torch.tanh(scaled / self.logit_softcap)", "torch.tanh(scaled)", "hf/test_head.py"),
    Break("signals/credit/gae.py", "gamma * v[before + 1]) - v[before]", "v[before + 1]) - v[before]",
          "signals/test_gae.py"),
    Break("signals/probing/likelihood.py", 'how = "sum" if', 'how = "max" if', "signals/test_probing.py"),
    Break("signals/pairing/pairs.py", "a.value - b.value > min_gap and", "a.value - b.value >= 0 and",
          "signals/test_pairing.py"),
    Break("data/chat.py", "if goes_on(messages) else", "if False else", "data/test_chat_rendering.py"),
    Break("train/experience.py", "min([0.0, *", "min([1.0, *", "train/test_sspo_trainer_edges.py"),
    Break("train/dropout.py", "def disable_dropout(model: nn.Module) -> None:",
          "def disable_dropout(model: nn.Module) -> None:\n    return\n", "train/test_dropout.py"),
    Break("cli/main.py", "    return 2", "    return 0", "cli/test_cli.py"),
    Break("tracing/lines.py", "os.replace(temporary, path)", "pass", "tracing/test_trace_files.py"),
]  # fmt: skip


def run(broken: Break, folder: Path) -> str:
    """What pytest says of the broken copy: "red", "GREEN", or why the line could not be planted."""
    source = (ROOT / "sspo_ext" / broken.file).read_text()
    if source.count(broken.line) < 1:
        return "GONE: the line is not there"
    copy = Path(tempfile.mkdtemp(dir=folder))
    ignored = shutil.ignore_patterns("__pycache__", "results", "build")
    for name in ("sspo_ext", "tests", "tools", "benchmarks", "docs", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in ("pyproject.toml", "mkdocs.yml", "README.md", "setup.py"):
        shutil.copy(ROOT / name, copy)
    (copy / "sspo_ext" / broken.file).write_text(source.replace(broken.line, broken.planted))
    tests = [f"tests/{name}" for name in broken.tests.split()]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-p", "no:cacheprovider", *tests], cwd=copy,
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    shutil.rmtree(copy)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return (
        f"red: {failed[0].split(' - ')[0]}" if done.returncode == 1 and failed else f"GREEN (status {done.returncode})"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.break_on_purpose", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--only", default="", help="files whose path has this text")
    parser.add_argument("--jobs", type=int, default=2, help="copies tested at a time")
    options = parser.parse_args(argv)
    chosen = [b for b in BREAKS if options.only in b.file]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda b: run(b, Path(folder)), chosen))
    for broken, result in zip(chosen, results, strict=True):
        print(f"{broken.file:32} {broken.line[:44]:44} {result}")
    missed = [b.file for b, r in zip(chosen, results, strict=True) if not r.startswith("red")]
    print(f"{len(chosen) - len(missed)} of {len(chosen)} caught" + (f"; not: {', '.join(missed)}" if missed else ""))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
