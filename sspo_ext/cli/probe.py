# SPDX-License-Identifier: Apache-2.0
"""`sspo-ext probe`: which probe makes a model answer. Imports nothing heavy until it runs."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import add_loading, add_model, add_prompts, check_effect, count, not_negative, positive
from .training import load

if TYPE_CHECKING:
    from ..signals.probing.compare import ProbeChoice
    from ..signals.probing.texts import Probe
    from ..train.experience import Rollout

DESCRIPTION = """\
Find the probe that makes a model answer, before training with sspo-ext rl.
The model completes some prompts. After each step of each completion every probe
asks for the answer. A good probe's value is low before the answer is reached
and high after it."""

EXAMPLE = "sspo-ext probe --model MODEL --data problems.jsonl --grader math-verify --text 'So the answer is'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sspo-ext probe`."""
    add_model(parser)
    add = parser.add_argument
    add(
        "--data", required=True, nargs="+", metavar="JSONL",
        help="rows with prompt (a text or chat messages) and answer, as for sspo-ext rl",
    )  # fmt: skip
    add("--prompts", type=positive, default=16, metavar="N", help="take the first N rows")
    add(
        "--grader", default="exact",
        help="what says whether a completion is right: exact, exact:MARKER, math-verify, reasoning-gym or "
        "module:function",
    )  # fmt: skip
    add("--output", metavar="JSON", help="file for the table's numbers")
    group = parser.add_argument_group("probes")
    add = group.add_argument
    add("--text", action="append", default=[], help="a text to try, or a language (en, zh, ...); repeatable")
    add("--builtin", action=argparse.BooleanOptionalAction, default=True, help="try the texts of all languages as well")
    add("--probe-turn", action="store_true", help="try each text in a new turn of the user too")
    add("--engine", default="auto", choices=("auto", "packed", "cached", "separate"), help="how values are computed")
    add("--max-tokens", type=positive, default=4096, help="most tokens in one forward pass of the values")
    add = parser.add_argument_group("forced answers").add_argument
    add(
        "--budget", choices=("steps", "tokens"),
        help="also measure how often the model is right if the best probe demands the answer after so many steps or "
        "tokens of a completion",
    )  # fmt: skip
    add(
        "--budgets", type=count, nargs="+", metavar="N",
        help="the budgets to try; the same for models that are compared (default: up to 17 over the completions)",
    )  # fmt: skip
    add("--plot", metavar="PNG", help="file for a picture of that curve")
    group = parser.add_argument_group("completions")
    add = group.add_argument
    add("--num-generations", type=positive, default=4, help="completions of each prompt")
    add("--max-completion-length", type=positive, default=256, help="most tokens; one that reaches it is wrong")
    add("--temperature", type=not_negative, default=1.0, help="temperature of sampling; 0: greedy, one of each prompt")
    add(
        "--split-by", default="newline",
        help="where a completion is split into steps: newline, blank_line, or a regular expression",
    )  # fmt: skip
    add_prompts(group)
    add(
        "--rollout-engine", default="auto", choices=("auto", "compact", "generate"),
        help="what completes the prompts. compact: a loop that reads a prompt once and drops finished completions; "
        "generate: transformers; auto: compact where the model allows it, else generate",
    )  # fmt: skip
    add("--rollout-batch-size", type=positive, default=16, help="completions sampled at once")
    add("--seed", type=count, default=0, help="seed of the completions")
    add("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    add_loading(parser)


def run(options: argparse.Namespace) -> None:
    """Print the table and what to take; write it with --output."""
    from ..data.graders import load_grader
    from ..data.prompts import load_prompt_rows
    from ..signals.probing.choose import named_probes
    from ..signals.split import split_text

    # Cheap checks come first: options, files, rows, then the model.
    split_text("", options.split_by)
    if options.split_by == "numbered":
        raise ValueError("--split-by: 'numbered' shows in no single token; expected newline, blank_line or a regex")
    probes = named_probes(options.text, builtin=options.builtin)
    if not options.budget:
        check_effect(options, "budgets plot", "without --budget")
    for name in ("output", "plot"):
        path = Path(getattr(options, name) or ".")
        if not path.resolve().parent.is_dir():
            raise ValueError(f"--{name}: no folder {str(path.parent)!r}")
    grader = load_grader(options.grader)
    rows = load_prompt_rows(options.data, texts=True)[: options.prompts]

    import torch

    from ..train.models import load_tokenizer

    tokenizer = load_tokenizer(options.model, trust_remote_code=options.trust_remote_code)
    if options.probe_turn:
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError("--probe-turn: the tokenizer has no chat template, which writes the user's turn")
        probes |= _in_turns(probes, dict(options.chat_template_option))
    prompts = _checked_prompts(options, rows, tokenizer)
    model, _ = load(options, tokenizer)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)  # pyright: ignore[reportArgumentType]  # a decorator of transformers hides the signature
    _check_fits(options, model, tokenizer, prompts, rows, probes)
    rollouts = _complete(options, model, tokenizer, rows, prompts, grader)
    choice = _compare(options, model, tokenizer, rollouts, probes)
    print(choice.table())
    found = {"options": {name: getattr(options, name) for name in _MADE}, **choice.to_dict()}
    if options.budget:
        found["budget"] = _budget(options, model, tokenizer, rollouts, choice, grader)
    if options.output:
        text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False)
        Path(options.output).write_text(text + "\n", encoding="utf-8")
        print(f"\nwritten to {options.output}")


_MADE = (
    "model data prompts grader text probe_turn num_generations max_completion_length temperature split_by seed dtype"
).split()


def _in_turns(probes: dict[str, Probe], template: dict[str, Any]) -> dict[str, Probe]:
    """The probes asked in a turn of the user."""
    asked = {"turn": True, "separator": "", "chat_template_kwargs": template or None}
    return {f"{name}, turn": replace(probe, **asked) for name, probe in probes.items()}


def _checked_prompts(options: argparse.Namespace, rows: list[dict], tokenizer) -> list[list[int]]:
    from ..data.prompts import check_rows
    from ..train.sspo_inputs import has_chat

    return check_rows(
        "--data", rows, chat=has_chat(tokenizer), answers=True, texts=True, tokenizer=tokenizer,
        chat_template_kwargs=dict(options.chat_template_option), special_tokens=options.special_tokens,
    )  # fmt: skip


def _check_fits(options: argparse.Namespace, model, tokenizer, prompts, rows, probes: dict[str, Probe]) -> None:
    """ValueError for prompts that the model cannot read with a completion, a probe and an answer."""
    from ..data.graders import answer_texts
    from ..train.limits import check_fits, model_limits

    def tokens(texts) -> int:
        return max(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)

    asked = tokens(p.text for p in probes.values()) + tokens(t for row in rows for t in answer_texts(row["answer"]))
    named = ((f"row {i}", [ids]) for i, ids in enumerate(prompts))
    check_fits("--data", named, model_limits(model), more=options.max_completion_length + asked)


def _complete(options: argparse.Namespace, model, tokenizer, rows, prompts, grader) -> list[Rollout]:
    """Completions of the prompts, in steps and graded."""
    import torch
    from tqdm.auto import tqdm

    from ..data.rewards import RewardFunctions
    from ..train.experience import graded_rollouts
    from ..train.rollout import end_tokens, make_engine
    from ..train.sampling import Completions, Sampling
    from ..train.sspo_inputs import step_delimiters

    ends = end_tokens(model, tokenizer)
    sampling = Sampling(options.max_completion_length, ends, options.temperature)
    delimiters = step_delimiters(model, tokenizer, options.split_by, ends)
    engine = make_engine(options.rollout_engine, tokenizer, rows_at_once=options.rollout_batch_size)
    each = options.num_generations if options.temperature else 1
    places = [(i, j) for i in range(len(rows)) for j in range(each)]
    completions: list[list[int]] = []
    model.eval()
    with tqdm(total=len(places), desc="completions", disable=None) as bar, torch.no_grad():
        for start in range(0, len(places), options.rollout_batch_size):
            some = places[start : start + options.rollout_batch_size]
            seeds = [(options.seed, i, j) for i, j in some]
            made = engine.complete(model, [prompts[i] for i, _ in some], sampling, seeds)
            completions += Completions.of(made).token_ids
            bar.update(len(some))
    owned = [rows[i] for i, _ in places]
    return graded_rollouts(
        owned, [prompts[i] for i, _ in places], Completions(completions), tokenizer, ends, delimiters,
        RewardFunctions(grader),
    )  # fmt: skip


def _compare(options: argparse.Namespace, model, tokenizer, rollouts, probes: dict[str, Probe]) -> ProbeChoice:
    from tqdm.auto import tqdm

    from ..data.graders import answer_texts
    from ..signals.probing.compare import compare_probes
    from ..signals.values import StepBatch

    batch = StepBatch([r.prompt_ids for r in rollouts], [r.steps for r in rollouts])
    with tqdm(total=len(rollouts), desc="values", disable=None) as bar:

        def told(done: int, of: int) -> None:
            bar.update(done - bar.n)

        return compare_probes(
            model, tokenizer, batch, [answer_texts(r.row["answer"]) for r in rollouts], [r.reward for r in rollouts],
            probes, engine=options.engine, max_tokens=options.max_tokens, progress=told,
        )  # fmt: skip


def _budget(options: argparse.Namespace, model, tokenizer, rollouts, choice: ProbeChoice, grader) -> dict[str, Any]:
    """Measure, print and draw the budget curve of the best probe."""
    from ..data.graders import answer_grader
    from ..signals.probing.budget import budget_curve
    from ..signals.values import StepBatch

    probe = choice.trials[0].probe
    judge = answer_grader(grader, probe)

    def right(text: str, row: dict) -> float:
        return judge(text, row["answer"], **{name: value for name, value in row.items() if name != "answer"})

    curve = budget_curve(
        model, tokenizer, StepBatch([r.prompt_ids for r in rollouts], [r.steps for r in rollouts]),
        [r.row for r in rollouts], probe, right, by=options.budget, budgets=options.budgets,
        rewards=[r.reward if r.ended else None for r in rollouts], max_tokens=options.max_tokens,
    )  # fmt: skip
    points = ", ".join(f"{n}: {a:.2f}" for n, a in zip(curve.budgets, curve.accuracy, strict=True))
    print(f"\nRight if {choice.trials[0].name!r} demands the answer after so many {curve.by}: {points}")
    print(f"The area under this curve is {curve.area:.3f}, and the completions have {curve.spent[-1]:.1f} tokens.")
    if options.plot:
        from ..tracing.budgets import draw_budget_curves

        draw_budget_curves({Path(options.model).name: curve}, options.plot)
    return {"probe": choice.trials[0].name, **curve.to_dict()}
