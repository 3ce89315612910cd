# SPDX-License-Identifier: Apache-2.0
"""Both trainers on two CPU processes against one: the same updates, evaluations and saved weights.

The differences of the weights are printed (pytest -s). What was red on the code before, and where:
    SSPOTrainer.in_step does nothing         -> [fsdp2-sspo], a process aborts in a collective
    accelerate fills the last batches        -> [ddp-pref], in a dataset and in a stream
    StepTrainer._shard does nothing          -> [fsdp2-pref] in evaluate() before training, and by the reference
    save_model is Trainer's alone            -> [fsdp2-pref], no weights are saved
"""

import json

import pytest
import torch

pytest.importorskip("transformers")

from helpers.launch import torchrun
from helpers.ranks import sharded_two_ranks

from sspo_ext.train import loaded_weights
from sspo_ext.train.base import StepTrainer
from sspo_ext.train.sharded import shard

TABLE = {
    "linear": {}, "linear, lora": {"lora": True}, "logits": {"route": "logits"},
    "logits, lora": {"route": "logits", "lora": True},
}  # fmt: skip
"""The columns of the table in docs/scaling.md, for each way to share the work and each trainer."""

MORE = {
    "ddp-pref": {
        "uneven end": {"rows": 13},
        "fewer rows than processes": {"rows": 1, "save": True},
        "uneven end of a stream": {"rows": 13, "stream": True, "reference_free": True},
    },
    "fsdp2-pref": {
        "linear": {"evaluate": "before after", "save": True},
        "logits, lora": {"route": "logits", "lora": True, "evaluate": "before after", "save": True},
        "one process has weights": {"layout": "fsdp2-ram", "tied": True, "evaluate": "before"},
        "tied, checkpoints": {"tied": True, "save": True, "save_strategy": "steps", "save_steps": 2},
    },
    "fsdp2-sspo": {
        "linear": {"probe_options": {"max_tokens": 40}, "evaluate": "after", "save": True},
        "compact": {"rollout_engine": "compact", "rollout_batch_size": 2, "route": "logits"},
        "linear, lora": {"probe_options": {"max_tokens": 40}, "lora": True, "evaluate": "after", "beta": 0.1},
        "one process has weights": {"layout": "fsdp2-ram", "beta": 0.1, "evaluate": "before"},
    },
    "zero3-pref": {
        "linear": {"evaluate": "before after", "save": True, "save_strategy": "steps", "save_steps": 2},
        "linear, lora": {"lora": True, "evaluate": "before after", "save": True},
        "tied": {"tied": True},
        "shared out in loading": {"layout": "zero3-loaded", "evaluate": "before"},
    },
    "zero3-sspo": {
        "linear": {"probe_options": {"max_tokens": 40}, "evaluate": "before after", "save": True},
        "linear, lora": {"lora": True, "given_adapter": True, "beta": 0.1},
        "compact": {"rollout_engine": "compact", "rollout_batch_size": 2, "tied": True},
        "shared out in loading": {"layout": "zero3-loaded", "beta": 0.1},
    },
}  # fmt: skip

CASES = {
    f"{layout}-{trainer}": {
        name: {"layout": layout, "trainer": trainer, **case}
        for name, case in (TABLE | MORE.get(f"{layout}-{trainer}", {})).items()
    }
    for layout in ("ddp", "fsdp2", "zero1", "zero2", "zero3")
    for trainer in ("pref", "sspo")
}


def worst(one: dict, two: dict) -> float:
    assert one and one.keys() <= two.keys()  # tied weights may be saved under both of their names
    return max((one[name] - two[name]).abs().max().item() for name in one)


def moved(found: dict, case: dict) -> float:
    """How far training took the weights; an adapter's B begins at 0."""
    model, _ = sharded_two_ranks.model_of(case["trainer"], case.get("tied", False), False)
    start = dict(model.named_parameters())
    return max((w - start[n] if n in start else w).abs().max().item() for n, w in found.items() if "lora_A" not in n)


@pytest.mark.slow
@pytest.mark.parametrize("group", CASES)
def test_two_processes_train_what_one_does(group, tmp_path):
    if group.startswith("zero"):
        pytest.importorskip("deepspeed")
    cases = CASES[group]
    (tmp_path / "two").mkdir()
    torchrun("helpers.ranks.sharded_two_ranks", tmp_path / "two", json.dumps(cases))
    found = torch.load(tmp_path / "two" / "found.pt", weights_only=False)
    for name, one in sharded_two_ranks.main(tmp_path / "one", cases).items():
        two = found[name]
        difference, way = worst(one["weights"], two["weights"]), moved(one["weights"], cases[name])
        print(f"\n{group}, {name}: weights move by {way:.1e}, and differ by {difference:.1e}")
        assert way > 5e-3 and difference < 1e-6, name
        for when in ("before", "after"):
            for metric, value in one.get(when, {}).items():
                if not metric.endswith(("_runtime", "_per_second", "_time")):
                    assert two[when][metric] == pytest.approx(value, rel=1e-5, abs=1e-6), (name, when, metric)
        if "saved" in one:
            assert len(one["saved"]) == len(two["saved"]) == 1, name
            assert worst(one["saved"][0], two["saved"][0]) < 1e-6, name


def test_accelerate_that_shards_tied_weights_twice_is_refused(monkeypatch):
    import accelerate

    monkeypatch.setattr(accelerate, "__version__", "1.14.0")
    model, _ = sharded_two_ranks.model_of("pref", True, False)
    with pytest.raises(ValueError, match="accelerate: expected 1.15 or newer .* got 1.14.0"):
        shard(model, None)


@pytest.mark.parametrize("trainer", ["pref", "sspo"])
@pytest.mark.parametrize("kind", ["cp_size", "sp_size", "tp_size"])
def test_rows_cut_between_processes_are_refused(trainer, kind, tmp_path, monkeypatch):
    from transformers import Trainer

    if not hasattr(Trainer, f"get_{kind}"):
        pytest.skip(f"this Trainer has no {kind}")
    monkeypatch.setattr(Trainer, f"get_{kind}", lambda self: 2)
    with pytest.raises(ValueError, match=f"parallelism_config: expected .*{kind}=1.* got .*2"):
        sharded_two_ranks.trained(tmp_path, trainer=trainer)


def test_vllm_beside_zero3_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(StepTrainer, "zero_stage", 3)
    with pytest.raises(
        ValueError, match="rollout_engine: expected 'auto', 'compact' or 'generate' with ZeRO-3, got 'vllm'"
    ):
        sharded_two_ranks.trained(tmp_path, trainer="sspo", rollout_engine="vllm")


def test_a_part_of_a_weight_that_is_not_finite_is_found_by_every_process(monkeypatch):
    """ZeRO-3 leaves a parameter empty, and its part beside it; another process may have the part that is wrong."""
    others = {"wrong here": [True, True], "wrong there": [True, False]}
    for name, other in others.items():
        model = torch.nn.Linear(2, 2, bias=True)
        for p in model.parameters():
            p.ds_id, p.ds_tensor, p.data = 0, p.detach().flatten()[:1].clone(), torch.empty(0)
        if name == "wrong here":
            model.bias.ds_tensor.fill_(torch.nan)
        monkeypatch.setattr(
            loaded_weights,
            "everywhere",
            lambda flags, other=other: [a and b for a, b in zip(flags, other, strict=True)],
        )
        with pytest.raises(ValueError, match="model: weight bias is not finite after 3 updates"):
            loaded_weights.check_finite(model, "after 3 updates")
