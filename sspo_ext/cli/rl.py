"""`sspo-ext rl`: SSPO on a file of prompts and answers. Imports nothing heavy until it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from ..data.prompts import load_prompt_rows
from .arguments import setting


def add_arguments(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    several = {"type": setting, "action": "append", "default": [], "metavar": "NAME=VALUE"}
    add = parser.add_argument
    add("--model", required=True, help="hub name, folder, folder with one .gguf file, or .gguf file")
    add("--data", required=True, nargs="+", metavar="JSONL", help="rows: prompt (a text or chat messages) and answer")
    add("--eval-data", nargs="+", metavar="JSONL", help="held-out rows, completed greedily before and after")
    add("--grader", default="exact", help="exact, exact:MARKER, math-verify, reasoning-gym or module:function")
    add("--output-dir", required=True, help="checkpoints, the trained model and progress.png")
    add("--resume", action="store_true", help="go on from the last checkpoint in --output-dir")

    add = parser.add_argument_group("rollouts").add_argument
    add("--num-generations", type=positive, default=8, help="completions of every prompt")
    add("--max-completion-length", type=positive, default=256, help="tokens; what reaches it earns nothing")
    add("--temperature", type=float, default=1.0, help="of sampling, and of the loss")
    add("--top-p", type=float, default=1.0, help="nucleus sampling; below 1 the loss is not of what was sampled from")
    add("--top-k", type=int, default=0, help="sample from the k most probable tokens; 0: from all")
    add("--chat-template-option", **several, help="as enable_thinking=false")
    add("--rollout-engine", default="generate", choices=("generate", "compact", "vllm"), help="what completes prompts")
    add("--rollout-batch-size", type=positive, help="rows completed at once (default: all of an update)")
    add("--rollout-option", **several, help="of vllm, as gpu_memory_utilization=0.4")

    add = parser.add_argument_group("steps, values, advantages").add_argument
    add("--split-by", default="newline", help="newline, blank_line, or a regular expression")
    add("--probe", default="en", help="a language (en, zh, ...) or the text that asks for the answer")
    add("--probe-end", action="append", metavar="TEXT", help="may follow the answer (default: anything); repeatable")
    add("--probe-turn", action="store_true", help="ask in a turn of the user's, by the chat template")
    add("--probe-option", **several, help="as mode=graded, num_samples=5, reduce=mean, engine=packed")
    add("--gamma", type=float, default=0.9, help="discount per step; below 1 it makes reasoning short")
    add("--lam", type=float, default=0.9, help="lambda of GAE over steps; 0 is a step's own progress")
    add("--baseline", default="rloo", help="rloo, grpo, dr_grpo, reinforce, reinforce++ or reinforce++_baseline")
    add(
        "--combine", default="add", choices=("add", "replace", "outcome"),
        help="step advantages with the outcome's; outcome: that alone, without probing",
    )  # fmt: skip
    add("--step-scale", type=float, default=1.0, help="weight of the step advantages beside the outcome's")
    add(
        "--scale-advantages", action=argparse.BooleanOptionalAction, default=True,
        help="divide each of the two by its standard deviation over the update",
    )  # fmt: skip

    add = parser.add_argument_group("loss").add_argument
    add("--loss-type", default="reinforce", help="reinforce, ppo or cispo")
    add("--loss-option", **several, help="as delta=4, or importance_sampling_level=sequence (GSPO)")
    add("--epsilon", type=float, help="clipping below (default: the loss type's)")
    add("--epsilon-high", type=float, help="clipping above (default: the loss type's)")
    add("--beta", type=float, default=0.0, help="weight of the KL to the model as given; 0 keeps no reference")
    add("--kl-estimator", default="k3", choices=("k1", "k2", "k3"), help="of that KL")
    add("--entropy-coef", type=float, default=0.0, help="weight of the entropy bonus")
    add("--aggregation", default="token", choices=("token", "step", "sequence", "sum"), help="how tokens are averaged")
    add("--num-iterations", type=positive, default=1, help="updates on every batch of rollouts")
    add("--route", default="linear", choices=("linear", "logits", "auto"), help="whether the logits are ever stored")
    add("--chunk-bytes", type=positive, help="linear route: budget of the logits buffer (default: sspo_ext's)")
    add("--backend", default="auto", choices=("auto", "cpu", "triton", "cuda", "reference"), help="see sspo-ext info")

    add = parser.add_argument_group("optimisation").add_argument
    add("--lr", type=float, default=1e-6, help="peak learning rate")
    add("--lr-scheduler", default="constant_with_warmup", help="transformers' name of the schedule")
    add("--warmup-steps", type=int, default=0, help="updates of linear warm-up")
    add("--optim", default="adamw_torch_fused", help="transformers' name of the optimiser")
    add("--epochs", type=float, default=1.0, help="passes over the prompts")
    add("--max-steps", type=int, default=-1, help="updates; overrides --epochs")
    add("--batch-size", type=positive, default=8, help="completions in a micro-batch, on each device")
    add("--gradient-accumulation", type=positive, default=1, help="micro-batches in an update")
    add("--eval-batch-size", type=positive, default=32, help="rows completed at once in evaluation, on each device")
    add("--lora-r", type=int, default=0, help="rank of a LoRA adapter; 0 trains all weights")
    add("--lora-alpha", type=int, help="(default: twice the rank)")
    add("--gradient-checkpointing", action="store_true", help="less memory, more time")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16", "auto"), help="of the weights")
    add("--bf16", action="store_true", help="autocast to bfloat16")
    add("--seed", type=int, default=0, help="of rollouts, the order of prompts, dropout and adapter")

    add = parser.add_argument_group("running").add_argument
    add("--logging-steps", type=positive, default=1, help="updates between log lines")
    add("--save-steps", type=positive, default=200, help="updates between checkpoints")
    add("--eval-steps", type=positive, help="updates between evaluations (default: before and after training alone)")
    add("--report-to", default="none", help="transformers' name of a logging integration")
    add("--attn-implementation", help="eager, sdpa, flash_attention_2, ... (default: the model's)")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")


def run(options: argparse.Namespace, checkpoint: str | None, lora) -> None:
    """Trains, evaluates before and after, saves the model and progress.png."""
    # What can be wrong is looked at in the order of what it costs: rows, grader, arguments, then the model.
    by_text = options.grader.partition(":")[0] in ("exact", "math-verify")
    probed = options.combine != "outcome" and dict(options.probe_option).get("mode", "likelihood") == "likelihood"
    rows = load_prompt_rows(options.data, by_text or probed)
    held_out = load_prompt_rows(options.eval_data, by_text) if options.eval_data else None

    import torch
    from transformers import set_seed

    from ..data.graders import load_grader
    from ..train.models import load_model
    from ..train.progress import curves, draw_progress
    from ..train.sspo_config import SSPOConfig
    from ..train.sspo_trainer import SSPOTrainer

    grader = load_grader(options.grader)
    same = (
        "num_generations max_completion_length temperature top_p top_k rollout_engine rollout_batch_size split_by "
        "probe probe_turn gamma lam baseline combine step_scale scale_advantages loss_type epsilon epsilon_high beta "
        "kl_estimator entropy_coef aggregation num_iterations route chunk_bytes backend warmup_steps optim max_steps "
        "bf16 seed logging_steps save_steps eval_steps report_to"
    ).split()
    rollout_options = {"model": options.model} if options.rollout_engine == "vllm" else {}
    rollout_options.update(options.rollout_option)
    args = SSPOConfig(
        output_dir=options.output_dir,
        loss_options=dict(options.loss_option) or None,
        rollout_options=rollout_options or None,
        chat_template_kwargs=dict(options.chat_template_option) or None,
        probe_end=options.probe_end or "",
        probe_options=dict(options.probe_option) or None,
        learning_rate=options.lr,
        lr_scheduler_type=options.lr_scheduler,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        per_device_eval_batch_size=options.eval_batch_size,
        eval_strategy="steps" if options.eval_steps and held_out else "no",
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.accelerator.is_available(),  # else several processes on CPUs would be a job each
        **({"gradient_checkpointing": True} if options.gradient_checkpointing else {}),
        **{name: getattr(options, name) for name in same},
    )
    model, tokenizer = load_model(
        options.model,
        dtype=options.dtype,
        attn_implementation=options.attn_implementation,
        trust_remote_code=options.trust_remote_code,
    )
    set_seed(options.seed)
    trainer = SSPOTrainer(model, args, grader, rows, held_out, processing_class=tokenizer, peft_config=lora)
    before = trainer.evaluate() if held_out else None
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    after = trainer.evaluate() if held_out else None
    if not trainer.is_world_process_zero():
        return
    if held_out:
        print("\n" + _table(before, after))
    try:
        draw_progress({"training": curves(trainer.state.log_history)}, Path(options.output_dir) / "progress.png")
    except ImportError as error:
        print(f"\nno progress.png: {error}; install it with: pip install matplotlib")
    print(f"\nsaved to {options.output_dir}")


def _table(before: dict, after: dict) -> str:
    names = ("accuracy", "reward", "completions/mean_length", "completions/clipped_ratio", "steps/mean")
    lines = ["| held-out, greedy | before | after |", "| --- | --- | --- |"]
    return "\n".join(
        lines + [f"| {name} | {before[f'eval_{name}']:.4f} | {after[f'eval_{name}']:.4f} |" for name in names]
    )
