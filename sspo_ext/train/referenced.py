# SPDX-License-Identifier: Apache-2.0
"""A trainer whose rows have the log-probs of a reference: the model as given, before it is trained."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from .base import StepTrainer
from .limits import check_features
from .reference_cache import ReferenceCache, add_reference, reference_key


class ReferencedTrainer(StepTrainer):
    """A StepTrainer that adds reference log-probs to its datasets, once, from a cache on disk."""

    _takes_reference: bool
    _new_adapter: bool  # it is what is trained, and the reference is the model without it
    _limits: Any
    _checked: dict[str, Any]  # the dataset of each name
    _reference_key: str | None = None
    _untrained = True

    def _datasets(self) -> Iterator[tuple[Any, str]]:
        """The trainer's datasets, and what errors call them."""
        for name in ("train_dataset", "eval_dataset"):
            dataset = getattr(self, name)
            if name == "eval_dataset" and isinstance(dataset, dict):
                yield from ((value, f"{name}[{key!r}]") for key, value in dataset.items())
            else:
                yield dataset, name

    def _check_rows(self, dataset: Any, name: str) -> None:
        """Checks the rows of a dataset, unless that is done."""
        if dataset is not None and not any(dataset is known for known in self._checked.values()):
            check_features(name, dataset, self._limits)
            self._checked[name] = dataset

    def _add_references(self) -> None:
        """Adds the reference's log-probs to the trainer's datasets that lack them."""
        for name in ("train_dataset", "eval_dataset"):
            dataset = getattr(self, name)
            if isinstance(dataset, dict):
                added = {key: self._with_reference(value, f"{name}[{key!r}]") for key, value in dataset.items()}
            else:
                added = self._with_reference(dataset, name)
            setattr(self, name, added)

    def _with_reference(self, dataset: Any, name: str) -> Any:
        """The dataset with the reference's log-probs of its rows, if the loss takes them."""
        self._check_rows(dataset, name)
        if not self._takes_reference or _has_reference(dataset):
            return dataset
        assert self.args.output_dir is not None
        cache = ReferenceCache(
            folder=self.args.reference_cache or os.path.join(self.args.output_dir, "reference_cache"),
            batch_size=self.args.per_device_eval_batch_size,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            barrier=self.accelerator.wait_for_everyone,
            progress=self.is_world_process_zero() and not self.args.disable_tqdm,
            most=self.most,
        )
        known = self._untrained and not self._is_prepared
        if self._reference_key is None and known:
            self._reference_key = self._key_of_reference()
        if self._reference_key is None:
            raise self._unknown_reference(name)

        def step_sums(batch: dict) -> Tensor:
            nonlocal known
            # rows that are in the cache need no model, whatever training has done to it
            known = known or not self._is_prepared and self._key_of_reference() == self._reference_key
            if not known:
                raise self._unknown_reference(name)
            return self.logps_without_grad(model, batch).sums

        with self._reference_model() as model:
            added = add_reference(dataset, self._reference_key, cache, self.data_collator, step_sums, name)
        self._checked[name] = added
        return added

    @property
    def _is_prepared(self) -> bool:
        """Whether weights are sharded, and may have been trained."""
        return (self.is_fsdp_enabled or self.is_deepspeed_enabled) and bool(self.accelerator._models)

    def _key_of_reference(self) -> str:
        settings = {"temperature": self.args.temperature, "mixed_precision": str(self.accelerator.mixed_precision)}
        return reference_key(self.model, settings, adapters=not self._new_adapter)

    def _unknown_reference(self, name: str) -> ValueError:
        return ValueError(
            f"{name}: expected rows with ref_chosen and ref_rejected, or rows that the trainer was given before "
            "training; the reference is the model before training, which is no longer there"
        )

    @contextlib.contextmanager
    def _reference_model(self):
        """The model as given: without a new adapter and without dropout.

        A model that Trainer will move or shard later is on the device of the batches meanwhile.
        """
        model, training = self.model, self.model.training
        home = None
        if not self._is_sharded and not self.place_model_on_device and getattr(model, "hf_device_map", None) is None:
            home = next(model.parameters()).device
            model.to(self.args.device)
        model.eval()
        try:
            with model.disable_adapter() if self._new_adapter else contextlib.nullcontext():
                yield model
        finally:
            model.train(training)
            if home is not None:
                model.to(home)


def _has_reference(dataset) -> bool:
    """Whether the rows of a dataset, judged by the first one, have the reference's log-probs; so has no dataset."""
    if dataset is None:
        return True
    if hasattr(dataset, "__len__"):
        first = dataset[0] if len(dataset) else {}
    else:
        first = next(iter(dataset), {})
    return {"ref_chosen", "ref_rejected"} <= set(first)
