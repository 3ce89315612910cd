# SPDX-License-Identifier: Apache-2.0
"""SSPOTrainer: ends of turn, references of adapters, what divides the loss, evaluation in batches, composite models,
and what is refused before anything is trained.

All were run on the code without what they ask for. All were red but two, which hold what has to stay:
test_prob_threshold_divides_by_what_counts[sum], test_evaluation_does_not_depend_on_its_batches.
"""

import pytest
import torch

pytest.importorskip("transformers")

from helpers.preference import config as pair_config
from helpers.preference import make_features
from helpers.preference import make_model as make_pair_model
from helpers.rl import PROMPTS, ROWS, config, make_model, make_tokenizer, make_trainer, reward
from helpers.sspo import said

from sspo_ext.train.sspo_trainer import SSPOTrainer


class Completes:
    """A rollout engine that always says the same tokens, and counts the rows of its calls."""

    def __init__(self, ids):
        self.ids, self.calls = ids, []

    def complete(self, model, prompts, sampling, seeds):
        self.calls.append(len(prompts))
        return [self.ids] * len(prompts)


# ---- steps


def test_an_end_of_turn_is_no_step_of_its_own(tmp_path):
    """An end that only the generation config names, as Gemma's <end_of_turn>, behaves as the tokenizer's own."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<eot>"], special_tokens=True)
    end = tokenizer.convert_tokens_to_ids("<eot>")
    model = make_model()
    model.resize_token_embeddings(len(tokenizer))
    model.generation_config.eos_token_id = [1, end]
    found = {}
    for last in (1, end):
        engine = Completes([*tokenizer("1+1=2\n2\n").input_ids, last])
        trainer = make_trainer(tmp_path, model=model, tokenizer=tokenizer, engine=engine)
        (rollout,) = trainer.roll_out(ROWS[:1], [(0,)])
        assert rollout.ended
        found[last] = [len(step) for step in rollout.steps]
    assert found == {1: [6, 3], end: [6, 3]}


# ---- the loss


@pytest.mark.parametrize("aggregation", ["token", "step", "sequence", "sum"])
def test_prob_threshold_divides_by_what_counts(tmp_path, aggregation):
    """The update of one micro-batch is that of step_policy_loss by itself, and accumulation does not change it."""
    options = {
        "loss_type": "ppo", "loss_options": {"prob_threshold": 0.025}, "combine": "outcome", "temperature": 0.5,
        "aggregation": aggregation,
    }  # fmt: skip
    gradients, items = [], []

    def gradient(trainer, batches, number):
        trainer.model.zero_grad()
        for batch in batches:
            trainer.policy_loss(trainer.model, batch, number)[0].loss.backward()
        return torch.cat([p.grad.reshape(-1) for p in trainer.model.parameters()])

    for size in (4, 1):
        trainer = said(
            tmp_path, trainer_class=SSPOTrainer, per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size, **options,
        )  # fmt: skip
        micro, number = trainer._experience([[ROWS[0]] * size] * (4 // size))
        items.append(number)
        gradients.append(gradient(trainer, micro, number))
        if size == 4:
            assert 0 < (micro[0]["old"].exp() < 0.025).sum() < micro[0]["layout"].num_rows
            if aggregation != "sum":
                torch.testing.assert_close(gradients[0], gradient(trainer, micro, None), rtol=1e-5, atol=1e-7)
    assert items[0] == items[1] and gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


# ---- references


def peft_model(trained: bool):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(make_model(), lora)
    for name, p in model.named_parameters():
        if trained and "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.mark.parametrize("trained", [True, False])
def test_reference_of_a_given_peft_model_has_its_adapter(tmp_path, trained):
    model = peft_model(trained)
    trainer = make_trainer(tmp_path, model=model, beta=0.1, max_steps=3)
    reference = trainer.ref_model
    given = {name: p.detach().clone() for name, p in reference.named_parameters()}
    trainer.train()
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[2] > 1e-6
    assert all(torch.equal(p, given[name]) for name, p in reference.named_parameters())
    # the frozen weights are there once
    for (name, ours), (_, theirs) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert (ours is theirs) == ("lora_" not in name), name


def test_an_adapter_over_an_adapter_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="peft_config: expected None for a PeftModel"):
        make_trainer(tmp_path, model=peft_model(False), peft_config=lora)


def test_pair_trainers_reference_of_a_given_peft_model_has_its_adapter(tmp_path):
    from sspo_ext.train.preference_trainer import StepPreferenceTrainer
    from sspo_ext.train.reference_cache import reference_key

    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(make_pair_model(), lora)
    trainer = StepPreferenceTrainer(model, pair_config(tmp_path, max_steps=1), make_features(4), make_features(4))
    metrics = trainer.evaluate()
    assert metrics["eval_rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert metrics["eval_loss"] == pytest.approx(0.6931, abs=1e-3)
    key = reference_key(model, {}, adapters=True)  # another adapter is another reference
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_" in n).add_(1)
    assert reference_key(model, {}, adapters=True) != key
    with pytest.raises(ValueError, match="peft_config: expected None for a PeftModel"):
        StepPreferenceTrainer(model, pair_config(tmp_path), make_features(4), peft_config=lora)


# ---- evaluation


@pytest.mark.parametrize("options,calls", [({}, [3, 3, 1]), ({"rollout_batch_size": 5}, [5, 2])])
def test_evaluation_in_batches(tmp_path, options, calls):
    engine = Completes([5, 1])
    trainer = make_trainer(tmp_path, engine=engine, eval_dataset=ROWS[:7], per_device_eval_batch_size=3, **options)
    metrics = trainer.evaluate()
    assert engine.calls == calls and metrics["eval_completions/mean_length"] == 2


def test_evaluation_does_not_depend_on_its_batches(tmp_path):
    found = [
        make_trainer(tmp_path, eval_dataset=ROWS[:6], per_device_eval_batch_size=size).evaluate() for size in (6, 2)
    ]
    assert found[0] == pytest.approx(found[1])


# ---- what is refused


def test_two_gpus_in_one_process_are_refused(tmp_path):
    """DataParallel, into which Trainer wraps the model: neither trainer runs in it."""
    from sspo_ext.train.preference_trainer import StepPreferenceTrainer

    args = config(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="n_gpu: expected one GPU for each process, got 2.*torchrun"):
        SSPOTrainer(make_model(), args, reward, ROWS, processing_class=make_tokenizer())
    args = pair_config(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="n_gpu: expected one GPU for each process, got 2.*torchrun"):
        StepPreferenceTrainer(make_pair_model(), args, make_features(4))


def test_multiply_is_refused(tmp_path):
    """Step advantages are of both signs: their product with the outcome's would reward what broke an answer."""
    with pytest.raises(ValueError, match="combine: expected one of 'add', 'replace', 'outcome', got 'multiply'"):
        config(tmp_path, combine="multiply")


@pytest.mark.parametrize("scaled", [True, False])
def test_scales_of_the_two_signals(tmp_path, scaled):
    """As the baseline and GAE define them, or each over its deviation; `step_scale` on the steps' alone."""
    trainer = make_trainer(tmp_path, gamma=1.0, lam=0.0, step_scale=2.0, scale_advantages=scaled)
    got = trainer.advantages(
        torch.tensor([1.0, 0.0]), [2, 1], [[0.25, 0.5, 0.0], [0.5, 0.0]], torch.zeros(2, dtype=torch.int64)
    )
    outcome, steps = torch.tensor([1.0, 1.0, -1.0]), torch.tensor([0.25, 0.5, -0.5])  # RLOO of two, progress
    over = (2**0.5, steps.std()) if scaled else (1, 1)
    want = outcome / over[0] + 2 * steps / over[1]
    torch.testing.assert_close(torch.tensor(sum(got, [])), want)


def test_probed_rewards_are_on_the_scale_of_values(tmp_path):
    def verdict(prompt, completion, answer):
        return 1.0 if "2" in completion else -1.0

    with pytest.raises(ValueError, match=r"reward_func: expected a reward in \[0, 1\].*got -1.*combine='outcome'"):
        said(tmp_path, reward_func=verdict, trainer_class=SSPOTrainer).train()
    said(tmp_path, reward_func=verdict, trainer_class=SSPOTrainer, combine="outcome").train()
    said(tmp_path, reward_func=verdict).train()  # values of one's own making have their own scale


def test_options_of_an_engine_that_has_none(tmp_path):
    from sspo_ext.train.rollout import make_engine

    for engine in ("generate", "compact"):
        with pytest.raises(ValueError, match=f"rollout_options: rollout_engine '{engine}' has none, got typo"):
            make_trainer(tmp_path, rollout_engine=engine, rollout_options={"typo": 1})
    with pytest.raises(ValueError, match="rollout_options: expected None beside an engine of your own"):
        make_trainer(tmp_path, engine=Completes([5, 1]), rollout_options={"typo": 1})
    with pytest.raises(ValueError, match="rollout_batch_size: expected None with rollout_engine 'vllm'"):
        make_engine("vllm", make_tokenizer(), rows_at_once=4, model="x")


# ---- answers


@pytest.mark.parametrize("answer", [None, "", "  ", True, [], ["2", ""], ["2", None], {"answer": None}, 1j])
def test_a_bad_answer_is_found_before_training(tmp_path, answer):
    rows = [*ROWS[:4], {"prompt": "9+9=\n", "answer": answer}, {"prompt": "9"}]
    with pytest.raises(
        ValueError, match="train_dataset: 2 of 6 rows cannot be used:\n  row 4: answer: expected a text"
    ):
        make_trainer(tmp_path, rows=rows)
    for other in ({"combine": "outcome"}, {"probe_options": {"mode": "graded"}}):
        make_trainer(tmp_path, rows=rows[:5], **other)  # the answer is the grader's alone
    with pytest.raises(ValueError, match="eval_dataset: 1 of 2 rows cannot be used:\n  row 1: expected 'prompt'"):
        make_trainer(tmp_path, eval_dataset=[ROWS[0], {"answer": "2"}])


def test_several_spellings(tmp_path):
    """V is the probability of any of them, and the graders take any of them."""
    from sspo_ext.data.graders import load_grader

    rows = [{"prompt": PROMPTS[0], "answer": answer} for answer in ("2", ["2"], "3", ["2", 3], {"answer": ["2", "3"]})]
    trainer = said(tmp_path, rows=rows, trainer_class=SSPOTrainer)
    rollouts = trainer.roll_out(rows, [(0,)] * len(rows))
    two, alone, three, both, mapped = (values[:-1] for values in trainer.step_values(rollouts))
    assert two == alone and both == mapped == pytest.approx([a + b for a, b in zip(two, three, strict=True)])
    grader = load_grader("exact")
    assert [grader("", text, ["2", "two"]) for text in ("2", "1\ntwo", "#### three")] == [1.0, 1.0, 0.0]
    said(tmp_path, rows=rows[3:4], trainer_class=SSPOTrainer, reward_func=grader).train()


def test_several_spellings_of_mathematics():
    pytest.importorskip("math_verify")
    from sspo_ext.data.graders import load_grader

    grader = load_grader("math-verify")
    assert [grader("", f"so ${x}$", ["0.5", "2"]) for x in ("\\frac{1}{2}", "2", "3")] == [1.0, 1.0, 0.0]


# ---- models


def test_a_model_of_text_and_images(tmp_path):
    """Its config has the vocabulary, and the balance loss of a mixture of experts, in the text's part."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    tokenizer = make_tokenizer()
    text = dict(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=128, sliding_window=64,
    )  # fmt: skip
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    special = dict.fromkeys(("image_token_index", "boi_token_index", "eoi_token_index"), 3)
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **special)
    )
    with torch.no_grad():
        for p in model.language_model.parameters() if hasattr(model, "language_model") else model.parameters():
            if p.ndim == 2:
                p *= 4
    model.generation_config.eos_token_id = 1
    # transformers 4 logs the norm of gradients only where it clips
    trainer = make_trainer(tmp_path, model=model, tokenizer=tokenizer, max_steps=1, max_grad_norm=1.0)
    assert len(trainer.delimiters) == len(tokenizer)
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0


def test_router_loss_of_a_composite_config():
    from types import SimpleNamespace

    from sspo_ext.train.model_call import router_loss

    text = SimpleNamespace(router_aux_loss_coef=0.5)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))
    assert router_loss(model, SimpleNamespace(aux_loss=torch.tensor(2.0))) == 1.0


# ---- configuration


def test_config_from_the_command_line_of_transformers():
    from transformers import HfArgumentParser

    from sspo_ext.train import SSPOConfig

    words = ["--output_dir", "out", "--probe_options", '{"mode": "graded"}', "--loss_options", '{"delta": 4}']
    words += ["--loss_type", "ppo", "--chat_template_kwargs", '{"enable_thinking": false}', "--probe_end", "\n", "."]
    (args,) = HfArgumentParser(SSPOConfig).parse_args_into_dataclasses([*words, "--use_cpu"])
    assert args.probe_options == {"mode": "graded"} and args.loss_options == {"delta": 4}
    assert args.chat_template_kwargs == {"enable_thinking": False} and args.probe_end == ["\n", "."]
    with pytest.raises(TypeError, match="probe_options: expected a dictionary, or its JSON, got 'graded'"):
        SSPOConfig("out", use_cpu=True, probe_options="graded")


def test_levels_are_checked_at_once(tmp_path):
    level = {"importance_sampling_level": "sequences"}
    with pytest.raises(ValueError, match="importance_sampling_level: expected one of 'token'"):
        config(tmp_path, loss_type="ppo", loss_options=level)
    with pytest.raises(ValueError, match="importance_sampling_level: loss_type 'reinforce' has no ratio"):
        config(tmp_path, loss_options={"importance_sampling_level": "sequence"})


def test_several_ends_of_an_answer(tmp_path):
    found = {}
    for ends in ("<eos>", "\n", ["<eos>", "\n"]):
        trainer = said(tmp_path, trainer_class=SSPOTrainer, probe_end=ends)
        found[str(ends)] = trainer.step_values(trainer.roll_out(ROWS[:1], [(0,)]))[0][:-1]
    one, other, both = found.values()
    assert both == pytest.approx([a + b for a, b in zip(one, other, strict=True)], rel=1e-5)


def test_probe_in_a_turn_of_the_users_and_options_of_the_template(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}{{ 'b:' if brief else 'a:' }}"
    )
    rows = [{"prompt": [{"role": "user", "content": "1+1"}], "answer": "2"}]
    values = {}
    for turn in (False, True):
        trainer = make_trainer(
            tmp_path, tokenizer=tokenizer, rows=rows, engine=Completes(tokenizer("1+1\n2<eos>").input_ids),
            probe_turn=turn, chat_template_kwargs={"brief": True},
        )  # fmt: skip
        (rollout,) = trainer.roll_out(rows, [(0,)])
        assert tokenizer.decode(rollout.prompt_ids).endswith("b:")
        (values[turn],) = trainer.step_values([rollout])
    assert values[True] != values[False]


def test_names_of_the_package():
    import sspo_ext.train as package

    assert all(callable(getattr(package, name)) for name in package.__all__)
    assert package.SSPOTrainer is SSPOTrainer and "SSPOTrainer" in dir(package)
    with pytest.raises(AttributeError, match="has no attribute 'SSPOTrainers'"):
        package.SSPOTrainers  # noqa: B018
