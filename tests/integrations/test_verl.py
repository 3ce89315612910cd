# SPDX-License-Identifier: Apache-2.0
"""sspo_ext.integrations.verl, through verl's own functions on the CPU: where verl 0.9 is installed with this package.

Mutations, each caught by the test named:
  values at the tokens after a step's start; padding taken for steps          test_advantages_token_by_token
  rewards, or groups, of another row's order                                  test_advantages_token_by_token
  as_dict not wrapped                                                         test_values_travel
  dp_size left out of the normaliser; seq-mean-token-sum over tokens          test_losses_are_those_of_verl
  an option that verl's config has not got, or its checks refuse              test_the_command_on_the_page
  equal neighbours not told apart                                             test_step_ratio_of_equal_neighbours
"""

import asyncio
import json

import numpy as np
import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

import verl  # noqa: E402
from helpers.logprob_server import serving  # noqa: E402
from helpers.rl import make_model, make_tokenizer  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from verl import DataProto  # noqa: E402
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput  # noqa: E402
from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls  # noqa: E402
from verl.trainer.ppo import core_algos, ray_trainer  # noqa: E402
from verl.trainer.ppo.v1 import utils as v1  # noqa: E402

from sspo_ext import StepLayout, policy_loss  # noqa: E402
from sspo_ext.integrations.steps import step_ids_from_advantages  # noqa: E402
from sspo_ext.integrations.verl import NAME, sspo_advantage  # noqa: E402
from sspo_ext.signals import StepValues, combine_advantages, outcome_advantages, step_gae  # noqa: E402

# (values before each step, tokens of each step, masked tokens after the response); rewards; questions
ROWS = [([0.1, 0.4, 0.8], [2, 1, 3]), ([0.2], [4]), ([0.3, 0.3], [1, 1]), ([0.5, 0.25, 0.75, 1.0], [1, 2, 1, 1])]
REWARDS, UID = [1.0, 0.0, 1.0, 0.0], ["b", "b", "a", "a"]
CONFIG = OmegaConf.create({"gamma": 0.9, "lam": 0.8, NAME: {"step_scale": 0.5, "baseline": "grpo"}})


def extra(values, lengths):
    return json.dumps({"starts": np.cumsum([0, *lengths[:-1]]).tolist(), "values": values})


def batch(padding=0.0):
    """A DataProto as the trainer has it, padded as nested tensors are: with zeros."""
    length = max(sum(lengths) for _, lengths in ROWS) + 1
    mask, rewards = torch.zeros(4, length, dtype=torch.int64), torch.zeros(4, length)
    for b, (_, lengths) in enumerate(ROWS):
        mask[b, : sum(lengths)] = 1
        rewards[b, sum(lengths) - 1] = REWARDS[b]
    data = DataProto.from_single_dict({"response_mask": mask, "token_level_rewards": rewards})
    data.non_tensor_batch["uid"] = np.array(UID, dtype=object)
    return data


def wanted():
    """(B, T) by the list forms."""
    values = StepValues.from_lists([[*v, 0.0] for v, _ in ROWS])
    steps = step_gae(values, torch.tensor(REWARDS), gamma=0.9, lam=0.8)
    outcome = outcome_advantages(torch.tensor(REWARDS), "grpo", groups=torch.tensor([1, 1, 0, 0]))
    flat = combine_advantages(steps, outcome, values.step_sequence, step_scale=0.5).tolist()
    out = torch.zeros(4, 7)
    for b, (_, lengths) in enumerate(ROWS):
        row = [flat.pop(0) for _ in lengths]
        out[b, : sum(lengths)] = torch.tensor([a for a, n in zip(row, lengths, strict=True) for _ in range(n)])
    return out


def outputs():
    """What agent loops hand over, with the reward manager's extra info."""
    return [
        AgentLoopOutput(
            prompt_ids=[1, 2], response_ids=[3] * sum(lengths), response_mask=[1] * sum(lengths), num_turns=2,
            metrics=AgentLoopMetrics(), reward_score=REWARDS[b],
            extra_fields={"reward_extra_info": {NAME: extra(values, lengths)}},
        )
        for b, (values, lengths) in enumerate(ROWS)
    ]  # fmt: skip


def test_the_plugin_is_loaded_by_verl():
    assert NAME in core_algos.ADV_ESTIMATOR_REGISTRY and "sspo_sequence" in core_algos.POLICY_LOSS_REGISTRY
    assert v1.compute_advantage is ray_trainer.compute_advantage


@pytest.mark.parametrize("path", ["tensor", "extra info", "v1"])
def test_advantages_token_by_token(path):
    """verl's compute_advantage and its multi-trajectory one: exactly the list forms' numbers."""
    data = batch()
    if path == "extra info":
        data.non_tensor_batch[NAME] = np.array([extra(v, n) for v, n in ROWS])
    else:
        nested = torch.nested.as_nested_tensor([o.as_dict()["values"] for o in outputs()], layout=torch.jagged)
        data.batch["values"] = torch.nn.functional.pad(nested.to_padded_tensor(0.0), (0, 1))
    more = dict(adv_estimator=NAME, gamma=0.9, lam=0.8, num_repeat=2, config=CONFIG)
    if path == "v1":
        found = v1.compute_advantage_for_multi_trajectories(data, batch_keys=["a_0_0"] * 4, **more)
    else:
        found = ray_trainer.compute_advantage(data, **more)
    want = wanted()
    torch.testing.assert_close(found.batch["returns"], want, rtol=1e-6, atol=1e-7)
    difference = (found.batch["advantages"] - want).abs().max().item()
    print(f"{path}: apart by {difference:.3g}")
    assert difference < 2e-7


def test_values_travel():
    """The reward manager's extra info becomes a tensor in the agent loop's output, and other outputs stay theirs."""
    found = [o.as_dict() for o in outputs()]
    assert found[0]["values"].isnan().tolist() == [False, True, False, False, True, True]
    torch.testing.assert_close(found[0]["values"].nan_to_num(), torch.tensor([0.1, 0.0, 0.4, 0.8, 0.0, 0.0]))
    plain = AgentLoopOutput(
        prompt_ids=[1], response_ids=[2], response_mask=[1], num_turns=1, metrics=AgentLoopMetrics(), reward_score=0.0
    )
    assert "values" not in plain.as_dict()


def test_other_estimators_are_untouched():
    found = ray_trainer.compute_advantage(batch(), adv_estimator="rloo", num_repeat=2, config=CONFIG)
    assert found.batch["advantages"].abs().max() > 0
    with pytest.raises(ValueError, match="^values: expected"):
        ray_trainer.compute_advantage(batch(), adv_estimator=NAME, config=CONFIG)


def test_a_step_that_starts_in_a_tools_output():
    data = batch()
    data.batch["values"] = torch.full((4, 7), float("nan"))
    data.batch["values"][:, 0], data.batch["values"][0, 2] = 0.5, 0.25
    data.batch["response_mask"][0, 2:4] = 0
    found = ray_trainer.compute_advantage(data, adv_estimator=NAME, gamma=1.0, lam=0.0, config=OmegaConf.create(
        {NAME: {"combine": "replace"}})).batch["returns"]  # fmt: skip
    torch.testing.assert_close(found[0], torch.tensor([-0.25, -0.25, 0, 0, 0.75, 0.75, 0]))


def actor(mode="token-mean", dual_clip=2.0, **info):
    from verl.workers.config import ActorConfig

    config = ActorConfig(
        strategy="fsdp", rollout_n=2, ppo_micro_batch_size_per_gpu=2, ppo_mini_batch_size=2, clip_ratio=0.2,
        clip_ratio_low=0.15, clip_ratio_high=0.25, clip_ratio_c=dual_clip, loss_agg_mode=mode,
    )  # fmt: skip
    config.global_batch_info.update(info)
    return config


def log_probs():
    g = torch.Generator().manual_seed(0)
    mask = batch().batch["response_mask"].bool()
    old = -torch.rand(4, 7, generator=g) * 2
    return old, (old + torch.randn(4, 7, generator=g) * 0.3).requires_grad_(), mask, wanted()


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    "mode", ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]
)
def test_losses_are_those_of_verl(mode, world):
    """At token level, dual clip and weights of rollouts included: verl's own loss and gradient in every aggregation."""
    old, logp, mask, advantages = log_probs()
    info = {} if world == 1 else {"dp_size": 2, "batch_num_tokens": 31, "global_batch_size": 8, "loss_scale_factor": 5}
    weights = torch.rand(4, 7, generator=torch.Generator().manual_seed(1)) * 1.5
    weights[0, 1] = 0
    found = []
    for name in ("sspo_token", "vanilla"):
        loss, _ = core_algos.get_policy_loss_fn(name)(
            old_log_prob=old, log_prob=logp, advantages=advantages, response_mask=mask, loss_agg_mode=mode,
            config=actor(mode, **info), rollout_is_weights=weights,
        )  # fmt: skip
        found.append((loss.detach(), *torch.autograd.grad(loss, logp)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-7)
    assert found[0][1].abs().max() > 0


def test_loss_at_sequence_level_is_gspo():
    old, logp, mask, advantages = log_probs()
    advantages = advantages[:, :1].expand(4, 7) * mask
    config = actor("seq-mean-token-mean", dual_clip=1e6)  # verl's gspo has none
    found = []
    for name in ("sspo_sequence", "gspo"):
        loss, _ = core_algos.get_policy_loss_fn(name)(
            old_log_prob=old, log_prob=logp, advantages=advantages, response_mask=mask,
            loss_agg_mode="seq-mean-token-mean", config=config,
        )  # fmt: skip
        found.append((loss.detach(), *torch.autograd.grad(loss, logp)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6)


def test_step_ratio_of_equal_neighbours():
    """The loss finds the steps from the advantages alone, of steps with equal advantages too."""
    data = batch()
    data.batch["token_level_rewards"].zero_()
    data.batch["values"] = torch.full((4, 7), float("nan"))
    data.batch["values"][:, 0] = data.batch["values"][:, 1] = data.batch["values"][:, 3] = 0.0
    found = ray_trainer.compute_advantage(data, adv_estimator=NAME, config=CONFIG)
    mask = data.batch["response_mask"]
    assert found.batch["returns"].abs().max() == 0 and found.batch["advantages"].abs().max() < 1e-40
    ids = step_ids_from_advantages(found.batch["advantages"], mask)
    assert ids[0].tolist() == [0, 1, 1, 2, 2, 2, -1] and ids[2].tolist() == [0, 1, -1, -1, -1, -1, -1]
    old, logp, mask, advantages = log_probs()
    layout = StepLayout.from_response(mask, step_ids_from_advantages(advantages, mask))
    want = policy_loss(
        logp, layout, advantages, old=old, loss_type="ppo", importance_sampling_level="step", epsilon=0.15,
        epsilon_high=0.25, delta=2.0,
    )  # fmt: skip
    loss, metrics = core_algos.get_policy_loss_fn(NAME)(
        old_log_prob=old, log_prob=logp, advantages=advantages, response_mask=mask, config=actor()
    )
    torch.testing.assert_close(loss, want.loss)
    assert "actor/ratio/mean" in metrics


def test_reward_manager_probes():
    """run_single as the reward loop calls it: the naive manager's reward, and the values of a server's model."""
    from sspo_ext.signals import StepBatch, probe_step_values

    tokenizer, model = make_tokenizer(), make_model()
    prompt, steps = tokenizer("1+1=\n").input_ids, [tokenizer(t).input_ids for t in ("1+1\n", "=2\n", "#2<eos>")]
    response = [i for step in steps for i in step]

    def score(data_source, solution_str, ground_truth, extra_info, **kwargs):
        return {"score": float(ground_truth in solution_str)}

    data = DataProto.from_single_dict(
        {
            "prompts": torch.tensor([prompt]), "responses": torch.tensor([response]),
            "attention_mask": torch.ones(1, len(prompt) + len(response), dtype=torch.int64),
        }
    )  # fmt: skip
    data.non_tensor_batch.update(
        data_source=np.array(["x"], dtype=object), reward_model=np.array([{"ground_truth": "2"}], dtype=object)
    )
    want = probe_step_values(model, StepBatch([prompt], [steps[:-1]]), "#:", ["2"], tokenizer=tokenizer).to_lists()[0]
    with serving(model) as (url, _):
        config = OmegaConf.create({"algorithm": {NAME: {"probe": "#:", "server": {"url": url}}}})

        async def run():
            return await get_reward_manager_cls(NAME)(config, tokenizer, score).run_single(data)

        found = asyncio.run(run())
    assert found["reward_score"] == 1.0
    extra_info = json.loads(found["reward_extra_info"][NAME])
    assert extra_info["starts"] == [0, 4, 7]
    assert extra_info["values"] == pytest.approx(want, rel=1e-4)


def test_the_command_on_the_page(monkeypatch):
    """docs/integrations.md's main_ppo command, through verl's own config and verl's checks of it."""
    import shlex

    from helpers.paths import DOCS
    from hydra import compose, initialize_config_module
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    block = (DOCS / "integrations.md").read_text().split('```text title="verl.sh"\n')[1].split("```")[0]
    words = shlex.split(block.replace("\\\n", " "))
    assert words[:3] == ["python", "-m", "verl.trainer.main_ppo"]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=words[3:])
    validate_config(config=config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    assert config.algorithm.adv_estimator == config.reward.reward_manager.name == NAME
    assert (config.algorithm[NAME].probe, config.algorithm[NAME].step_scale) == ("####", 0.5)
    assert core_algos.get_adv_estimator_fn(config.algorithm.adv_estimator) is sspo_advantage
    core_algos.get_policy_loss_fn(config.actor_rollout_ref.actor.policy_loss.loss_mode)
    manager = get_reward_manager_cls(config.reward.reward_manager.name)(config, make_tokenizer(), lambda **_: 0.0)
    assert manager.engine.url == "http://127.0.0.1:8000/v1/completions"
    with initialize_config_module("verl.trainer.config", version_base=None), pytest.raises(Exception, match="sspo"):
        compose("ppo_trainer", overrides=[word.removeprefix("+") for word in words[3:]])


def test_another_version_is_refused(monkeypatch):
    from importlib import metadata

    from sspo_ext._versions import check_version

    monkeypatch.setattr(metadata, "version", lambda name: "0.10.1")
    with pytest.raises(ImportError, match=r"^verl: .* tested with 0.9, and 0.10.1 is installed"):
        check_version("verl", "0.9")
    assert verl.__version__.startswith("0.9")
