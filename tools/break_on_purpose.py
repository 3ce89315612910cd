# SPDX-License-Identifier: Apache-2.0
"""Breaks one line at a time in a copy of the repository, and shows that the test named for it turns red.

    python -m tools.break_on_purpose [TEXT ...]    # all, or those whose file has one of the texts in its name

Faults of csrc/ that only a sanitizer sees are planted by the slow tests test_cpu_sanitizers.py and test_sanitizers.py.

Needs the test extra, and a C++ compiler for csrc/. The exit status is 1 if a test is red before anything is broken, or
if a broken line is not caught.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Fault(NamedTuple):
    """A line, what it is changed to, and the test that must notice."""

    file: str
    line: str
    broken: str
    test: str


RULE = "tests/routes/linear/test_linear_rule.py"
TREE = "tests/losses/test_tree.py"
FAULTS = [
    Fault("layout/steps.py", "scored = (step >= 0) & real & (tokens.position > 0)", "scored = (step >= 0) & real",
          "tests/layout/test_steps.py"),
    Fault("layout/pairs.py", "valid = (counts[host] > 0).all(axis=1)", "valid = (counts[host] > 0).any(axis=1)",
          "tests/layout/test_pairs.py"),
    Fault("formulas/difference.py", "return logistic(beta * s.u_w - beta_rejected * s.u_l - s.margin, s.label)",
          "return logistic(beta * s.u_w - beta * s.u_l - s.margin, s.label)", "tests/formulas/test_formulas.py"),
    Fault("objective/pair.py", "loss, coef = loss + other[0], coef + other[3]",
          "loss, coef = loss + other[0], other[3]", "tests/objective/test_mixtures.py"),
    Fault("objective/values.py", "return value.reshape(-1)[layout.places]",
          "return value.reshape(-1)[layout.places - 1]", "tests/losses/test_pref_arguments.py"),
    Fault("routes/logits/gradient.py", "lse, coef, upstream, a, c, backend)", "lse, coef, None, a, c, backend)",
          "tests/losses/test_pref_backends.py"),
    Fault("routes/linear/engine.py", "index_copy_(0, self.order, values)", "copy_(values)",
          "tests/routes/linear/test_linear_inputs.py"),
    Fault("routes/linear/gradients.py", "self.total.addmm_(gradient.t(), hidden)",
          "torch.mm(gradient.t(), hidden, out=self.total)", RULE),
    Fault("routes/linear/shards.py",
          "return torch.where((labels >= 0) & (labels < self.vocab), local, self.size)", "return local",
          "tests/routes/linear/test_tensor_parallel.py"),
    Fault("layout/tree_rows.py", "position, places = place[at], place[at + 1]",
          "position, places = place[at + 1] - 1, place[at + 1]", "tests/layout/test_tree_rows.py"),
    Fault("layout/tree_rows.py", "row_of[positions] = first", "row_of[row_position] = np.arange(len(kept))",
          "tests/layout/test_tree_rows.py"),
    Fault("routes/tree_rows.py", "total.index_add_(0, index, values.double())",
          "total.index_copy_(0, index, values.double())", TREE),
    Fault("routes/tree_rows.py", "return coef.index_add(0, of.first, more)", "return coef", TREE),
    Fault("routes/tree_rows.py", "(whole.index_select(0, at).to(wide) + more)", "(whole.index_select(0, at).to(wide))",
          TREE),
    Fault("routes/logits/gradient.py", "if terms is not None:", "if False:", TREE),
    Fault("routes/logits/gradient.py", "rows = torch.cat([of.first, of.extra])", "rows = of.first", TREE),
    Fault("routes/linear/step_rows.py", "return np.unique(np.stack([step[:-1][same], step[1:][same]], axis=1), axis=0)",
          "return np.zeros((0, 2), np.int64)", "tests/routes/test_tree_routes.py"),
    Fault("routes/linear/step_rows.py", "return rows[np.argsort(seen)]", "return self.row[tokens]",
          "tests/routes/test_tree_routes.py"),
    Fault("routes/linear/tree_policy.py", "rows = self.rows[number]", "rows = self.rows[number].clamp(max=0)", TREE),
    Fault("routes/shared.py", "if not _SMALLEST_FACTOR <= quotient <= _LARGEST_FACTOR:", "if quotient < 0:",
          "tests/backends/test_reference.py"),
    Fault("losses/unpaired.py", "torch.sigmoid(-beta * sign * (u - reference_point))",
          "torch.sigmoid(-beta * sign * u)", "tests/losses/test_unpaired.py"),
    Fault("backends/reference.py", "valid = (counts[winner] > 0) & (counts[loser] > 0)", "valid = counts[winner] > 0",
          "tests/backends/test_reference.py"),
    Fault("backends/reference.py", "x = x - x.detach().amax(-1, keepdim=True)", "pass",
          "tests/backends/test_map_range.py"),
    Fault("data/graders.py", "return text.strip() if found else value", "return value", "tests/data/test_graders.py"),
    Fault("backends/triton/step_loss_fwd.py", "d = tl.where(is_loser, du_l, du_w)", "d = du_w",
          "tests/backends/triton_interpreted/test_triton_steps.py"),
    Fault("csrc/cuda/token_logp_fwd.cu", "sum *= exp2f(before - top);", "(void)before;",
          "tests/backends/test_cuda_emulation.py"),
    Fault("hf/head.py", "scaled = raw if self.logit_scale == 1.0 else raw * self.logit_scale", "scaled = raw",
          "tests/hf/test_head.py"),
    Fault("signals/split.py", 'start = text.rindex("\\n", run.start(), run.end()) + 1', "start = run.start() + 1",
          "tests/signals/test_split.py"),
    Fault("signals/probing/likelihood.py", 'how = "sum" if reduce == "joint" else "max"', 'how = "max"',
          "tests/signals/test_probing.py"),
    Fault("signals/credit/gae.py", "(gamma * lam) ** shift", "(gamma * lam)", "tests/signals/test_gae.py"),
    Fault("signals/pairing/pairs.py", "a.value - b.value > min_gap", "a.value - b.value > 0",
          "tests/signals/test_pairing.py"),
    Fault("data/collator.py", "(base[i] + c, base[n + i] + r)", "(base[i] + c, base[i] + r)",
          "tests/data/test_collator.py"),
    Fault("tracing/values.py", "step_gae(values, rewards, gamma=gamma, lam=lam)",
          "step_gae(values, rewards, gamma=gamma, lam=gamma)", "tests/tracing/test_trace_files.py"),
    Fault("train/preference_trainer.py", "return float(max(pairs, 1))", "return float(max(len(batch_samples), 1))",
          "tests/train/test_preference_trainer.py"),
    Fault("train/experience.py", "first : first + self.prompts]", "first : first + 1]",
          "tests/train/test_sspo_trainer.py"),
    Fault("cli/train.py", "checked_label(formulas, options.loss_type, options.label_smoothing, soft_labels=False)",
          "pass", "tests/cli/test_cli.py"),
    Fault("tools/generate_formulas.py", 'return self.binary("sub", args[1], args[0])',
          'return self.binary("sub", args[0], args[1])', "tests/formulas/test_formulas.py"),
    # the last, because what is built stays so
    Fault("csrc/cpu/token_logp.h", "if (!first && m > shift) sum *= exp2(e.exponent((double)shift - m));", ";",
          "tests/backends/test_cpu_token_logp.py"),
]  # fmt: skip


def run_tests(copy: Path, tests: list[str]) -> tuple[int, str]:
    """(exit status of pytest, the first failure)"""
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode, failed[0].split(" ")[1].partition("::")[2] if failed else done.stdout[-300:]


def build(copy: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=copy, env={**os.environ, "SSPO_BUILD_CUDA": "0"}, check=True, capture_output=True)


def main(only: list[str]) -> int:
    """Prints a row for each broken line."""
    faults = [f for f in FAULTS if not only or any(text in f.file for text in only)]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "__pycache__", "build", "runs", "site"))
        if not any(copy.glob("sspo_ext/_C.*.so")):
            build(copy)
        status, told = run_tests(copy, sorted({f.test for f in faults}))
        if status:
            print(f"red before anything is broken: {told}")
            return 1
        missed = 0
        print("| line | caught by | seconds |\n| --- | --- | --- |")
        for fault in faults:
            start = time.monotonic()
            path = copy / (fault.file if fault.file.startswith(("csrc", "tools")) else f"sspo_ext/{fault.file}")
            sound = path.read_text(encoding="utf-8")
            assert sound.count(fault.line) == 1, (
                f"{fault.file}: {fault.line!r} stands there {sound.count(fault.line)} times"
            )
            path.write_text(sound.replace(fault.line, fault.broken), encoding="utf-8")
            if fault.file.startswith("csrc/cpu"):
                build(copy)
            status, told = run_tests(copy, [fault.test])
            path.write_text(sound, encoding="utf-8")
            caught = f"{fault.test.removeprefix('tests/')}::{told}" if status == 1 else f"NOT CAUGHT {told}"
            missed += status != 1
            print(f"| {fault.file} | {caught} | {time.monotonic() - start:.0f} |", flush=True)
    print(f"\n{len(faults) - missed} of {len(faults)} caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
