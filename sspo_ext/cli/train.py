"""`sspo-ext train`: preference training from a file of pairs."""

from __future__ import annotations

import argparse

from .arguments import checkpoint_of, lora_of, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, help="hub name, folder, folder with one .gguf file, or .gguf file")
    add(
        "--data",
        required=True,
        nargs="+",
        metavar="JSONL",
        help="rows: prompt, chosen, rejected; see sspo_ext.data.rows",
    )
    add("--eval-data", nargs="+", metavar="JSONL", help="held-out rows, evaluated before and after")
    add("--output-dir", required=True, help="checkpoints, reference cache and the trained model")
    add("--resume", action="store_true", help="go on from the last checkpoint in --output-dir")

    add = parser.add_argument_group("steps and pairs").add_argument
    add("--split-by", default="newline", help="newline, blank_line, numbered, or a regular expression")
    add("--pairing", default="index", choices=("index", "branch", "sequence"), help="which steps are compared")
    add("--token-weights", default="uniform", choices=("uniform", "divergence"), help="first differing token?")
    add("--max-length", type=positive, default=1024, help="tokens of prompt and response")
    add("--overflow", default="drop", choices=("drop", "cut", "error"), help="what happens to longer rows")

    add = parser.add_argument_group("loss").add_argument
    add("--loss-type", nargs="+", default=["sigmoid"], metavar="NAME", help="of docs/losses.md; several are added up")
    add("--loss-weights", nargs="+", type=float, metavar="WEIGHT", help="one for each loss type (default: 1 each)")
    add("--beta", type=float, help="reward scale (default: each loss type's)")
    add("--label-smoothing", type=float, default=0.0, help="probability that a pair's order is wrong")
    add("--loss-option", type=_assignment, action="append", default=[], metavar="NAME=VALUE", help="as simpo_gamma=0.5")
    add("--reference-free", action="store_true", help="no reference model")
    add("--reference-cache", help="folder of cached reference log-probs (default: OUTPUT_DIR/reference_cache)")
    route_help = (
        "linear: never stores the logits; logits: the model's own; auto: linear where the model's head allows it"
    )
    add("--route", default="linear", choices=("linear", "logits", "auto"), help=route_help)
    add("--chunk-bytes", type=positive, help="linear route: budget of the logits buffer (default: sspo_ext's)")
    add("--backend", default="auto", choices=("auto", "cpu", "triton", "cuda", "reference"), help="see sspo-ext info")

    add = parser.add_argument_group("optimisation").add_argument
    add("--lr", type=float, default=5e-6, help="peak learning rate")
    add("--lr-scheduler", default="linear", help="transformers' name of the schedule")
    add("--warmup-steps", type=int, default=0, help="updates of linear warm-up")
    add("--optim", default="adamw_torch_fused", help="transformers' name of the optimiser")
    add("--epochs", type=float, default=1.0, help="passes over the data")
    add("--max-steps", type=int, default=-1, help="updates; overrides --epochs")
    add("--batch-size", type=positive, default=2, help="rows in a micro-batch, on each device")
    add("--gradient-accumulation", type=positive, default=1, help="micro-batches in an update")
    add("--eval-batch-size", type=positive, default=8, help="rows, for evaluation and the reference pass")
    add("--lora-r", type=int, default=0, help="rank of a LoRA adapter; 0 trains all weights")
    add("--lora-alpha", type=int, help="(default: twice the rank)")
    add("--packing", action="store_true", help="padding-free batches")
    add("--gradient-checkpointing", action="store_true", help="less memory, more time")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16", "auto"), help="of the weights")
    add("--bf16", action="store_true", help="autocast to bfloat16")
    add("--seed", type=int, default=0, help="of the order of rows, dropout and adapter")

    add = parser.add_argument_group("running").add_argument
    add("--logging-steps", type=positive, default=10, help="updates between log lines")
    add("--save-steps", type=positive, default=200, help="updates between checkpoints")
    add("--eval-steps", type=positive, help="updates between evaluations (default: before and after training alone)")
    add("--report-to", default="none", help="transformers' name of a logging integration")
    add("--attn-implementation", help="eager, sdpa, flash_attention_2, ... (default: the model's)")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")


def run(options: argparse.Namespace) -> None:
    from ..data.rows import load_preference_rows
    from ..objective.pair_arguments import checked_label, checked_options, chosen_formulas
    from ..signals.split import split_text

    # What can be wrong is looked at in the order of what it costs: arguments, rows, then the model.
    loss_options = dict(options.loss_option)
    heads = chosen_formulas(options.loss_type, options.loss_weights)
    checked_options(heads, options.beta, loss_options)
    checked_label(heads, options.loss_type, options.label_smoothing, soft_labels=False)
    split_text("", options.split_by)
    checkpoint = checkpoint_of(options)
    rows = load_preference_rows(options.data)
    held_out = load_preference_rows(options.eval_data) if options.eval_data else None

    import torch
    from transformers import set_seed

    from ..data.tokenize import tokenize_rows
    from ..train.models import load_model, load_tokenizer
    from ..train.preference_config import StepPreferenceConfig
    from ..train.preference_trainer import StepPreferenceTrainer

    lora = lora_of(options)
    args = StepPreferenceConfig(
        output_dir=options.output_dir,
        loss_type=options.loss_type,
        loss_weights=options.loss_weights,
        beta=options.beta,
        label_smoothing=options.label_smoothing,
        loss_options=loss_options or None,
        reference_free=options.reference_free,
        reference_cache=options.reference_cache,
        packing=options.packing,
        backend=options.backend,
        route=options.route,
        chunk_bytes=options.chunk_bytes,
        learning_rate=options.lr,
        lr_scheduler_type=options.lr_scheduler,
        warmup_steps=options.warmup_steps,
        optim=options.optim,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.eval_batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        bf16=options.bf16,
        seed=options.seed,
        logging_steps=options.logging_steps,
        save_steps=options.save_steps,
        eval_strategy="steps" if options.eval_steps and held_out else "no",
        eval_steps=options.eval_steps,
        report_to=options.report_to,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.accelerator.is_available(),  # else several processes on CPUs would be a job each
        # only where it is asked for: transformers has begun to call it activation_checkpointing
        **({"gradient_checkpointing": True} if options.gradient_checkpointing else {}),
    )
    tokenizer = load_tokenizer(options.model, trust_remote_code=options.trust_remote_code)
    split = {"split_by": options.split_by, "pair_by": options.pairing, "max_length": options.max_length}
    split |= {"overflow": options.overflow, "token_weights": options.token_weights}
    train_set, eval_set = (part and tokenize_rows(part, tokenizer, **split) for part in (rows, held_out))
    model, _ = load_model(
        options.model,
        dtype=options.dtype,
        attn_implementation=options.attn_implementation,
        trust_remote_code=options.trust_remote_code,
        tokenizer=tokenizer,
    )
    set_seed(options.seed)
    trainer = StepPreferenceTrainer(model, args, train_set, eval_set, processing_class=tokenizer, peft_config=lora)
    main_process = trainer.is_world_process_zero()
    if main_process:
        print(f"{len(train_set)} rows, {sum(len(f['pairs']) for f in train_set)} pairs of steps")
    before = trainer.evaluate() if eval_set else None
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    after = trainer.evaluate() if eval_set else None
    if not main_process:
        return
    if eval_set:
        print("\n" + _table(before, after))
    print(f"\nsaved to {options.output_dir}")


def _table(before: dict, after: dict) -> str:
    names = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
    lines = ["| held-out | before | after |", "| --- | --- | --- |"]
    return "\n".join(
        lines + [f"| {name} | {before[f'eval_{name}']:.4f} | {after[f'eval_{name}']:.4f} |" for name in names]
    )


def _assignment(text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    try:
        return name.strip(), float(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected NAME=NUMBER, got {text!r}") from error
