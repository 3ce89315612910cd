"""`sspo-ext trace`: what the steps of given chains are worth to a model, file to file. Imports nothing heavy until it
runs."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import setting

if TYPE_CHECKING:
    from ..signals.probing.texts import Probe


def add_arguments(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    add = parser.add_argument
    add("--model", required=True, help="hub name, folder, folder with one .gguf file, or .gguf file")
    add(
        "--data", required=True, nargs="+", metavar="JSONL",
        help="rows: prompt, response (a text or a list of steps), answer (one or several), reward or is_correct",
    )  # fmt: skip
    add("--output-dir", required=True, help="values.jsonl, pairs.jsonl, pictures")
    add("--resume", action="store_true", help="go on where a killed run was")
    add("--split-by", default="newline", help="newline, blank_line, numbered, or a regular expression")
    add("--max-length", type=positive, default=2048, help="tokens of prompt and response; longer rows are left out")
    add("--grader", default="exact", help="of rows without a reward: exact, exact:MARKER, math-verify, module:function")
    add(
        "--chat-template-option", type=setting, action="append", default=[], metavar="NAME=VALUE",
        help="as enable_thinking=false",
    )  # fmt: skip

    add = parser.add_argument_group("values and advantages").add_argument
    add("--probe", default="en", help="a language (en, zh, ...) or the text that asks for the answer")
    add("--probe-end", action="append", metavar="TEXT", help="may follow the answer (default: anything); repeatable")
    add("--probe-turn", action="store_true", help="ask in a turn of the user's, by the chat template")
    add("--mode", default="likelihood", choices=("likelihood", "graded"), help="of the gold answer, or sampled answers")
    add("--reduce", default="joint", choices=("joint", "mean"), help="likelihood of an answer of several tokens")
    add("--num-samples", type=positive, default=5, help="graded: answers after each step")
    add("--gamma", type=float, default=0.9, help="discount per step, of advantages and of continuations")
    add("--lam", type=float, default=0.0, help="lambda of GAE over steps; 0 is a step's own progress")

    add = parser.add_argument_group("step preferences").add_argument
    add(
        "--pairs", default="none", choices=("none", "sampled", "chains"),
        help="sampled: next steps that the model itself would take; chains: where chains of one prompt part",
    )  # fmt: skip
    add(
        "--value", default="continuation", choices=("continuation", "probe", "both"),
        help="sampled: what ranks a step: the model's greedy continuation, the probe, or both",
    )  # fmt: skip
    add("--num-candidates", type=positive, default=12, help="sampled: at each state")
    add("--states", type=positive, default=2, help="sampled: random states of each chain")
    add("--temperature", type=float, default=1.0, help="sampled: of candidates")
    add("--max-step-tokens", type=positive, default=96, help="sampled: a longer step is dropped")
    add("--max-continuation-tokens", type=positive, default=256, help="sampled: a longer continuation is worth nothing")
    add("--final", metavar="REGEX", help="sampled: a response that matches is complete without an end of sequence")
    add("--min-gap", type=float, default=0.02, help="two steps are compared if their values are further apart")
    add("--max-pairs", type=positive, help="of one state: those with the largest gaps (default: all)")
    add("--weight", default="one", choices=("one", "gap"), help="of a pair in the loss")
    add("--margin", default="none", choices=("none", "gap"), help="that a pair asks for")

    add = parser.add_argument_group("pictures").add_argument
    add("--plot", type=positive, metavar="N", help="a picture of each of the first N chains, and a page of all")

    add = parser.add_argument_group("running").add_argument
    add("--engine", default="auto", choices=("auto", "packed", "cached", "separate"), help="how states are probed")
    add("--max-tokens", type=positive, default=4096, help="in one forward")
    add("--batch-size", type=positive, default=16, help="chains between two writes")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16", "auto"), help="of the weights")
    add("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    add("--seed", type=int, default=0, help="of what is sampled")
    add("--attn-implementation", help="eager, sdpa, flash_attention_2, ... (default: the model's)")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")


def run(options: argparse.Namespace) -> None:
    from ..data.graders import answer_grader, load_grader
    from ..tracing.lines import check_free

    # What can be wrong is looked at in the order of what it costs: arguments, files, rows, then the model.
    probe = _checked(options)
    grader = load_grader(options.grader)
    missing = [name for name in options.data if not Path(name).is_file()]
    if missing:
        raise ValueError(f"--data: {missing[0]!r} is not there")
    output = Path(options.output_dir)
    for name in ("values.jsonl", "pairs.jsonl.nodes"):
        check_free(output / name, resume=options.resume)

    import torch

    from ..tracing.chains import load_chains
    from ..tracing.values import rollout_pairs, trace_pairs, trace_values
    from ..train.models import load_model, load_tokenizer

    template = dict(options.chat_template_option)
    tokenizer = load_tokenizer(options.model, trust_remote_code=options.trust_remote_code)
    if probe.turn and getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("--probe-turn: the tokenizer has no chat template, which writes the user's turn")
    chains, long = load_chains(
        options.data, tokenizer, split_by=options.split_by, max_length=options.max_length, grader=grader,
        chat_template_kwargs=template,
    )  # fmt: skip
    if not chains and not long:
        raise ValueError(f"--data: expected at least one chain, found none in {', '.join(options.data)}")
    if not chains:
        raise ValueError(
            f"--data: no chain of at most {options.max_length} tokens, {len(long)} are longer; give a larger "
            "--max-length"
        )
    model, _ = load_model(
        options.model, dtype=options.dtype, attn_implementation=options.attn_implementation,
        trust_remote_code=options.trust_remote_code, tokenizer=tokenizer,
    )  # fmt: skip
    model.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    note = f"; {len(long)} over {options.max_length} tokens are left out" if long else ""
    print(f"{len(chains)} chains, {sum(len(c.steps) for c in chains)} steps{note}")
    running = {"max_tokens": options.max_tokens, "engine": options.engine, "resume": options.resume}
    settings = {"model": options.model, "dtype": options.dtype, "split_by": options.split_by, "grader": options.grader}
    settings |= {"chat_template_kwargs": template} if template else {}
    by_probe = answer_grader(grader, probe)
    graded = {"grader": by_probe, "num_samples": options.num_samples, "seed": options.seed}
    traced = trace_values(
        model, tokenizer, chains, output / "values.jsonl", probe=probe, gamma=options.gamma, lam=options.lam,
        mode=options.mode, reduce=options.reduce, batch_size=options.batch_size, progress=_progress("values"),
        settings=settings, **running, **(graded if options.mode == "graded" else {}),
    )  # fmt: skip
    rows = None
    pairing = _pairing(options)
    if options.pairs == "chains":
        rows = rollout_pairs(chains, traced, tokenizer, output / "pairs.jsonl", **pairing)
    elif options.pairs == "sampled":
        rows = trace_pairs(
            model, tokenizer, chains, output / "pairs.jsonl", states_per_chain=options.states, pairing=pairing,
            num_candidates=options.num_candidates, value=options.value, gamma=options.gamma,
            grader=answer_grader(grader), probe=probe, split_by=options.split_by, final=options.final,
            max_step_tokens=options.max_step_tokens,
            max_continuation_tokens=options.max_continuation_tokens, temperature=options.temperature,
            seed=options.seed, progress=_progress("pairs"), settings=settings, **running,
        )  # fmt: skip
    if options.plot:
        from ..tracing.page import write_page
        from ..tracing.picture import draw_chain

        for number, row in enumerate(traced[: options.plot], 1):
            draw_chain(row, output / f"chain_{number:03}.png")
        write_page(traced, output / "chains.html", title=f"Steps as {Path(options.model).name} values them")
    print(summary(traced, rows))
    print(f"\nwritten to {output}")


def _checked(options: argparse.Namespace) -> Probe:
    """The probe; ValueError for an option that none of what follows would take."""
    from ..signals.pairing.candidates import CandidateOptions
    from ..signals.pairing.pairs import PairOptions
    from ..signals.probing.options import ProbeOptions
    from ..signals.probing.texts import as_probe
    from ..signals.split import split_text

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"trace: expected one process, got {os.environ['WORLD_SIZE']} (WORLD_SIZE), all for one file")
    split_text("", options.split_by)
    ProbeOptions(
        mode=options.mode, reduce=options.reduce, engine=options.engine, max_tokens=options.max_tokens,
        num_samples=options.num_samples, seed=options.seed,
    )  # fmt: skip
    for name in ("gamma", "lam"):
        if not 0 <= getattr(options, name) <= 1:
            raise ValueError(f"--{name}: expected a number in [0, 1], got {getattr(options, name)}")
    PairOptions(**_pairing(options))
    if options.pairs == "sampled":
        CandidateOptions(
            value=options.value, num_candidates=options.num_candidates, gamma=options.gamma,
            split_by=options.split_by, final=options.final, max_step_tokens=options.max_step_tokens,
            max_continuation_tokens=options.max_continuation_tokens, temperature=options.temperature,
        )  # fmt: skip
    found = {"ends": tuple(options.probe_end)} if options.probe_end else {}
    found |= {"turn": True} if options.probe_turn else {}
    found |= {"chat_template_kwargs": dict(options.chat_template_option)} if options.chat_template_option else {}
    return replace(as_probe(options.probe), **found)


def _pairing(options: argparse.Namespace) -> dict:
    names = ("min_gap", "weight", "margin", "max_pairs")
    return {name: getattr(options, name) for name in names}


def summary(traced: list[dict], pairs: list[dict] | None) -> str:
    """A few lines on what was found."""
    lines = [f"{'':24}{'chains':>8}{'V of the question':>20}{'V before the last step':>24}"]
    for name, wanted in (("reward above 0", True), ("reward 0 or less", False)):
        some = [row for row in traced if (row["reward"] > 0) == wanted and row["steps"]]
        if some:
            first, last = (sum(row["values"][at] for row in some) / len(some) for at in (0, -2))
            lines.append(f"{name:24}{len(some):8}{first:20.3f}{last:24.3f}")
    if pairs is not None:
        lines.append(f"{len(pairs)} pairs of steps at {len({(p['source'], p['branch']) for p in pairs})} states")
    return "\n".join(lines)


def _progress(title: str) -> Callable[[int, int], None]:
    """A line on standard error, at most every two seconds."""
    start = shown = time.monotonic()
    begun: int | None = None

    def update(done: int, total: int) -> None:
        nonlocal shown, begun
        begun = done if begun is None else begun
        now = time.monotonic()
        if done < total and now - shown < 2:
            return
        shown = now
        speed = (now - start) / max(done - begun, 1)
        left = f", {speed * (total - done):.0f} s left" if begun < done < total else ""
        print(f"{title}: {done} of {total} chains{left}", file=sys.stderr, flush=True)

    return update
