# SPDX-License-Identifier: Apache-2.0
"""What both trainers change in `transformers.Trainer`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer

from ..layout.bundle import TensorBundle
from ..objective.sums import StepLogps
from .model_call import batch_logps
from .models import check_trainable


class StepTrainer(Trainer):
    """A Trainer whose batches have a layout, and whose loss is divided by the items of the whole update."""

    # compute_loss divides by the count of all accumulated micro-batches; Trainer must not divide again.
    loss_is_scaled_for_ga = True

    columns: tuple[
        str, ...
    ]  # of the dataset that are read; Trainer's default, the model's arguments, would keep none of them
    args: Any
    model: Any  # Trainer allows None, and an adapter or a wrapper has methods that a model has not
    processing_class: PreTrainedTokenizerBase
    train_dataset: Any
    eval_dataset: Any
    route: str

    def train(self, *args, **kwargs):
        """Trainer's, of a model that has something to train."""
        check_trainable(self.model)
        return super().train(*args, **kwargs)

    def step_logps(self, model: nn.Module, batch: dict) -> StepLogps:
        """Runs the model on a batch and returns its log-probs, as the loss sees them.

        Args:
            model: The model, perhaps wrapped (DDP).
            batch: The model's inputs and "layout", on the model's device.

        Returns:
            The log-probs of the layout's tokens and steps.
        """
        args = self.args
        return batch_logps(
            model, batch, self.route, chunk_bytes=args.chunk_bytes, temperature=args.temperature, backend=args.backend
        )

    def logps_without_grad(self, model: nn.Module, batch: dict) -> StepLogps:
        """`step_logps` of a batch that is not yet on the device, without a gradient."""
        with torch.no_grad(), self.accelerator.autocast():
            return self.step_logps(model, self._prepare_inputs(batch))

    def _prepare_input(self, data):
        return data.to(self.args.device) if isinstance(data, TensorBundle) else super()._prepare_input(data)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = list(self.columns)
