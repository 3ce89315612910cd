# SPDX-License-Identifier: Apache-2.0
"""Adapters that are functions: their signatures are those of the engines, and their numbers those of policy_loss.

A signature is read from the source of the installed package; where it is not installed, it is the one written here.

Mutations, each caught by the test named:
  an argument of an engine left out, or in another place            test_signatures
  log-probs and masks one token apart; normalisers swapped          test_nemo_rl, test_openrlhf
  steps not told apart where advantages are equal                   test_equal_neighbours
  a sequence's tokens counted to the next                           test_tinker
"""

import ast
import inspect
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers.engine_batch import REWARDS, at_starts, by_lists

from sspo_ext import StepLayout, policy_loss
from sspo_ext.integrations import nemo_rl, openrlhf, prime_rl, skyrl, steps, tinker
from sspo_ext.losses import rollout_correction
from sspo_ext.signals import steps_to_tokens

# name -> (ours, package, file in it, class or None, function, parameters where the package is not installed)
ENGINES = {
    "OpenRLHF 0.11.2": (
        openrlhf.StepPolicyLoss.forward, "openrlhf", "openrlhf/models/loss.py", "PolicyLoss", "forward",
        ["self", "log_probs", "old_log_probs", "advantages", "action_mask", "rollout_log_probs", "dp_size",
         "batch_num_tokens", "global_batch_size"],
    ),
    "SkyRL 0.3.0, loss": (
        skyrl.step_loss, "skyrl", "skyrl/backends/skyrl_train/utils/ppo_utils.py", None, "ppo_policy_loss",
        ["log_probs", "old_log_probs", "advantages", "config", "loss_mask", "rollout_logprobs"],
    ),
    "NeMo-RL at 002cdc27": (
        nemo_rl.StepLoss.__call__, "nemo_rl", "nemo_rl/algorithms/loss/interfaces.py", "LossFunction", "__call__",
        ["self", "data", "global_valid_seqs", "global_valid_toks", "kwargs"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
def test_signatures(engine):
    ours, package, path, owner, name, wanted = ENGINES[engine]
    try:
        source = Path(metadata.distribution(package).locate_file(path)).read_text()
    except (metadata.PackageNotFoundError, FileNotFoundError):
        source = None
    if source is not None:
        body = ast.parse(source).body
        if owner is not None:
            (body,) = [node.body for node in body if isinstance(node, ast.ClassDef) and node.name == owner]
        (found,) = [node.args for node in body if isinstance(node, ast.FunctionDef) and node.name == name]
        theirs = [a.arg for a in [*found.posonlyargs, *found.args, *found.kwonlyargs]]
        assert theirs + ([found.kwarg.arg] if found.kwarg else []) == wanted
    mine = list(inspect.signature(ours).parameters)
    assert [p for p in mine if p != "next_token_logprobs"] == wanted


def test_the_estimator_takes_what_skyrl_gives():
    """Its caller passes everything by name."""
    given = {"token_level_rewards", "response_mask", "index", "values", "grpo_norm_by_std", "gamma", "lambd", "config"}
    assert given <= set(inspect.signature(skyrl.step_advantage).parameters)


def wanted(b, level="step", **options):
    layout = StepLayout.from_response(b.mask, b.ids)
    out = policy_loss(
        b.logp, layout, b.advantages, old=b.old, loss_type="ppo", importance_sampling_level=level, **options
    )
    return out.loss.detach(), torch.autograd.grad(out.loss, b.logp)[0]


def same(loss, b, want, factor=1.0):
    (gradient,) = torch.autograd.grad(loss, b.logp)
    torch.testing.assert_close(loss.detach(), want[0] * factor)
    torch.testing.assert_close(gradient, want[1] * factor)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("level", ["step", "token", "sequence"])
def test_openrlhf(batch, level):
    b = batch
    clip = {"epsilon": 0.1, "epsilon_high": 0.25, "delta": 2.0}
    call = dict(clip_eps_low=0.1, clip_eps_high=0.25, dual_clip=2.0, level=level, is_correction_mode="mask")
    for token, aggregation in ((True, "token"), (False, "sequence")):
        loss = openrlhf.StepPolicyLoss(token_level_loss=token, **call)
        out = loss(b.logp, b.old, b.advantages, action_mask=b.mask)
        same(out[0], b, wanted(b, level, aggregation=aggregation, **clip))
        shared = loss(b.logp, b.old, b.advantages, b.mask, None, 2, 40.0, 8.0)[0]
        same(shared, b, wanted(b, level, aggregation=aggregation, num_items=20 if token else 4, **clip))
        assert len(out) == 5 and out[3] is out[4] is None
    torch.testing.assert_close(out[2], ((b.old - b.logp) * b.mask).sum().detach() / b.mask.sum())
    for bad in ({"policy_loss_type": "gspo"}, {"is_correction_level": "token"}):
        with pytest.raises(ValueError, match=f"^{next(iter(bad))}: expected"):
            openrlhf.StepPolicyLoss(**bad)


def test_openrlhf_own_loss(batch):
    """At token level: the class of the installed package, executed from its own file."""
    try:
        path = metadata.distribution("openrlhf").locate_file("openrlhf/models")
    except metadata.PackageNotFoundError:
        pytest.skip("openrlhf is not installed")
    scope = {"__name__": "openrlhf_loss"}
    source = (Path(path) / "loss.py").read_text()
    tree = ast.parse(source)
    keep = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef))]
    tree.body = [n for n in keep if not (isinstance(n, ast.ImportFrom) and n.level)]
    tree.body = [n for n in tree.body if not isinstance(n, ast.ClassDef) or n.name == "PolicyLoss"]

    def masked_mean(x, mask, dim=None):
        return (x * mask).sum(dim) / mask.sum(dim)

    scope["masked_mean"] = masked_mean
    exec(compile(tree, "loss.py", "exec"), scope)
    for token in (True, False):
        options = dict(clip_eps_low=0.1, clip_eps_high=0.25, dual_clip=2.0, token_level_loss=token)
        found = []
        for loss in (openrlhf.StepPolicyLoss(level="token", **options), scope["PolicyLoss"](**options)):
            out = loss(batch.logp, batch.old, batch.advantages, action_mask=batch.mask)
            found.append((out[0].detach(), torch.autograd.grad(out[0], batch.logp)[0], out[1], out[2].detach()))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def corrected(b, level="step", mode="step_truncate", **options):
    """What weights of the rollout's log-probs make of it, and the log-probs."""
    rollout = b.old - torch.linspace(-1, 1.5, b.old.numel()).view(b.old.shape)
    layout = StepLayout.from_response(b.mask, b.ids)
    weights = rollout_correction(b.old, rollout, layout, mode=mode).weights
    assert weights.unique().numel() > 2
    return wanted(b, level, importance_weights=weights, **options), rollout


def test_openrlhf_corrects_rollouts(batch):
    b = batch
    for mode in ("step_truncate", "token_mask"):
        want, rollout = corrected(b, mode=mode, epsilon=0.2, epsilon_high=0.2)
        loss = openrlhf.StepPolicyLoss(correction={"mode": mode})
        same(loss(b.logp, b.old, b.advantages, b.mask, rollout)[0], b, want)
    plain = wanted(b, epsilon=0.2, epsilon_high=0.2)
    same(openrlhf.StepPolicyLoss(correction=None)(b.logp, b.old, b.advantages, b.mask, rollout)[0], b, plain)
    want, rollout = corrected(b, mode="sequence_mask", epsilon=0.2, epsilon_high=0.2)
    same(openrlhf.StepPolicyLoss()(b.logp, b.old, b.advantages, b.mask, rollout)[0], b, want)  # on by default


def test_skyrl_corrects_rollouts(batch, monkeypatch):
    b, config = batch, SimpleNamespace(eps_clip_low=0.1, eps_clip_high=0.25)
    options = {"aggregation": "sum", "epsilon": 0.1, "epsilon_high": 0.25}
    want, rollout = corrected(b, mode="sequence_mask", **options)
    loss, metrics = skyrl.step_loss(b.logp, b.old, b.advantages, config, b.mask, rollout)
    same(loss, b, want)
    assert metrics["sampling/ratio/mean"] != 1 and "sampling/kl_k3" in metrics
    made = {}
    registry = SimpleNamespace(
        register_advantage_estimator=lambda name: lambda fn: made.update(estimator=fn),
        register_policy_loss=lambda name: lambda fn: made.update(loss=fn),
    )
    package = ModuleType("skyrl.backends.skyrl_train.utils")
    package.ppo_utils = registry
    for name in ("skyrl", "skyrl.backends", "skyrl.backends.skyrl_train"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "skyrl.backends.skyrl_train.utils", package)
    monkeypatch.setattr(skyrl, "check_version", lambda *_: None)
    skyrl.register(correction={"mode": "step_truncate"})
    want, _ = corrected(b, **options)
    same(made["loss"](b.logp, b.old, b.advantages, config, loss_mask=b.mask, rollout_logprobs=rollout)[0], b, want)


def test_skyrl(batch):
    b, config = batch, SimpleNamespace(eps_clip_low=0.1, eps_clip_high=0.25)
    loss, metrics = skyrl.step_loss(b.logp, b.old, b.advantages, config, loss_mask=b.mask, rollout_logprobs=None)
    same(loss, b, wanted(b, aggregation="sum", epsilon=0.1, epsilon_high=0.25))
    assert 0 <= metrics["clip_ratio"] <= 1


def test_skyrl_advantage(batch):
    from sspo_ext.signals import outcome_advantages

    rewards = torch.zeros(4, 7)
    rewards[torch.arange(4), torch.tensor([5, 3, 6, 5])] = REWARDS
    found = skyrl.step_advantage(
        token_level_rewards=rewards, response_mask=batch.mask, index=["b", "b", "a", "a"], values=at_starts(batch.ids),
        gamma=0.9, lambd=0.8, config=None, grpo_norm_by_std=True,
    )  # fmt: skip
    outcome = outcome_advantages(REWARDS, "grpo", groups=torch.tensor([1, 1, 0, 0]))
    for got in found:
        torch.testing.assert_close(got, by_lists(batch.ids, outcome), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="^values: expected"):
        skyrl.step_advantage(rewards, batch.mask, ["a"] * 4)


def test_nemo_rl(batch, monkeypatch):
    """Log-probs are of the tokens from the second on; a sample that is masked out does not count."""
    interfaces = ModuleType("nemo_rl.algorithms.loss.interfaces")
    interfaces.LossType = SimpleNamespace(TOKEN_LEVEL="token_level")
    interfaces.LossInputType = SimpleNamespace(LOGPROB="logprob")
    loss_module = ModuleType("nemo_rl.algorithms.loss")
    loss_module.interfaces = interfaces
    for name in ("nemo_rl", "nemo_rl.algorithms"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "nemo_rl.algorithms.loss", loss_module)
    monkeypatch.setitem(sys.modules, "nemo_rl.algorithms.loss.interfaces", interfaces)
    b = batch
    first = torch.zeros(4, 1)
    data = {
        "token_mask": torch.cat([first, b.mask], 1), "sample_mask": torch.tensor([1.0, 1.0, 0.0, 1.0]),
        "prev_logprobs": torch.cat([first, b.old], 1), "advantages": torch.cat([first, b.advantages], 1),
    }  # fmt: skip
    loss = nemo_rl.StepLoss(epsilon=0.1)
    assert (loss.loss_type, loss.input_type) == ("token_level", "logprob")
    out, metrics = loss(
        data, global_valid_seqs=torch.tensor(6), global_valid_toks=torch.tensor(50), next_token_logprobs=b.logp
    )
    b.mask[2] = 0
    b.ids[2] = -1
    same(out, b, wanted(b, num_items=50, epsilon=0.1))
    assert metrics["num_valid_samples"] == 3
    want, rollout = corrected(b, num_items=50, epsilon=0.1)
    data["generation_logprobs"] = torch.cat([first, rollout], 1)
    loss = nemo_rl.StepLoss(epsilon=0.1, correction={"mode": "step_truncate"})
    out, metrics = loss(data, torch.tensor(6), torch.tensor(50), next_token_logprobs=b.logp)
    same(out, b, want)
    assert metrics["sampling/ratio/max"] > 1


def test_prime_rl(batch, monkeypatch):
    @dataclass
    class LossOutputs:
        loss: torch.Tensor
        metrics: dict

    module = ModuleType("prime_rl.trainer.rl.loss")
    module.LossOutputs = LossOutputs
    for name in ("prime_rl", "prime_rl.trainer", "prime_rl.trainer.rl"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "prime_rl.trainer.rl.loss", module)
    b, total = batch, 0
    for i in range(4):
        inputs = SimpleNamespace(
            trainer_logprobs=b.logp[i], inference_logprobs=b.old[i], ref_logprobs=None, advantages=b.advantages[i],
            loss_mask=b.mask[i].bool(), loss_weights=None if i else torch.full((7,), 1.0),
        )  # fmt: skip
        out = prime_rl.step_loss(inputs, epsilon=0.1)
        assert isinstance(out, LossOutputs) and set(out.metrics) == {"ratio/mean", "clip_ratio/region_mean"}
        total = total + out.loss
    same(total, b, wanted(b, aggregation="sum", epsilon=0.1))


def test_tinker(batch):
    """Through tinker's own client code: what it sends to the server as weights is minus the gradient."""
    pytest.importorskip("tinker", reason="tinker is not installed")
    import tinker as package
    from tinker.lib.public_interfaces.training_client import TrainingClient

    b, lengths = batch, [7, 5, 7, 6]
    data = [
        package.types.Datum(
            model_input=package.types.ModelInput.from_ints([1] * n),
            loss_fn_inputs={
                "target_tokens": torch.ones(n, dtype=torch.int64), "step_ids": b.ids[i, :n],
                "advantages": b.advantages[i, :n], "logprobs": b.old[i, :n],
            },
        )
        for i, n in enumerate(lengths)
    ]  # fmt: skip
    outputs = [{"logprobs": package.types.TensorData.from_torch(b.logp[i, :n].detach())} for i, n in enumerate(lengths)]
    forward = SimpleNamespace(loss_fn_outputs=outputs)
    options = {"loss_type": "ppo", "importance_sampling_level": "step", "aggregation": "sequence", "epsilon": 0.1}
    found = TrainingClient._compute_custom_loss(data, tinker.step_loss(**options), forward)
    loss, gradient = wanted(b, "step", aggregation="sequence", epsilon=0.1)
    for i, (datum, n) in enumerate(zip(found.data, lengths, strict=True)):
        torch.testing.assert_close(datum.loss_fn_inputs["weights"].to_torch(), -gradient[i, :n])
    assert gradient.abs().max() > 0 and loss != 0


def test_tinker_needs_its_version():
    try:
        metadata.version("tinker")
    except metadata.PackageNotFoundError:
        with pytest.raises(ImportError, match="^tinker: sspo_ext needs 0.38, and none is installed"):
            tinker.step_loss()


def test_sizes_on_the_page():
    """docs/integrations.md tells the lines of each adapter."""
    import re

    from helpers.paths import DOCS, ROOT

    page = (DOCS / "integrations.md").read_text()
    told = re.findall(r"^\| [^|]*\| `sspo_ext\.integrations\.(\w+)`[^|]*\| (\d+) \|", page, re.MULTILINE)
    assert len(told) == 8
    for name, lines in told:
        assert len((ROOT / f"sspo_ext/integrations/{name}.py").read_text().splitlines()) == int(lines), name


def test_the_plugin_for_verl_is_heard():
    """verl swallows what a plugin raises; here verl is not installed, as where it has another version."""
    import importlib.util

    if importlib.util.find_spec("verl") is not None:
        pytest.skip("verl is installed")
    (point,) = [e for e in metadata.entry_points(group="verl.plugins") if e.name == "sspo_ext"] or [
        metadata.EntryPoint("sspo_ext", "sspo_ext.integrations.verl_plugin", "verl.plugins")
    ]
    with pytest.warns(RuntimeWarning, match="^sspo_ext: its plugin for verl is not loaded: .*verl"):
        with pytest.raises(ImportError):
            point.load()


@pytest.mark.parametrize("adapter", ["openrlhf", "skyrl"])
def test_another_version_is_refused(adapter, monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "9.9.1")
    call = {"openrlhf": openrlhf.use_step_ratio, "skyrl": skyrl.register}[adapter]
    with pytest.raises(ImportError, match=f"^{adapter}: .* was tested with 0.*, and 9.9.1 is installed"):
        call()


def test_equal_neighbours():
    """Runs of equal advantages are the steps, whatever lies between; equal ones are moved apart by one unit."""
    ids = torch.tensor([[0, 0, -1, 1, 1, 2, 3], [-1, 0, 1, 1, -1, 3, 4]])
    advantages = steps_to_tokens(torch.tensor([1.0, 1.0, 1.0, 2.0, 0.5, 0.5, 0.0, 0.5, 0.5]), ids)
    moved = steps.apart(advantages, ids)
    assert (moved - advantages).abs().max() <= 1.2e-7
    found = steps.step_ids_from_advantages(moved, ids >= 0)
    assert found.tolist() == [[0, 0, -1, 1, 1, 2, 3], [-1, 0, 1, 1, -1, 2, 3]]
    assert steps.step_ids_from_advantages(advantages, ids >= 0).tolist()[0] == [0, 0, -1, 0, 0, 0, 1]
