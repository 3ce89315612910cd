# SPDX-License-Identifier: Apache-2.0
"""One run: one arm with one seed. It writes its JSON file at the end, as a whole; its checkpoints let it go on."""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks import records
from sspo_ext.data.graders import answer_grader
from sspo_ext.data.prompts import prompt_tokens
from sspo_ext.hf.wrappers import eval_mode
from sspo_ext.signals import StepBatch, StepValues, step_gae
from sspo_ext.signals.probing.budget import budget_curve
from sspo_ext.signals.probing.choose import choose_probe
from sspo_ext.train.checkpoints import newest_checkpoint
from sspo_ext.train.experience import Rollout
from sspo_ext.train.models import load_model
from sspo_ext.train.progress import curves
from sspo_ext.train.sspo_trainer import SSPOTrainer

from ..real_run import hardware
from .arms import ARMS, make_trainer, train_shortest
from .tasks import Task, make_task

_BOTH = ("weights", "bf16", "dtype", "max_completion_length")

# What decides how a run trains, and how it is measured; runs that differ here do not belong into one table.
TRAINED = (*_BOTH, "prompts", "num_generations", "lr", "lora_r", "lora_share")

MEASURED = (*_BOTH, "held_out")

SHOWN = (*TRAINED, "held_out", "engine", "budget_chains", "device", "threads")

CHAINS = 8  # held-out problems whose chains are kept for the pictures


class _Lines(TrainerCallback):
    """Prints a line after each update. The parent process counts them."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "accuracy" in logs:
            print(f"{state.global_step} {logs['accuracy']:.3f} {logs['completions/mean_length']:.2f}", flush=True)


def run(settings: dict, arm_name: str, seed: int, work: Path) -> dict:
    """Trains an arm and measures it.

    Args:
        settings: Of the command.
        arm_name: The arm.
        seed: Decides problems and rollouts.
        work: Where checkpoints and the probe found are kept.

    Returns:
        The row of the results.
    """
    torch.set_num_threads(settings["threads"])
    logging.getLogger("transformers").setLevel(logging.ERROR)
    arm = ARMS[arm_name]
    model, tokenizer = load_model(settings["model_path"], dtype=getattr(torch, settings["dtype"]))
    model = model.to(settings["device"])  # type: ignore[arg-type]
    task = make_task(settings["data"], settings["gsm8k"], tokenizer)
    found = {"probe": task.probe, "table": ""}
    if task.probe is None:
        found = found_probe(model, tokenizer, task, settings, work / "probe.json")
    probe = found["probe"]
    folder = work / "runs" / f"{arm_name}-{seed}"
    check_folder(folder, settings)
    trainer = make_trainer(
        model, tokenizer, task, arm, folder, settings, seed=seed, probe=probe, callbacks=[_Lines()]
    )  # fmt: skip
    began = time.process_time()
    log: Sequence[Any] = []
    if arm_name == "shortest":
        log = train_shortest(trainer)
    elif arm.trains:
        trainer.train(resume_from_checkpoint=newest_checkpoint(folder))
        log = [row for row in trainer.state.log_history if "accuracy" in row]
    seconds = time.process_time() - began
    trainer.args.max_completion_length = settings["max_completion_length"] or task.max_completion_length
    samples = settings["prompts"] * settings["num_generations"]
    row = {
        **{name: settings[name] for name in ("name", "data", "command")},
        "arm": arm_name,
        "seed": seed,
        "updates": settings["updates"] if arm.trains else 0,
        "samples": samples if arm.trains else 0,
        "settings": {k: settings[k] for k in SHOWN},
        "probe": probe,
        "probe_table": found["table"],
        "hardware": hardware(),
        "cpu_seconds": round(seconds, 1),
        "sampled_tokens": round(sum(r["completions/mean_length"] for r in log) * samples),
        "curves": curves(log) if arm_name != "shortest" else {},
        **evaluated(trainer, task, settings, seed),
    }
    return row


def check_folder(folder: Path, settings: dict) -> None:
    """Keeps the settings beside a run's checkpoints. Raises SystemExit if those there were made with others."""
    file, mine = folder / "settings.json", {k: settings[k] for k in TRAINED}
    if file.exists() and (there := json.loads(file.read_text(encoding="utf-8"))) != mine:
        raise SystemExit(other_settings(f"{folder} has checkpoints", there, mine))
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(mine), encoding="utf-8")


def other_settings(what: str, there: dict, mine: dict) -> str:
    """The sentence that refuses to mix runs of several settings."""
    names = ", ".join(f"{k} {there.get(k)!r} and not {v!r}" for k, v in mine.items() if there.get(k) != v)
    return f"{what} of other settings ({names}); give those, another --output and --work, or --redo"


def found_probe(model, tokenizer, task: Task, settings: dict, file: Path) -> dict:
    """The probe that makes the model answer, by its name or text, and the table; found once and kept in `file`."""
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    some = task.train(0)[: settings["probe_problems"]]
    choice = choose_probe(
        model, tokenizer, [prompt_tokens(p.prompt, tokenizer) for p in some], [p.answer for p in some], ["Answer:"],
        max_completion_length=settings["max_completion_length"] or task.max_completion_length,
    )  # fmt: skip
    best = next(
        (t for t in choice.trials if t.name == choice.best), choice.trials[0]
    )  # the table says if there is none
    found = {"probe": best.name, "table": choice.table()}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")
    return found


def evaluated(trainer: SSPOTrainer, task: Task, settings: dict, seed: int) -> dict:
    """Accuracy, tokens, steps and skipped steps of held-out problems, greedy and sampled; budget curve; chains."""
    problems = task.held_out(settings["held_out"])
    found: dict[str, Any] = {"groups": [task.group(p) for p in problems]}
    with eval_mode(trainer.model):
        for how, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            found[how], rollouts = measured(trainer, task, problems, temperature, seed)
            print(f"measured {how}", flush=True)
            if how == "greedy":
                found["budget"] = budgets(trainer, task, rollouts[: settings["budget_chains"]])
                found["chains"] = chains(trainer, rollouts[:CHAINS])
    return found


def measured(
    trainer: SSPOTrainer, task: Task, problems: Sequence[Any], temperature: float, seed: int
) -> tuple[dict, list[Rollout]]:
    """One list for each of "correct" (0 or 1), "tokens", "steps" and "skipped", one number a problem; the rollouts."""
    rows = [{"prompt": p.prompt, "answer": p.answer} for p in problems]
    rollouts = trainer.roll_out(rows, [(seed, i) for i in range(len(rows))], temperature=temperature)
    reviews = [task.review(p, r.text) for p, r in zip(problems, rollouts, strict=True)]
    # A completion that was cut off counts as wrong, even if it holds the answer.
    return {
        "correct": [int(v.correct and r.ended) for v, r in zip(reviews, rollouts, strict=True)],
        "tokens": [len(r.completion_ids) for r in rollouts],
        "steps": [len(r.steps) for r in rollouts],
        "skipped": [v.skipped for v in reviews],
    }, rollouts


def budgets(trainer: SSPOTrainer, task: Task, rollouts: Sequence[Rollout]) -> dict:
    """Accuracy if the answer is demanded after so many tokens of the greedy completions."""
    if not rollouts:
        return {}
    longest = trainer.args.max_completion_length
    batch = StepBatch([r.prompt_ids for r in rollouts], [r.steps for r in rollouts])
    with torch.no_grad(), trainer.accelerator.autocast():
        return budget_curve(
            trainer.model, trainer.processing_class, batch, [r.row["answer"] for r in rollouts], trainer.args.asked,
            answer_grader(task.reward, trainer.args.asked), budgets=[longest * i // 10 for i in range(9)],
            rewards=[r.reward if r.ended else None for r in rollouts], max_answer_tokens=6,
        ).to_dict()  # fmt: skip


def chains(trainer: SSPOTrainer, rollouts: Sequence[Rollout]) -> list[dict]:
    """Chains with values and advantages, as `sspo_ext.tracing.picture.draw_chain` draws them."""
    tokenizer: Any = trainer.processing_class
    values = SSPOTrainer.step_values(trainer, rollouts)
    batch = StepValues.from_lists(values)
    rewards = torch.tensor([r.reward for r in rollouts])
    advantages = step_gae(batch, rewards, gamma=trainer.args.gamma, lam=0.0).split([len(r.steps) for r in rollouts])
    return [
        {
            "prompt": r.row["prompt"],
            "answer": r.row["answer"],
            "reward": r.reward,
            "steps": [tokenizer.decode(step, skip_special_tokens=True) for step in r.steps],
            "values": [round(v, 4) for v in of_chain],
            "advantages": [round(a, 4) for a in advantage.tolist()],
        }
        for r, of_chain, advantage in zip(rollouts, values, advantages, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0])
    parser.add_argument("--settings", required=True, help="JSON file of the command's settings")
    parser.add_argument("--arm", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", required=True)
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    settings = json.loads(Path(options.settings).read_text(encoding="utf-8"))
    records.write(Path(options.output), [run(settings, options.arm, options.seed, Path(options.work))])


if __name__ == "__main__":
    main()
