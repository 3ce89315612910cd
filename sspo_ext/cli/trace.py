# SPDX-License-Identifier: Apache-2.0
"""`sspo-ext trace`: what the steps of given chains are worth to a model. Imports nothing heavy until it runs."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import add_loading, add_model, add_probe, add_prompts, check_effect, count, positive
from .training import load

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..data.graders import Grader
    from ..signals.probing.texts import Probe
    from ..tracing.chains import Chain

DESCRIPTION = """\
Compute what the steps of given chains of reasoning are worth to a model.
A probe asks the model for the answer after each step. The values and advantages
are written to values.jsonl. With --pairs, step preferences for sspo-ext train
are written to pairs.jsonl."""

EXAMPLE = "sspo-ext trace --model MODEL --data chains.jsonl --output-dir out --pairs sampled --plot 20"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sspo-ext trace`."""
    add_model(parser)
    add = parser.add_argument
    add(
        "--data", required=True, nargs="+", metavar="JSONL",
        help="rows with prompt, response (a text or a list of steps), answer (one, or a list of accepted ones), and "
        "reward or is_correct",
    )  # fmt: skip
    add("--output-dir", required=True, metavar="DIR", help="folder for values.jsonl, pairs.jsonl and pictures")
    add("--resume", action="store_true", help="continue a run that was killed")
    add(
        "--split-by", default="newline",
        help="where a response is split into steps: newline, blank_line, numbered, or a regular expression",
    )  # fmt: skip
    add(
        "--max-length", type=positive, default=2048,
        help="most tokens of prompt and response; longer rows are left out",
    )  # fmt: skip
    add(
        "--grader", default="exact",
        help="what rewards a row without a reward: exact, exact:MARKER, math-verify or module:function",
    )  # fmt: skip
    add_prompts(parser)
    _add_values(parser)
    _add_pairs(parser)
    add = parser.add_argument_group("pictures").add_argument
    add("--plot", type=positive, metavar="N", help="draw each of the first N chains, and write one page of all chains")
    _add_running(parser)
    add_loading(parser)


def _add_values(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("values and advantages")
    add_probe(group)
    add = group.add_argument
    add(
        "--mode", default="likelihood", choices=("likelihood", "graded"),
        help="a step's value. likelihood: the probability of the right answer after it; graded: the share of sampled "
        "answers that the grader accepts",
    )  # fmt: skip
    add(
        "--reduce", default="joint", choices=("joint", "mean", "logprob"),
        help="likelihood of an answer of several tokens. joint: of the whole answer; mean: the geometric mean over its "
        "tokens; logprob: the logarithm of joint, from 0 (e^-10 or less) to 1 (certain)",
    )  # fmt: skip
    add("--num-samples", type=positive, default=5, help="graded: answers sampled after each step")
    add("--gamma", type=float, default=0.9, help="discount per step, of advantages and of continuations")
    add("--lam", type=float, default=0.0, help="lambda of GAE over steps; 0: a step's advantage is its own progress")


def _add_pairs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("step preferences").add_argument
    add(
        "--pairs", default="none", choices=("none", "sampled", "chains"),
        help="which steps are compared. sampled: next steps sampled from the model; chains: the steps where chains of "
        "one prompt part",
    )  # fmt: skip
    add(
        "--value", default="continuation", choices=("continuation", "probe", "both"),
        help="sampled: what ranks a step. continuation: the reward of the model's greedy continuation; probe: the "
        "probe's value; both: a mean of the two",
    )  # fmt: skip
    add("--num-candidates", type=positive, default=12, help="sampled: steps sampled at each state")
    add("--states", type=positive, default=2, help="sampled: random states of each chain")
    add("--temperature", type=float, default=1.0, help="sampled: temperature of the candidates")
    add("--max-step-tokens", type=positive, default=96, help="sampled: a longer step is dropped")
    add(
        "--max-continuation-tokens", type=positive, default=256,
        help="sampled: a longer continuation is worth nothing",
    )  # fmt: skip
    add(
        "--final", metavar="REGEX",
        help="sampled: a response that matches is complete, also without an end of sequence",
    )  # fmt: skip
    add("--min-gap", type=float, default=0.02, help="compare two steps only if their values differ by more")
    add("--max-pairs", type=positive, help="most pairs of a state, the largest gaps first (default: all)")
    add("--weight", default="one", choices=("one", "gap"), help="weight of a pair: 1, or the gap of its values")
    add("--margin", default="none", choices=("none", "gap"), help="margin of a pair: 0, or the gap of its values")


def _add_running(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("running").add_argument
    add(
        "--engine", default="auto", choices=("auto", "packed", "cached", "separate"),
        help="how the states of a chain share their beginning in a forward pass",
    )  # fmt: skip
    add("--max-tokens", type=positive, default=4096, help="most tokens in one forward pass")
    add("--batch-size", type=positive, default=16, help="chains between two writes to values.jsonl")
    add("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    add("--seed", type=count, default=0, help="seed of everything sampled")


@dataclass(frozen=True)
class _Traced:
    """What is traced, and by what."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    chains: list[Chain]
    probe: Probe
    grader: Grader


def run(options: argparse.Namespace) -> None:
    """Write the values, and on request the pairs and pictures; print a summary."""
    from ..data.graders import load_grader

    # Cheap checks come first: arguments, files, rows, then the model.
    probe = _checked(options)
    grader = load_grader(options.grader)
    output = _checked_files(options)
    tokenizer, chains = _load_chains(options, probe, grader)

    import torch

    model, _ = load(options, tokenizer)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)  # pyright: ignore[reportArgumentType]  # a decorator of transformers hides the signature
    traced = _Traced(model, tokenizer, chains, probe, grader)
    _check_fits(options, traced)
    values = _values(options, traced, output)
    pairs = _pairs(options, traced, values, output)
    if options.plot:
        _draw(options, values, output)
    print(summary(values, pairs))
    print(f"\nwritten to {output}")


def _checked(options: argparse.Namespace) -> Probe:
    """The probe. ValueError for an option that a later stage would refuse."""
    from ..signals.pairing.candidates import CandidateOptions
    from ..signals.pairing.pairs import PairOptions
    from ..signals.probing.options import ProbeOptions
    from ..signals.probing.texts import as_probe
    from ..signals.split import split_text

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            f"trace: expected one process, got {os.environ['WORLD_SIZE']} (WORLD_SIZE); all would write the same files"
        )
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
    _check_effects(options)
    given: dict[str, Any] = {"ends": tuple(options.probe_end)} if options.probe_end else {}
    given |= {"turn": True} if options.probe_turn else {}
    given |= {"chat_template_kwargs": dict(options.chat_template_option)} if options.chat_template_option else {}
    return replace(as_probe(options.probe), **given)


def _check_effects(options: argparse.Namespace) -> None:
    """ValueError for options that have no effect beside the others."""
    if options.pairs == "none":
        check_effect(options, "min_gap max_pairs weight margin", "without --pairs")
    if options.pairs != "sampled":
        names = "value num_candidates states temperature max_step_tokens max_continuation_tokens final"
        check_effect(options, names, "without --pairs sampled")
        if options.mode != "graded":
            check_effect(options, "seed", "without --pairs sampled or --mode graded, which draw samples")


def _pairing(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `pair_candidates`."""
    names = ("min_gap", "weight", "margin", "max_pairs")
    return {name: getattr(options, name) for name in names}


def _checked_files(options: argparse.Namespace) -> Path:
    """The output folder. ValueError for a missing input or files of another run."""
    from ..tracing.lines import check_free

    missing = [name for name in options.data if not Path(name).is_file()]
    if missing:
        raise ValueError(f"--data: {missing[0]!r} is not there")
    output = Path(options.output_dir)
    for name in ("values.jsonl", "pairs.jsonl.nodes"):
        check_free(output / name, resume=options.resume)
    return output


def _load_chains(
    options: argparse.Namespace, probe: Probe, grader: Grader
) -> tuple[PreTrainedTokenizerBase, list[Chain]]:
    from ..tracing.chains import load_chains
    from ..train.models import load_tokenizer

    tokenizer = load_tokenizer(options.model, trust_remote_code=options.trust_remote_code)
    if probe.turn and getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("--probe-turn: the tokenizer has no chat template, which writes the user's turn")
    chains, long = load_chains(
        options.data, tokenizer, split_by=options.split_by, max_length=options.max_length, grader=grader,
        chat_template_kwargs=dict(options.chat_template_option), special_tokens=options.special_tokens,
    )  # fmt: skip
    if not chains and not long:
        raise ValueError(f"--data: expected at least one chain, found none in {', '.join(options.data)}")
    if not chains:
        raise ValueError(
            f"--data: no chain of at most {options.max_length} tokens, {len(long)} are longer; give a larger "
            "--max-length"
        )
    if options.pairs != "sampled" and not any(chain.steps for chain in chains):
        raise ValueError(f"--data: expected a response with a step, found none in {', '.join(options.data)}")
    note = f"; {len(long)} over {options.max_length} tokens are left out" if long else ""
    print(f"{len(chains)} chains, {sum(len(c.steps) for c in chains)} steps{note}")
    return tokenizer, chains


def _check_fits(options: argparse.Namespace, traced: _Traced) -> None:
    """ValueError for chains that the model cannot read, with the probe or with what is sampled behind them."""
    from ..train.limits import check_fits, model_limits

    probe = f"{traced.probe.text}{traced.probe.separator}{traced.probe.ends[0]}"
    asked = len(traced.tokenizer(probe, add_special_tokens=False)["input_ids"])
    sampled = options.max_step_tokens + options.max_continuation_tokens if options.pairs == "sampled" else 0
    rows = ((c.source, [[*c.prompt_ids, *(i for step in c.step_ids for i in step)]]) for c in traced.chains)
    check_fits("--data", rows, model_limits(traced.model), more=max(asked, sampled))


def _running(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments that `trace_values` and `trace_pairs` share."""
    settings = {"model": options.model, "dtype": options.dtype, "split_by": options.split_by, "grader": options.grader}
    if options.chat_template_option:
        settings["chat_template_kwargs"] = dict(options.chat_template_option)
    running = {"max_tokens": options.max_tokens, "engine": options.engine, "resume": options.resume}
    return {**running, "settings": settings}


def _values(options: argparse.Namespace, traced: _Traced, output: Path) -> list[dict]:
    from ..data.graders import answer_grader
    from ..tracing.values import trace_values

    graded = {}
    if options.mode == "graded":
        by_probe = answer_grader(traced.grader, traced.probe)
        graded = {"grader": by_probe, "num_samples": options.num_samples, "seed": options.seed}
    return trace_values(
        traced.model, traced.tokenizer, traced.chains, output / "values.jsonl", probe=traced.probe,
        gamma=options.gamma, lam=options.lam, mode=options.mode, reduce=options.reduce, batch_size=options.batch_size,
        progress=_progress("values"), **_running(options), **graded,
    )  # fmt: skip


def _pairs(options: argparse.Namespace, traced: _Traced, values: list[dict], output: Path) -> list[dict] | None:
    from ..data.graders import answer_grader
    from ..tracing.values import rollout_pairs, trace_pairs

    if options.pairs == "chains":
        return rollout_pairs(traced.chains, values, traced.tokenizer, output / "pairs.jsonl", **_pairing(options))
    if options.pairs == "sampled":
        return trace_pairs(
            traced.model, traced.tokenizer, traced.chains, output / "pairs.jsonl", states_per_chain=options.states,
            pairing=_pairing(options), num_candidates=options.num_candidates, value=options.value, gamma=options.gamma,
            grader=answer_grader(traced.grader), probe=traced.probe, split_by=options.split_by, final=options.final,
            max_step_tokens=options.max_step_tokens, max_continuation_tokens=options.max_continuation_tokens,
            temperature=options.temperature, seed=options.seed, progress=_progress("pairs"), **_running(options),
        )  # fmt: skip
    return None


def _draw(options: argparse.Namespace, values: list[dict], output: Path) -> None:
    from ..tracing.page import write_page
    from ..tracing.picture import draw_chain

    for number, row in enumerate(values[: options.plot], 1):
        draw_chain(row, output / f"chain_{number:03}.png")
    write_page(values, output / "chains.html", title=f"Steps as {Path(options.model).name} values them")


def summary(traced: list[dict], pairs: list[dict] | None) -> str:
    """A few lines about the values and pairs that were found."""
    lines = [f"{'':24}{'chains':>8}{'V of the question':>20}{'V before the last step':>24}"]
    for name, wanted in (("reward above 0", True), ("reward 0 or less", False)):
        some = [row for row in traced if (row["reward"] > 0) == wanted and row["steps"]]
        if some:
            first, last = (sum(row["values"][at] for row in some) / len(some) for at in (0, -2))
            lines.append(f"{name:24}{len(some):8}{first:20.3f}{last:24.3f}")
    if pairs is not None:
        lines.append(f"{len(pairs)} pairs of steps at {len({(p['source'], p['branch']) for p in pairs})} states")
        if not pairs:
            lines.append("no two steps after the same state differ by more than --min-gap; --min-gap 0 shows the gaps")
    return "\n".join(lines)


def _progress(title: str) -> Callable[[int, int], None]:
    """Reports progress on standard error, at most every two seconds."""
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
