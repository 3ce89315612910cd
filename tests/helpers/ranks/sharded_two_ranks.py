# SPDX-License-Identifier: Apache-2.0
"""Both trainers' updates on one process and, under torchrun, on two, with the model whole or sharded.

Usage: python -m helpers.ranks.sharded_two_ranks FOLDER CASES, a JSON object of names and the arguments of `trained`.
"""

import json
import os
import sys
import warnings
from pathlib import Path

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
warnings.filterwarnings("ignore")

import torch  # noqa: E402

from helpers import preference, rl  # noqa: E402
from helpers.ranks import leave  # noqa: E402
from sspo_ext.train.preference_trainer import StepPreferenceTrainer  # noqa: E402

LAUNCHED_AS = {
    "fsdp2": {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT", "FSDP_RESHARD_AFTER_FORWARD": "true",
    },
}  # fmt: skip
LAUNCHED_AS["fsdp2-ram"] = LAUNCHED_AS["fsdp2"] | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
"""What `accelerate launch` puts into the environment, with its defaults."""


def shard_on_cpus() -> None:
    """Makes accelerate shard on CPUs, which it does on accelerators alone."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    plain = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init
    # for DeepSpeed, which accelerate does not take together with use_cpu
    PartialState._prepare_backend = lambda *args: ("gloo", DistributedType.MULTI_CPU)


def zero(stage: int) -> dict:
    """DeepSpeed's config, with all that Trainer fills in."""
    return {
        "zero_optimization": {
            "stage": stage, "stage3_gather_16bit_weights_on_model_save": True,
            "stage3_param_persistence_threshold": 0,  # of weights that are never shared out
        },
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto", "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip


class Stream(torch.utils.data.IterableDataset):
    """Rows without a length."""

    def __init__(self, rows: list[dict]):
        self.rows = rows

    def __iter__(self):
        yield from self.rows


def model_of(trainer: str, tied: bool, lora: bool):
    model = (rl if trainer == "sspo" else preference).make_model()
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    if not lora:
        return model, None
    from peft import LoraConfig

    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return model, config


def loaded_in_parts(folder: Path, model, options: dict):
    """The model as `from_pretrained` loads it while there are arguments with ZeRO-3, and these arguments."""
    from transformers import AutoModelForCausalLM

    args = preference.config(folder, **options)
    if args.process_index == 0:
        model.save_pretrained(folder / "start")
    torch.distributed.barrier()
    loaded = AutoModelForCausalLM.from_pretrained(folder / "start", dtype=torch.float32)
    assert all(p.numel() == 0 for p in loaded.parameters())
    return loaded, args


def trained(
    folder: Path, *, trainer: str, layout: str = "ddp", route: str = "linear", tied: bool = False, lora: bool = False,
    evaluate: str = "", save: bool = False, rows: int = 16, stream: bool = False, given_adapter: bool = False,
    **options,
) -> dict:  # fmt: skip
    """Three updates: the trained weights, the log, evaluations, and the weights that were saved."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and layout.startswith("zero"):
        options |= {"deepspeed": zero(int(layout[4])), "use_cpu": False}
    more = {"route": route, "max_steps": 3, **options}
    model, adapter = model_of(trainer, tied, lora)
    if world > 1 and layout == "zero3-loaded":
        model, arguments = loaded_in_parts(folder, model, options)
    if layout == "fsdp2-ram" and int(os.environ.get("RANK", 0)):
        with torch.no_grad():  # only the first process has loaded weights
            for p in model.parameters():
                p.fill_(torch.nan)
    torch.manual_seed(0)  # of a new adapter
    if given_adapter:
        from peft import get_peft_model

        model, adapter = get_peft_model(model, adapter), None
    if trainer == "sspo":
        made = rl.make_trainer(
            folder, model, peft_config=adapter, per_device_train_batch_size=2,
            gradient_accumulation_steps=8 // world, eval_dataset=rl.ROWS[:5], per_device_eval_batch_size=2, **more,
        )  # fmt: skip
    else:
        # Trainer does not update after the last batches of a stream, if there are too few to accumulate
        shared = {"per_device_train_batch_size" if stream else "gradient_accumulation_steps": 4 // world}
        args = preference.config(folder, **{**shared, **more})
        features = preference.make_features(rows)
        dataset = Stream(features) if stream else features
        made = StepPreferenceTrainer(model, args, dataset, features[:5], peft_config=adapter)
    found = {"before": made.evaluate()} if "before" in evaluate else {}
    made.train()
    assert world == 1 or made.is_fsdp_enabled == layout.startswith("fsdp2")
    if "after" in evaluate:
        found["after"] = made.evaluate()
    found["weights"] = whole_weights(made)
    found["logs"] = made.state.log_history
    if save:
        made.save_result()
        from safetensors.torch import load_file

        files = sorted(folder.glob("*model*.safetensors"))
        found["saved"] = [load_file(file) for file in files]
    return found


def whole_weights(trainer) -> dict[str, torch.Tensor]:
    """The trained parameters, gathered from all processes."""
    weights = {}
    for name, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        if p.requires_grad:
            name = name.removeprefix("module.")
            if hasattr(p, "ds_id") and hasattr(p, "ds_tensor"):
                import deepspeed

                with deepspeed.zero.GatheredParameters([p]):
                    weights[name] = p.detach().clone()
            else:
                p = p.detach()
                weights[name] = (p.full_tensor() if hasattr(p, "full_tensor") else p).clone()
    return weights


def main(folder: Path, cases: dict[str, dict]) -> dict:
    """The findings of every case, one after the other in the same processes."""
    from accelerate.state import AcceleratorState

    found, world = {}, int(os.environ.get("WORLD_SIZE", 1))
    for name, case in cases.items():
        launched = LAUNCHED_AS.get(case.get("layout", "ddp"), {}) if world > 1 else {}
        os.environ.update(launched)
        try:
            found[name] = trained(folder / name, **case)
        finally:
            for variable in launched:
                os.environ.pop(variable)
            AcceleratorState._reset_state(reset_partial_state=True)
    return found


if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    shard_on_cpus()
    out = Path(sys.argv[1])
    found = main(out, json.loads(sys.argv[2]))
    if torch.distributed.get_rank() == 0:
        torch.save(found, out / "found.pt")
    leave()
