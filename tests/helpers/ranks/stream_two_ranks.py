# SPDX-License-Identifier: Apache-2.0
"""Training on a stream of rows, on one process and, under torchrun, on two, with no setting for it."""

import os
import sys
import warnings
from pathlib import Path

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
warnings.filterwarnings("ignore")

import torch  # noqa: E402

from helpers.preference import config, make_features, make_model, parameters  # noqa: E402
from helpers.ranks import leave  # noqa: E402
from sspo_ext.train.preference_trainer import StepPreferenceTrainer  # noqa: E402


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from make_features(16)


def main(folder: Path, batch_size: int) -> torch.Tensor:
    args = config(folder, per_device_train_batch_size=batch_size, reference_free=True, max_steps=2)
    trainer = StepPreferenceTrainer(make_model(), args, Stream())
    trainer.train()
    return parameters(trainer.accelerator.unwrap_model(trainer.model))


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    found = main(out, batch_size=2)
    if torch.distributed.get_rank() == 0:
        torch.save(found, out / "found.pt")
    leave()
