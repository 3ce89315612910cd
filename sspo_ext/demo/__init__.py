# SPDX-License-Identifier: Apache-2.0
"""`sspo-ext demo`: a small language model learns to reason right and short, offline, in under two minutes.

The start model has two layers and ships with the package; `sspo_ext.demo.imitate` made it. It imitates a wordy teacher
who checks again, repeats, hesitates and slips. It is trained twice: by policy optimisation on the outcome alone (RLOO),
and by SSPO with the values that the model gives to its own steps. In both the reward is whether the answer is right; it
sees no length. The problems of the table are in no training.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers.utils.logging import disable_progress_bar

from ..signals.credit.gae import step_gae
from ..signals.values import StepValues
from ..train.experience import Rollout
from ..train.progress import curves
from ..train.sspo_trainer import SSPOTrainer
from .arms import Progress, load_start, make_trainer, means, measure
from .claim import of_problems, table
from .tasks import Problem, Task

SHOWN = 60  # problems of which the picture takes one


@dataclass(frozen=True)
class DemoConfig:
    """The settings of the demo, all in this place.

    Attributes:
        seed: Decides the problems and the rollouts.
        updates: Updates of each of the two runs.
        prompts: Prompts in an update.
        num_generations: Completions of each prompt.
        gamma: The discount for each step.
        lam: Lambda of GAE. With 0 a step's advantage is its own progress, so its effect comes from the values alone.
        lr: The learning rate at its peak.
        lr_scheduler_type: How it falls, so that the last updates change little.
        held_out: Problems of the table.
    """

    seed: int = 0
    updates: int = 40
    prompts: int = 24
    num_generations: int = 8
    gamma: float = 0.9
    lam: float = 0.0
    lr: float = 1e-3
    lr_scheduler_type: str = "linear"
    held_out: int = 600


def run(output_dir: str | os.PathLike, config: DemoConfig | None = None) -> dict:
    """Trains twice, prints table and finding, and writes demo.png, demo.json and the model that SSPO trained.

    It runs on one thread: matrices this small gain nothing from a second, and the numbers depend only on the seed and
    the machine.

    Args:
        output_dir: The folder to write into.
        config: The settings; None means the defaults.

    Returns:
        What demo.json holds: "config", "seconds", the finding as numbers and words ("claim", "sentence"), and by stage
        ("start", "outcome", "sspo") the numbers of the held-out problems ("stages"), the course of training ("curves")
        and some solutions step by step ("chains").
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = _run(Path(output_dir), config or DemoConfig())
    finally:
        torch.set_num_threads(threads)
    print(f"\n{table(result['stages'])}\n\n{result['sentence']}")
    folder = Path(output_dir)
    print(f"\n{result['seconds']:.0f} s. Picture: {folder / 'demo.png'}  Model: {folder / 'model'}")
    return result


def _run(folder: Path, config: DemoConfig) -> dict:
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    disable_progress_bar()  # the model that is loaded and saved has half a megabyte
    task = Task("sums")
    held_out = task.problems(config.held_out, 1, held_out=True)
    start, tokenizer = load_start()
    arms: dict[str, dict] = {"outcome": {"combine": "outcome"}, "sspo": {"gamma": config.gamma, "lam": config.lam}}
    found, chains, runs, trainers = {}, {}, {}, {}
    with tqdm(total=len(arms) * config.updates, unit="update", desc="start model") as bar:
        for name, options in arms.items():
            trainers[name] = trainer = make_trainer(
                copy.deepcopy(start), tokenizer, task, folder / "training", updates=config.updates, seed=config.seed,
                prompts=config.prompts, num_generations=config.num_generations, learning_rate=config.lr,
                lr_scheduler_type=config.lr_scheduler_type, callbacks=[Progress(bar)], **options,
            )  # fmt: skip
            if not found:
                found["start"], chains["start"] = _stage(trainer, task, held_out, config)
            bar.set_description({"outcome": "outcome only", "sspo": "SSPO"}[name])
            trainer.train()
            runs[name] = curves(trainer.state.log_history)
            found[name], chains[name] = _stage(trainer, task, held_out, config)
    trainers["sspo"].model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    claim = of_problems(found["sspo"]["sampled"], found["outcome"]["sampled"])
    result = {
        "config": asdict(config), "seconds": round(time.monotonic() - began, 1), "claim": asdict(claim),
        "sentence": f"{claim.sentence('this run, sampled,')} (95 % intervals over its {config.held_out} held-out "
        "problems; another seed can differ by more).",
        "stages": {name: {how: means(f) for how, f in stage.items()} for name, stage in found.items()},
        "curves": runs, "chains": chains, "problems": [p.prompt for p in held_out[:SHOWN]],
    }  # fmt: skip
    (folder / "demo.json").write_text(json.dumps(result) + "\n")
    from .picture import draw

    draw(result, folder / "demo.png")
    return result


def _stage(
    trainer: SSPOTrainer, task: Task, held_out: Sequence[Problem], config: DemoConfig
) -> tuple[dict, list[dict]]:
    """What `measure` finds on the held-out problems, greedy and sampled; and some greedy solutions step by step."""
    found, rollouts = measure(trainer, task, held_out)
    sampled, _ = measure(trainer, task, held_out, temperature=1.0, seed=config.seed)
    return {"greedy": found, "sampled": sampled}, chains_of(trainer, task, rollouts[:SHOWN], config)


def chains_of(trainer: SSPOTrainer, task: Task, rollouts: Sequence[Rollout], config: DemoConfig) -> list[dict]:
    """Solutions step by step.

    Args:
        trainer: Its model gives the values.
        task: It says which steps are needed.
        rollouts: Graded rollouts.
        config: Its `gamma` and `lam` make the advantages.

    Returns:
        For each rollout whether it is "right", and its "steps": the "text" of each, whether it is "needed" (it applies
        an operation, or is the last and answers), the "value" after it and its "advantage", before any scaling.
    """
    values = StepValues.from_lists(trainer.step_values(rollouts))
    rewards = torch.tensor([r.reward for r in rollouts])
    advantages = step_gae(values, rewards, gamma=config.gamma, lam=config.lam)
    parts = advantages.split(values.steps_per_sequence.tolist())
    decode = trainer.processing_class.decode
    chains = []
    for r, after, advantage in zip(rollouts, values.to_lists(), parts, strict=True):
        texts = [str(decode(ids, skip_special_tokens=True)).strip() for ids in r.steps]
        needed = [op is not None for op in task.applied(texts)]
        needed[-1:] = [needed[-1] or texts[-1].startswith(task.probe)] if needed else []
        rows = zip(texts, needed, after[1:], advantage.tolist(), strict=True)
        steps = [dict(zip(("text", "needed", "value", "advantage"), row, strict=True)) for row in rows]
        chains.append({"right": bool(r.reward), "steps": steps})
    return chains
