# SPDX-License-Identifier: Apache-2.0
"""Both trainers with shared prefixes: the updates are those of separate sequences, and what pays is shared."""

import itertools

import pytest
import torch

pytest.importorskip("transformers")

from helpers import rl
from helpers.preference import config, make_features, make_model, parameters

from sspo_ext.data.collator import StepPreferenceCollator
from sspo_ext.data.sharing import PrefixSharing
from sspo_ext.layout.tree import TokenTree
from sspo_ext.train.experience import Rollout, micro_batches
from sspo_ext.train.preference_trainer import StepPreferenceTrainer
from sspo_ext.tree import UnsupportedTree, tree_attention


def branches(rows=8):
    """Step pairs of two questions: rows of one question have common beginnings, and some are the same."""
    features = make_features(rows, seed=3)
    for number, feature in enumerate(features):
        shared = [7, 8, 9, 10, 11 + number % 2, 12][: 6 - number % 3]
        for side in ("chosen", "rejected"):
            feature[f"{side}_input_ids"] = shared + feature[f"{side}_input_ids"]
            feature[f"{side}_labels"] = [-100] * len(shared) + feature[f"{side}_labels"]
            feature[f"{side}_step_ids"] = [-1] * len(shared) + feature[f"{side}_step_ids"]
    # a rejected response that begins as the chosen one does: its first step is scored by both
    for feature in features[::2]:
        k = feature["chosen_step_ids"].count(0)
        start = feature["chosen_step_ids"].index(0)
        cut = start + feature["rejected_step_ids"].count(0)
        for name in ("input_ids", "labels", "step_ids"):
            own, other = feature[f"rejected_{name}"], feature[f"chosen_{name}"]
            feature[f"rejected_{name}"] = other[: start + k] + own[cut:]
    features[-1] = {**features[-2], "source": "again"}
    return features


def trained(folder, sharing, peft_config=None, **options):
    """A trainer after its updates, and the shapes that the model was given."""
    options = {"per_device_train_batch_size": 4, "max_steps": 3, **options}
    model = make_model()
    if options.pop("checkpointing", False):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer = StepPreferenceTrainer(
        model, config(folder, prefix_sharing=sharing, **options), branches(), peft_config=peft_config
    )
    shapes = []
    hook = trainer.model.get_input_embeddings().register_forward_pre_hook(lambda m, args: shapes.append(args[0].shape))
    trainer.train()
    hook.remove()
    return trainer, shapes


@pytest.mark.parametrize(
    "options",
    [
        {}, {"route": "logits"}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"packing": True}, {"reference_free": True, "loss_type": ["ipo"]}, {"backend": "auto"},
        {"backend": "auto", "route": "logits"}, {"checkpointing": True},
    ],
    ids=str,
)  # fmt: skip
def test_the_updates_are_those_of_separate_sequences(tmp_path, options):
    apart, own = trained(tmp_path / "apart", False, **options)
    shared, trees = trained(tmp_path / "shared", True, **options)
    assert sum(map(torch.Size.numel, trees)) < 0.9 * sum(map(torch.Size.numel, own))
    torch.testing.assert_close(parameters(shared), parameters(apart), rtol=2e-5, atol=2e-6)
    assert (parameters(apart) - parameters(make_model())).abs().max() > 0.01
    losses = [[line["loss"] for line in t.state.log_history if "loss" in line] for t in (apart, shared)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-6)


def test_an_adapter_and_its_reference(tmp_path):
    peft = pytest.importorskip("peft")

    def lora():
        torch.manual_seed(5)
        return peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)

    found = {}
    for sharing in (False, True):
        torch.manual_seed(1)
        trainer, _ = trained(tmp_path / str(sharing), sharing, peft_config=lora(), learning_rate=0.01)
        found[sharing] = parameters(trainer.model), trainer.train_dataset[0]["ref_chosen"]
    torch.testing.assert_close(found[True][0], found[False][0], rtol=2e-5, atol=2e-6)
    assert found[True][1] == pytest.approx(found[False][1], rel=1e-5)


def test_the_evaluation_is_that_of_separate_sequences(tmp_path):
    found = {}
    for sharing in (False, True):
        args = config(tmp_path / str(sharing), prefix_sharing=sharing, per_device_eval_batch_size=4)
        trainer = StepPreferenceTrainer(make_model(), args, branches(), branches(6))
        with torch.no_grad():
            for p in trainer.model.parameters():
                p.mul_(1.01)
        found[sharing] = trainer.evaluate()
    for name in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen"):
        assert found[True][name] == pytest.approx(found[False][name], rel=1e-4), name


def test_auto_shares_where_it_pays(tmp_path):
    """Long prompts in front of short responses; and prompts of a token or two, where padding decides."""
    trainer = StepPreferenceTrainer(make_model(), config(tmp_path), branches())
    long = make_features(4)
    for feature in long:
        for side, (name, value) in itertools.product(
            ("chosen", "rejected"), (("input_ids", 5), ("labels", -100), ("step_ids", -1))
        ):
            feature[f"{side}_{name}"] = [value] * 40 + feature[f"{side}_{name}"]
    assert "tree" in trainer.data_collator(long)
    apart = make_features(1)[0]
    for side, ids in (("chosen", [3, 4, 5, 6]), ("rejected", [9, 10, 11, 12])):
        apart |= {f"{side}_input_ids": ids, f"{side}_labels": [-100, *ids[1:]], f"{side}_step_ids": [-1, 0, 0, 0]}
    assert "tree" not in trainer.data_collator([apart])
    trainer.data_collator.sharing = PrefixSharing(always=True)
    assert "tree" in trainer.data_collator([apart])


class TestCost:
    def test_a_long_common_prompt_is_one_row_and_a_short_one_is_not(self):
        """2,000 tokens in front of 4 x 100: one row. 10 in front of 4 x 1,000: attention would meet 4,000 keys."""
        sharing = PrefixSharing(always=True, token_cost=3000)

        def shape(prompt, length):
            return sharing.tree(
                [torch.tensor([*range(prompt), *([prompt + b] * length)]) for b in range(4)], [0] * 4
            ).shape  # fmt: skip

        assert shape(2000, 100) == (1, 2400)
        assert shape(10, 1000) == (4, 1010)

    @pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
    def test_the_cheapest_of_many(self, attention):
        """No other budget of a row is cheaper, and the count is of products with pairs that are computed."""
        sharing = PrefixSharing(token_cost=100, attention=attention)
        ids = [torch.tensor([1, 2, 3, 4, 5, *([b] * (4 + b))]) for b in range(6)]
        tree = TokenTree.from_sequences(ids)
        seen = (tree.position_ids + 1)[tree.parent != -2].sum().item()
        pairs = {"sdpa": tree.input_ids.numel() * tree.shape[1], "flex_attention": seen}[attention]
        assert sharing.cost(tree) == 100 * tree.input_ids.numel() + pairs
        best = sharing.tree(ids, [0] * 6)
        assert sharing.cost(best) <= min(
            sharing.cost(TokenTree.from_sequences(ids, max_tokens=n)) for n in (len(tree.input_ids[0]), 22, 14)
        )

    def test_one_row(self):
        ids = [torch.tensor([1, 2, 3, b]) for b in range(4)] + [torch.tensor([9, 8])]
        tree = PrefixSharing(always=True, one_row=True).tree(ids, [0, 0, 0, 0, 1])
        assert tree.shape == (1, 9)


# ---- policy optimisation


def rollouts(prompts=3, group=4):
    generator = torch.Generator().manual_seed(0)

    def draw(n, low=2, high=20):
        return torch.randint(low, high, (n,), generator=generator).tolist()

    found = []
    for number in range(prompts):
        prompt, beginning = draw(9 + number), draw(3)
        for k in range(group):
            steps = [beginning, *(draw(1 + (k + j) % 4) for j in range(k % 3))]
            found.append(
                Rollout(
                    {}, prompt, sum(steps, []), "", True, steps, advantages=[0.5 - k + j for j in range(len(steps))]
                )
            )
    return found


@pytest.mark.parametrize("size", [4, 5, 12])
@pytest.mark.parametrize("route", ["linear", "logits"])
@pytest.mark.parametrize(
    "loss", [{}, {"loss_type": "ppo", "beta": 0.1, "num_iterations": 2, "aggregation": "step"}], ids=["plain", "ppo"]
)
def test_the_gradient_of_an_update(tmp_path, size, route, loss):
    found = {}
    for sharing in (False, True):
        trainer = rl.make_trainer(tmp_path, prefix_sharing=sharing, route=route, **loss)
        batches = micro_batches(rollouts(), size, trainer.pad_token_id, trainer.sharing)
        assert all(("tree" in batch) == sharing for batch in batches)
        if loss:
            with torch.no_grad():
                for p in trainer.ref_model.parameters():
                    p.mul_(1.1)
        for batch in batches:
            trainer._add_log_probs(batch)
            if loss:
                tokens = batch["input_ids"].flatten()[batch["layout"].places]
                batch["old"] = batch["old"] - 0.2 * tokens.remainder(3) + 0.1
            trainer.policy_loss(trainer.model, batch, 10.0)[0].loss.backward()
        tokens = sum(batch["input_ids"].numel() for batch in batches)
        found[sharing] = torch.cat([p.grad.reshape(-1) for p in trainer.model.parameters()]), tokens
    torch.testing.assert_close(found[True][0], found[False][0], rtol=1e-4, atol=1e-5)
    assert found[True][1] < 0.8 * found[False][1]
    assert found[False][0].abs().max() > 0.1


def test_rollouts_of_a_prompt_share_a_micro_batch():
    batches = micro_batches(rollouts(), 4, 0, PrefixSharing(always=True, token_cost=1e6))
    assert [batch["tree"].num_sequences for batch in batches] == [4, 4, 4]
    assert all(int((batch["tree"].parent == -1).sum()) == 1 for batch in batches)


def test_probes_share_the_prompt_of_a_group(tmp_path):
    """The values are those of chains by themselves, from fewer tokens; an engine of one's own choice is kept."""
    found = {}
    for sharing, options in ((False, {}), (True, {}), (True, {"probe_options": {"engine": "cached"}})):
        trainer = rl.make_trainer(tmp_path, prefix_sharing=sharing, **options)
        some = rollouts()
        for rollout in some:
            rollout.row = rl.ROWS[0]
        trainer.step_values(some)
        shapes = []
        hook = trainer.model.get_input_embeddings().register_forward_pre_hook(lambda m, a, s=shapes: s.append(a[0]))
        values = trainer.step_values(some)
        hook.remove()
        found[sharing, len(options)] = torch.tensor(sum(values, [])), sum(ids.numel() for ids in shapes)
    apart, shared, cached = found[False, 0], found[True, 0], found[True, 1]
    torch.testing.assert_close(shared[0], apart[0], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(cached[0], apart[0], rtol=1e-4, atol=1e-7)
    assert shared[1] < 0.8 * apart[1]


def test_a_training_run_is_that_of_separate_rollouts(tmp_path):
    found = {}
    for sharing in (False, True):
        trainer = rl.make_trainer(tmp_path, prefix_sharing=sharing, max_steps=2, learning_rate=0.01)
        trainer.train()
        found[sharing] = parameters(trainer.model)
    torch.testing.assert_close(found[True], found[False], rtol=1e-4, atol=1e-5)


# ---- models that cannot


def test_a_model_that_cannot_is_named_or_left_alone(tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    def mamba():
        return MambaForCausalLM(MambaConfig(vocab_size=61, hidden_size=16, state_size=4, num_hidden_layers=1))

    with pytest.raises(UnsupportedTree, match="prefix_sharing: Mamba.*use prefix_sharing=False"):
        StepPreferenceTrainer(mamba(), config(tmp_path, prefix_sharing=True), make_features(4))
    assert StepPreferenceTrainer(mamba(), config(tmp_path), make_features(4)).sharing is None


def test_auto_keeps_the_models_attention_on_a_gpu(tmp_path, monkeypatch):
    """FlexAttention compiles for each shape. What stands in for SDPA is for CPUs."""
    assert StepPreferenceTrainer(make_model(), config(tmp_path), make_features(4)).sharing.attention == "sspo_tree"
    monkeypatch.setattr("sspo_ext.train.model_call.model_device", lambda model: torch.device("cuda"))
    assert StepPreferenceTrainer(make_model(), config(tmp_path), make_features(4)).sharing.attention == "sdpa"
    model = make_model()
    model.set_attn_implementation("eager")
    assert StepPreferenceTrainer(model, config(tmp_path), make_features(4)).sharing.attention == "eager"


def test_the_first_process_decides(monkeypatch):
    """Another one may have no weights yet; afterwards it must not refuse what the first one does."""
    from sspo_ext.signals import why_not
    from sspo_ext.train.model_call import choose_sharing

    model = make_model()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.nan)
    name = "sspo_ext.train.model_call.broadcast_object_list"
    monkeypatch.setattr(name, lambda mine: [("sspo_tree", None)] if mine[0][0] is None else pytest.fail("no NaN"))
    assert choose_sharing(model, "auto").attention == "sspo_tree"
    model.load_state_dict(weights)
    with torch.no_grad():
        assert why_not(model, "shared") is None
    with tree_attention(model) as attention:
        assert attention == "sspo_tree"


def test_a_collator_of_ones_own_makes_the_batches(tmp_path):
    args = config(tmp_path, prefix_sharing=True)
    with pytest.raises(ValueError, match="prefix_sharing: expected 'auto' or False beside a data_collator"):
        StepPreferenceTrainer(make_model(), args, make_features(4), data_collator=StepPreferenceCollator(0))
    with pytest.raises(ValueError, match="prefix_sharing: expected one of"):
        StepPreferenceTrainer(make_model(), config(tmp_path, prefix_sharing="always"), make_features(4))
