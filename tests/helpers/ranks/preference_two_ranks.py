# SPDX-License-Identifier: Apache-2.0
"""The preference trainer's evaluation, on one process and, under torchrun, on two."""

import os
import sys
import warnings
from pathlib import Path

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
warnings.filterwarnings("ignore")

import torch  # noqa: E402

from helpers.preference import config, make_features, make_model  # noqa: E402
from helpers.ranks import leave  # noqa: E402
from sspo_ext.train.preference_trainer import StepPreferenceTrainer  # noqa: E402


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from make_features(5)


def main(folder: Path) -> dict:
    found = {}
    for size in (1, 4):
        args = config(folder, per_device_eval_batch_size=size, reference_free=True)
        trainer = StepPreferenceTrainer(make_model(), args, None, {"rows": make_features(5), "stream": Stream()})
        metrics = trainer.evaluate()
        kept = ("loss", "rewards/accuracies", "rewards/margins", "logps/rejected", "steps/tokens", "pairs/count")
        found |= {f"{size} {s} {name}": metrics[f"eval_{s}_{name}"] for s in ("rows", "stream") for name in kept}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    found = main(out)
    if torch.distributed.get_rank() == 0:
        torch.save(found, out / "found.pt")
    leave()
