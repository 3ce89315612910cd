# SPDX-License-Identifier: Apache-2.0
"""Checkpoints are there whole or not at all, and a training goes on from one exactly or not at all; both trainers."""

import json
import os
import resource
import shutil

import pytest
import torch

pytest.importorskip("transformers")

from helpers.preference import config, make_features
from helpers.preference import make_model as make_pair_model
from helpers.rl import make_model, make_trainer
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from sspo_ext.train.checkpoints import newest_checkpoint, rotate
from sspo_ext.train.preference_trainer import StepPreferenceTrainer

OPTIONS = dict(optim="adamw_torch", learning_rate=1e-3, lr_scheduler_type="linear", max_steps=4, save_strategy="steps")
OPTIONS |= dict(save_steps=2)
FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def preference(folder, model=None, callbacks=(), **options):
    args = config(folder, **{**OPTIONS, **options})
    return StepPreferenceTrainer(model or make_pair_model(dropout=0.1), args, make_features(), callbacks=[*callbacks])


def sspo(folder, model=None, callbacks=(), **options):
    trainer = make_trainer(folder, model or make_model(dropout=0.1), **{**OPTIONS, **options})
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


TRAINERS = pytest.mark.parametrize("make", [preference, sspo])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run of each trainer, by the function that makes it."""
    found = {}
    for make in (preference, sspo):
        found[make] = tmp_path_factory.mktemp(make.__name__)
        make(found[make]).train()
    return found


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def copy(run, folder):
    shutil.copytree(run, folder / "run")
    return folder / "run"


# ---- which one


def test_the_newest_whole_checkpoint(tmp_path):
    for name, text in {
        "checkpoint-2": '{"global_step": 2}',
        "checkpoint-10": '{"global_step": 10}',
        "checkpoint-10-old": '{"global_step": 99}',
        "checkpoint-x": '{"global_step": 99}',
        "checkpoint-11": '{"global_step": 11, "log_his',  # killed while it was written
        "checkpoint-12": None,
        "unfinished/checkpoint-13": '{"global_step": 13}',
    }.items():
        (tmp_path / name).mkdir(parents=True)
        if text is not None:
            (tmp_path / name / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-14").write_text("a file")
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    shutil.rmtree(tmp_path / "checkpoint-10")
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    shutil.rmtree(tmp_path / "checkpoint-2")
    assert newest_checkpoint(tmp_path) is None is newest_checkpoint(tmp_path / "nowhere")


@TRAINERS
def test_resumed_from_the_newest_whole_one(runs, make, tmp_path):
    run, whole = copy(runs[make], tmp_path), load_file(runs[make] / "checkpoint-4" / "model.safetensors")
    (run / "checkpoint-4" / "trainer_state.json").unlink()
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-5-old")
    make(run).train(resume_from_checkpoint=True)
    found = load_file(run / "checkpoint-4" / "model.safetensors")
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)
    assert (run / "checkpoint-5-old").exists() and not (run / "unfinished").exists()


def test_none_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="resume_from_checkpoint: no whole checkpoint in"):
        preference(tmp_path).train(resume_from_checkpoint=True)


# ---- nothing is missing


@pytest.mark.parametrize("name", FILES)
@TRAINERS
def test_what_is_missing_is_named(runs, make, tmp_path, name):
    run = copy(runs[make], tmp_path)
    (run / "checkpoint-2" / name).unlink()
    before = contents(run)
    with pytest.raises(ValueError, match=rf"resume: {name} is missing.*checkpoint-2'"):
        make(run).train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert contents(run) == before


@pytest.mark.parametrize("name", FILES)
def test_what_was_not_written_to_its_end_is_named(runs, tmp_path, name):
    run = copy(runs[preference], tmp_path)
    os.truncate(run / "checkpoint-2" / name, (run / "checkpoint-2" / name).stat().st_size // 2)
    with pytest.raises(ValueError, match=rf"resume: {name} .*not written to its end in .*checkpoint-2'"):
        preference(run).train(resume_from_checkpoint=str(run / "checkpoint-2"))


def test_a_weight_that_is_missing_is_named(runs, tmp_path):
    run = copy(runs[sspo], tmp_path)
    file = run / "checkpoint-4" / "model.safetensors"
    found = load_file(file)
    del found["model.norm.weight"]
    save_file(found, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"checkpoint-4' lacks 1 weights \(model.norm.weight\)"):
        sspo(run).train(resume_from_checkpoint=True)


def test_tied_weights_are_not_missed(tmp_path):
    model = make_model(tie_word_embeddings=True)
    sspo(tmp_path, model).train()
    again = sspo(tmp_path, make_model(seed=1, tie_word_embeddings=True))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(weights(again.model), weights(model))


def test_a_weight_that_an_adapter_misses_is_named(tmp_path):
    peft = pytest.importorskip("peft")
    lora = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    whole = make_trainer(tmp_path, peft_config=peft.LoraConfig(**lora), **OPTIONS)
    whole.train()
    file = tmp_path / "checkpoint-2" / "adapter_model.safetensors"
    found = load_file(file)
    name = sorted(found)[0]
    again = make_trainer(tmp_path, peft_config=peft.LoraConfig(**lora), **OPTIONS)
    again.train(resume_from_checkpoint=str(file.parent))
    assert torch.equal(weights(again.model), weights(whole.model))
    del found[name]
    save_file(found, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"checkpoint-2' lacks 1 weights \(.*lora_A"):
        make_trainer(tmp_path, peft_config=peft.LoraConfig(**lora), **OPTIONS).train(str(file.parent))


def test_a_checkpoint_of_other_processes_is_refused(runs, tmp_path):
    run = copy(runs[preference], tmp_path)
    (run / "checkpoint-2" / "rng_state.pth").rename(run / "checkpoint-2" / "rng_state_0.pth")
    shutil.copy(run / "checkpoint-2" / "rng_state_0.pth", run / "checkpoint-2" / "rng_state_1.pth")
    with pytest.raises(ValueError, match=r"rng_state.pth is missing \(another number of processes"):
        preference(run).train(resume_from_checkpoint=str(run / "checkpoint-2"))


def test_rollouts_that_were_not_saved_are_not_made_up(tmp_path):
    options = {"num_iterations": 2, "loss_type": "ppo"}
    sspo(tmp_path, max_steps=3, **options).train()
    with pytest.raises(ValueError, match="a multiple of num_iterations=2 updates.*got one after 3"):
        sspo(tmp_path, max_steps=6, **options).train(resume_from_checkpoint=True)


# ---- a finished run


@pytest.mark.parametrize("options", [{}, {"save_strategy": "epoch", "max_steps": 6}, {"max_steps": -1}])
@TRAINERS
def test_a_finished_run_makes_no_update_more(make, tmp_path, options):
    first = make(tmp_path, num_train_epochs=1.5, **options)
    first.train()
    assert first.planned_updates() == first.state.global_step == first.state.max_steps
    before = contents(tmp_path)
    again = make(tmp_path, num_train_epochs=1.5, **options)
    again.train(resume_from_checkpoint=str(newest_checkpoint(tmp_path)))
    if newest_checkpoint(tmp_path).name.endswith(str(first.state.global_step)):
        assert torch.equal(weights(again.model), weights(first.model))
        assert contents(tmp_path) == before


# ---- nothing that is not finite is saved


class Poison(TrainerCallback):
    """A weight that is not a number, after the third update."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            with torch.no_grad():
                model.lm_head.weight[3] = float("nan")


@TRAINERS
def test_weights_that_are_not_finite_are_not_saved(make, tmp_path):
    own = {"combine": "outcome"} if make is sspo else {}
    trainer = make(tmp_path, callbacks=[Poison()], logging_strategy="no", **own)
    with pytest.raises(ValueError, match=r"weight \S+ is not finite after 4 updates, so it is not saved"):
        trainer.train()
    with pytest.raises(ValueError, match="weight .* is not finite after . updates, so it is not saved"):
        trainer.save_result()
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (tmp_path / "model.safetensors").exists() and not (tmp_path / "trainer_state.json").exists()


@TRAINERS
def test_a_learning_rate_that_is_far_too_high(make, tmp_path):
    own = {"combine": "outcome"} if make is sspo else {}
    with pytest.raises(ValueError, match="loss: expected a finite number, got nan after .* try a lower learning rate"):
        make(tmp_path, learning_rate=1e30, logging_steps=1, save_steps=100, **own).train()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_frozen_weight_beside_an_adapter_does_not_matter(tmp_path):
    peft = pytest.importorskip("peft")
    model = make_pair_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[1] = float("nan")  # of a token that is in no row
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    args = config(tmp_path, **OPTIONS)
    StepPreferenceTrainer(model, args, make_features(), peft_config=lora).save_result()
    assert (tmp_path / "adapter_model.safetensors").exists()


# ---- writing


class FullDisk(TrainerCallback):
    """From the third update on no file can have more bytes than this."""

    def __init__(self, limit):
        self.limit = limit

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("limit,name", [(3000, r"\*.safetensors"), (40_000, "optimizer.pt")])
@TRAINERS
def test_a_full_disk(runs, make, tmp_path, limit, name):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match=rf"unfinished/checkpoint-4/{name}' cannot be written: "):
            make(tmp_path, callbacks=[FullDisk(limit)]).train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (tmp_path / "unfinished").exists()
    again = make(tmp_path)
    again.train(resume_from_checkpoint=True)
    whole = load_file(runs[make] / "checkpoint-4" / "model.safetensors")
    found = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(found[key], whole[key]) for key in whole) and not (tmp_path / "unfinished").exists()


def test_a_full_disk_for_the_result_or_the_reference(tmp_path):
    trainer, features = preference(tmp_path), make_features(400)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(OSError, match=rf"{tmp_path}/\*.safetensors' cannot be written: "):
            trainer.save_result()
        with pytest.raises(OSError, match=rf"{tmp_path}/reference_cache/\S+ cannot be written: "):
            StepPreferenceTrainer(make_pair_model(), config(tmp_path), features)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "trainer_state.json").exists() and not list(tmp_path.rglob("*.tmp"))


def test_a_full_disk_for_the_mark_of_a_result(tmp_path, monkeypatch):
    trainer = preference(tmp_path)
    monkeypatch.setattr(trainer, "save_model", lambda: None)
    trainer.state.log_history = [{"loss": 0.5}] * 400
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(OSError, match=rf"{tmp_path}/trainer_state.json' cannot be written: "):
            trainer.save_result()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.glob("trainer_state*"))


@TRAINERS
def test_old_checkpoints_go_when_the_new_one_is_there(make, tmp_path):
    (tmp_path / "checkpoint-1-mine").mkdir()
    there = []

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            there.append(sorted(p.name for p in tmp_path.glob("checkpoint-*")))

    make(tmp_path, callbacks=[Look()], save_total_limit=1, max_steps=6).train()
    assert there == [["checkpoint-1-mine", f"checkpoint-{n}"] for n in (2, 4, 6)]
    assert not (tmp_path / "unfinished").exists()


def test_the_best_checkpoint_stays(tmp_path):
    for n in (2, 4, 6, 8):
        (tmp_path / f"checkpoint-{n}").mkdir()
        state = tmp_path / f"checkpoint-{n}" / "trainer_state.json"
        state.write_text(json.dumps({"global_step": n}))
        os.utime(state, (n, n))

    def left():
        return sorted(p.name for p in tmp_path.glob("checkpoint-*"))

    rotate(tmp_path, None, None)
    assert len(left()) == 4
    rotate(tmp_path, 3, str(tmp_path / "checkpoint-2"))
    assert left() == ["checkpoint-2", "checkpoint-6", "checkpoint-8"]
    rotate(tmp_path, 1, str(tmp_path / "checkpoint-2"))
    assert left() == ["checkpoint-2", "checkpoint-8"]
    rotate(tmp_path, 1, None)
    assert left() == ["checkpoint-8"]


def test_the_best_checkpoint_is_named_where_it_is(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1}
    args = config(tmp_path, **{**OPTIONS, **options}, metric_for_best_model="loss")
    trainer = StepPreferenceTrainer(make_pair_model(), args, make_features(), make_features(4))
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best == str(tmp_path / f"checkpoint-{trainer.state.best_global_step}") and os.path.isdir(best)
    saved = json.loads((tmp_path / best / "trainer_state.json").read_text())
    assert saved["best_model_checkpoint"] == best
