# SPDX-License-Identifier: Apache-2.0
"""SSPOTrainer's updates, on one process and, under torchrun, on two.

The update's completions, and their order, are the same however many processes share them.
"""

import os
import sys
import warnings
from pathlib import Path

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
warnings.filterwarnings("ignore")

import torch  # noqa: E402

from helpers.ranks import leave  # noqa: E402
from helpers.rl import make_trainer, parameters  # noqa: E402

# times, and what padding costs, depend on how the rows are shared out
MEASURED = ("time/", "train_", "total_flos")


def main(folder: Path) -> dict:
    world = int(os.environ.get("WORLD_SIZE", 1))
    # 16 completions an update: groups of 4 in micro-batches of 2, so that on two processes every group is split
    trainer = make_trainer(
        folder, per_device_train_batch_size=2, gradient_accumulation_steps=8 // world, max_steps=3, beta=0.1,
        eval_dataset=[{"prompt": "1+2=\n", "answer": "3"}] * 3,
    )  # fmt: skip
    trainer.train()
    metrics = trainer.evaluate()
    logs = [{k: v for k, v in e.items() if not k.startswith(MEASURED)} for e in trainer.state.log_history]
    return {"parameters": parameters(trainer.model), "logs": logs, "eval": metrics}


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    found = main(out)
    if torch.distributed.get_rank() == 0:
        torch.save(found, out / "found.pt")
    leave()
