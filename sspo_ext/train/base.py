# SPDX-License-Identifier: Apache-2.0
"""What both trainers change in `transformers.Trainer`."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer

from ..data.sharing import PrefixSharing
from ..layout.bundle import TensorBundle
from ..objective.sums import StepLogps
from ..tree.inputs import using_attention
from .checkpoints import (
    STATE,
    UNFINISHED,
    check_checkpoint,
    naming_the_file,
    newest_checkpoint,
    put_in_place,
    rotate,
    updates_done,
    written,
)
from .loaded_weights import check_adapter, check_finite, check_loaded, naming_the_adapter
from .model_call import batch_logps
from .model_card import write_model_card
from .models import check_trainable
from .sharded import in_step, most, partition, reshard, shard


class StepTrainer(Trainer):
    """A Trainer whose batches have a layout, and whose loss is divided by the items of the whole update.

    A checkpoint is there whole or not at all. A run goes on from it exactly, or not at all.
    """

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
    sharing: PrefixSharing | None = None  # how the sequences of a batch share their prefixes

    _is_sharded = False  # by FSDP2 or ZeRO-3, before training
    _engine: Any = None  # DeepSpeed's, of ZeRO-3, until training begins
    _resumed_at: int | None = None  # updates of the checkpoint that training began with
    _checkpoint: str | None = None  # the same, or the best one: what is loaded
    _work: Path | None = None  # where a checkpoint is written until it is whole

    def train(self, resume_from_checkpoint: str | os.PathLike | bool | None = None, *args, **kwargs):
        """Trainer's, of a model that has something to train, and from a checkpoint that has all that this needs.

        Args:
            resume_from_checkpoint: A checkpoint, or True for the newest whole one in `args.output_dir`. One that has
                all updates already is loaded, and nothing more happens.
            *args: Trainer's.
            **kwargs: Trainer's.

        Returns:
            Trainer's.

        Raises:
            ValueError: For a model without trainable parameters, a checkpoint that lacks something, and a loss that is
                not finite.
        """
        check_trainable(self.model)
        checkpoint = resume_from_checkpoint or None
        if checkpoint is True:
            checkpoint = newest_checkpoint(self.args.output_dir)
            if checkpoint is None:
                raise ValueError(f"resume_from_checkpoint: no whole checkpoint in {self.args.output_dir!r}")
        self._resumed_at = self._checkpoint = None
        if checkpoint is not None:
            checkpoint = self._checkpoint = os.fspath(checkpoint)
            scaler = getattr(self.accelerator, "scaler", None) is not None
            sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
            rank = self.args.process_index if self.args.world_size > 1 else None
            check_checkpoint(checkpoint, rank=rank, scaler=scaler, sharded=sharded)
            self._resumed_at = updates_done(checkpoint)
        if self._engine is not None:
            self._engine.destroy()
            self._engine = None
        return super().train(checkpoint, *args, **kwargs)

    @property
    def _fsdp(self) -> Any:
        return getattr(self.accelerator.state, "fsdp_plugin", None)

    @property
    def zero_stage(self) -> int:
        """The stage of DeepSpeed's ZeRO; 0 without DeepSpeed."""
        plugin = self.accelerator.state.deepspeed_plugin
        return 0 if plugin is None else plugin.zero_stage

    @property
    def _in_step(self) -> bool:
        """Whether all processes have to run the model equally often."""
        return self.accelerator.num_processes > 1 and (self.is_fsdp_enabled or self.zero_stage == 3)

    def most(self, number: int) -> int:
        """The largest of all processes' numbers, if all of them have to run the model equally often; else this one."""
        return most(number, self.args.device) if self._in_step else number

    def in_step(self) -> contextlib.AbstractContextManager:
        """A block within which processes may call the model a different number of times, even if it is sharded."""
        return in_step(self.model, self.args.device) if self._in_step else contextlib.nullcontext()

    def _check_parallelism(self) -> None:
        """ValueError for ways to share the work that would give wrong numbers: each process has rows of its own."""
        # older versions of Trainer have not all of them
        cp, sp, tp = (getattr(self, f"get_{kind}_size", lambda: 1)() for kind in ("cp", "sp", "tp"))
        if max(cp, sp) > 1:
            raise ValueError(
                "parallelism_config: expected cp_size=1 and sp_size=1, since a row that is cut between two processes "
                f"loses the label at the cut, got {cp} and {sp}; use FSDP2, chunk_bytes and gradient "
                "checkpointing for long rows"
            )
        if tp > 1:
            raise ValueError(
                "parallelism_config: expected tp_size=1 and a model without tp_plan, since the processes that share a "
                f"weight would have to read the same rows, got {tp}; use FSDP2, or the losses with "
                "tp_group in a loop of your own"
            )

        if self.zero_stage == 3 and getattr(self.args, "rollout_engine", "").startswith("vllm"):
            raise ValueError(
                "rollout_engine: expected 'auto', 'compact' or 'generate' with ZeRO-3, got "
                f"{self.args.rollout_engine!r}; or use FSDP2"
            )

    def _partition(self) -> None:
        """Shares the model out now, where ZeRO-3 would do so when training begins."""
        self._is_sharded = self.zero_stage == 3
        if self._is_sharded:
            self._engine = partition(self.model, self.accelerator, self.args)

    def _shard(self) -> None:
        """Shards the model now, where FSDP2 would do so when training begins."""
        fsdp = self._fsdp
        if fsdp is None:
            return
        # an optimizer that is given has the parameters of the whole model
        self._is_sharded = fsdp.fsdp_version == 2 and self.optimizer is None and not self.args.torch_compile
        if self._is_sharded:
            shard(self.model, self.accelerator)
        elif fsdp.cpu_ram_efficient_loading:
            raise ValueError(
                "fsdp_cpu_ram_efficient_loading: expected False, since the model runs before Trainer gives the other "
                "processes the first one's weights; it may be True with FSDP2, without torch_compile and without an "
                "optimizer of your own"
            )

    def planned_updates(self) -> int:
        """The updates of the whole training, as Trainer counts them."""
        args = self.args
        if args.max_steps > 0:
            return args.max_steps
        per_epoch = max(math.ceil(len(self.get_train_dataloader()) / args.gradient_accumulation_steps), 1)
        return math.ceil(args.num_train_epochs * per_epoch)

    def save_result(self) -> None:
        """Saves the model in `args.output_dir`, and then trainer_state.json, which says that it is the result."""
        mark = Path(self.args.output_dir) / STATE
        if self.args.should_save:
            mark.unlink(missing_ok=True)
        self.save_model()
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            with written(mark) as temporary:
                self.state.save_to_json(str(temporary))
            shutil.rmtree(mark.with_name(UNFINISHED), ignore_errors=True)  # of a run that was killed

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's, of a model whose weights are finite, and whole whatever FSDP writes into checkpoints."""
        if self.is_fsdp_enabled:
            reshard(self.model)
        check_finite(self.model, f"after {self.state.global_step} updates")
        folder = Path(output_dir or self.args.output_dir)
        with naming_the_file(folder) if self._work is None else contextlib.nullcontext():
            # Trainer writes no weights then, and would upload none
            late = self.is_fsdp_enabled and not _internal_call and "FULL" not in str(self._fsdp.state_dict_type)
            super().save_model(output_dir, _internal_call or late)
            if late:
                self._save(str(folder), state_dict=self.accelerator.get_state_dict(self.model))
            if self.args.should_save and folder.is_dir():
                write_model_card(self, folder, self.hub_name)
            if late and self.args.push_to_hub:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    @property
    def hub_name(self) -> str:
        """The name of the trained model: on the hub, or that of its folder."""
        return self.args.hub_model_id or Path(self.args.output_dir).resolve().name

    def create_model_card(self, *args: Any, model_name: str | None = None, tags: Any = None, **kwargs: Any) -> None:
        """Writes the model card into `args.output_dir`, as every save does, before the model is uploaded.

        Args:
            *args: Have no effect; Trainer's.
            model_name: The title; None means the model's name on the hub, or that of the folder.
            tags: A tag, or several, beside "sspo_ext".
            **kwargs: Have no effect; Trainer's.
        """
        if self.is_world_process_zero():
            more = [tags] if isinstance(tags, str) else tags
            # Trainer's push_to_hub gives the last part of the name on the hub
            name = self.hub_name if model_name in (None, self.hub_name.rpartition("/")[2]) else model_name
            write_model_card(self, Path(self.args.output_dir), str(name), more)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Trainer's. A loss that is not finite ends the training, so that its model is not saved as the result."""
        super().log(logs, *args, **kwargs)
        for name, value in logs.items():
            if (name == "loss" or name.endswith("_loss")) and not math.isfinite(value):
                raise ValueError(
                    f"{name}: expected a finite number, got {value} after {self.state.global_step} updates; the model "
                    "is not saved; try a lower learning rate"
                )

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
        with torch.no_grad(), self.accelerator.autocast(), self.attention_for(batch):
            return self.step_logps(model, self._prepare_inputs(batch))

    def _prepare_inputs(self, inputs):
        prepared = super()._prepare_inputs(inputs)
        if "advantages" in inputs:  # on the host they tell the loss which rows need no gradient
            prepared["advantages"] = inputs["advantages"]
        return prepared

    def attention_for(self, batch: dict) -> contextlib.AbstractContextManager:
        """An attention that takes the batch, in forward and backward: another than the model's own for trees."""
        if "tree" not in batch or self.sharing is None:
            return contextlib.nullcontext()
        return using_attention(self.model, self.sharing.attention)

    def training_step(self, model: nn.Module, inputs: dict, *args, **kwargs) -> Tensor:
        """Trainer's, with an attention that takes the batch."""
        with self.attention_for(inputs):
            return super().training_step(model, inputs, *args, **kwargs)

    def _prepare_input(self, data):
        return data.to(self.args.device) if isinstance(data, TensorBundle) else super()._prepare_input(data)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = list(self.columns)

    # ---- checkpoints

    def _is_finished(self) -> bool:
        """Whether no update is left, as after a resume; then ends the training. Trainer would make one more."""
        done = self.state.global_step >= self.state.max_steps
        if done:
            self.control.should_training_stop = True
        return done

    def _get_output_dir(self, *args, **kwargs) -> str:
        return str(self._work or super()._get_output_dir(*args, **kwargs))

    def _save_checkpoint(self, model, trial) -> None:
        """Trainer's, in a folder that gets its name when all processes have written to it."""
        if self.state.global_step == self._resumed_at:
            return  # it is there, and nothing has changed
        run = Path(self._get_output_dir(trial=trial))
        work, place = run / UNFINISHED, run / f"checkpoint-{self.state.global_step}"
        new = work / place.name
        if self.args.should_save:
            shutil.rmtree(work, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._work = work
        try:
            with naming_the_file(new):
                super()._save_checkpoint(model, trial)
                self._name_the_best(new, place)
        except OSError:
            shutil.rmtree(work, ignore_errors=True)  # a full disk is not filled with half a checkpoint
            raise
        finally:
            self._work = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            put_in_place(new, place)
            rotate(run, self.args.save_total_limit, self.state.best_model_checkpoint)
            shutil.rmtree(work, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self.create_model_card()
            super()._push_from_checkpoint(str(place))

    def _name_the_best(self, new: Path, place: Path) -> None:
        """Names the best checkpoint, if it is the new one, by the name that it will have."""
        if self.state.best_model_checkpoint == str(new):
            self.state.best_model_checkpoint = str(place)
            if self.args.should_save:
                self.state.save_to_json(str(new / STATE))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._work is None:  # else its files are about to be moved
            super()._push_from_checkpoint(checkpoint_folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        with naming_the_adapter(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if getattr(self.model, "peft_config", None) and any(Path(resume_from_checkpoint).glob("adapter_model.*")):
            check_adapter(self.model, resume_from_checkpoint, self.model.active_adapters[0])

    def _load_best_model(self) -> None:
        self._checkpoint = self.state.best_model_checkpoint
        super()._load_best_model()

    def _issue_warnings_after_load(self, load_result) -> None:
        check_loaded(self.model, str(self._checkpoint), load_result.missing_keys, load_result.unexpected_keys)
        super()._issue_warnings_after_load(load_result)
