# SPDX-License-Identifier: Apache-2.0
"""SSPO with its trainer: values that the policy gives to its own steps, beside the outcome alone.

Shows: accuracy and length of sampled completions in the first and the last of a few updates. SSPO shortens them, and
    its reward sees no length. `sspo-ext demo` is the longer run, with a picture.

System: SSPO
Paper: arXiv 2508.12604
Changes: verbal value probing gives each step a value, and GAE over steps its advantage
Ours: all that the paper's public part leaves open: the probe, the likelihood as value, gamma, lambda, the combination
"""

import tempfile

from transformers import PrinterCallback

from sspo_ext.demo.play import Task, load_start, sized, table
from sspo_ext.train import SSPOConfig, SSPOTrainer

task = Task("sums")
PROMPTS, SAMPLES, UPDATES = sized(24, 4), 8, sized(12, 2)
rows = [{"prompt": p.prompt, "answer": p.answer} for p in task.problems(PROMPTS * UPDATES, seed=1, held_out=False)]
found = []
for name, options in (("outcome only", {"combine": "outcome"}), ("SSPO", {"gamma": 0.9, "lam": 0.0})):
    model, tokenizer = load_start()
    args = SSPOConfig(
        tempfile.mkdtemp(), max_steps=UPDATES, per_device_train_batch_size=PROMPTS * SAMPLES, num_generations=SAMPLES,
        max_completion_length=110, learning_rate=5e-4, lr_scheduler_type="constant", adam_beta2=0.95,
        probe=task.probe, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        use_cpu=True, **options,
    )  # fmt: skip
    trainer = SSPOTrainer(model, args, task.reward, rows, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "accuracy" in entry]
    for entry in (log[0], log[-1]):
        found.append({"arm": name, "update": entry["step"], "accuracy": entry["accuracy"],
                      "tokens": entry["completions/mean_length"], "steps": entry["steps/mean"]})  # fmt: skip
print(table(found))
