# SPDX-License-Identifier: Apache-2.0
"""What SSPOTrainer and its rollouts are given: rows, options, models, end tokens. What has no effect is refused.

Mutations that turned a test red: see each test's name; the cache's length not looked at, the model's generation_config
left as it is, unfinished completions worth 0 whatever the scale, end of sequence left in the text, prompts told apart
by str(), the probe's own ends and turn overwritten, the template's options not handed to the probe.
"""

import pytest
import torch

pytest.importorskip("transformers")
from helpers.rl import ROWS, Says, config, make_model, make_tokenizer, make_trainer

from sspo_ext.signals.probing.texts import Probe
from sspo_ext.train.rollout import CompactEngine, GenerateEngine
from sspo_ext.train.sampling import Sampling
from sspo_ext.train.sspo_trainer import SSPOTrainer

PROMPTS, SEEDS = [[5, 6, 7], [8, 9]], [(0,), (1,)]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% if quiet %}##{% endif %}{% endif %}"
)


# ---- rollouts


def test_compact_refuses_a_model_that_forgets():
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**shape, pad_token_id=0, eos_token_id=1)).eval()
    sampling = Sampling(max_completion_length=4, eos_token_ids=(1,))
    with pytest.raises(
        ValueError, match="rollout_engine: 'compact' needs a model that keeps its context.*Mamba.*a state instead"
    ):
        CompactEngine(0).complete(model, PROMPTS, sampling, SEEDS)
    assert len(GenerateEngine(0).complete(model, PROMPTS, sampling, SEEDS)) == 2


def test_compact_refuses_virtual_tokens():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="rollout_engine: 'compact' needs.*Llama.*virtual tokens"):
        CompactEngine(0).complete(model.eval(), PROMPTS, Sampling(4, (1,)), SEEDS)


def test_virtual_tokens_are_not_the_texts(tmp_path):
    """Prompt tuning, whose logits begin with those of its virtual tokens: the loss of one update by hand."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    tuned = peft.get_peft_model(make_model(), peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    tokenizer, kept, losses = make_tokenizer(), [], []
    trainer = make_trainer(
        tmp_path, model=tuned, tokenizer=tokenizer, engine=Says(tokenizer, ["2<eos>", "3<eos>", "1\n2<eos>", "3"]),
        rows=ROWS[:1], route="logits", combine="outcome", max_steps=1, learning_rate=0.0,
    )  # fmt: skip
    trainer.on_rollouts = kept.extend
    trainer.train()
    for r in kept:
        ids = torch.tensor([r.prompt_ids + r.completion_ids])
        logits = tuned(input_ids=ids, use_cache=False).logits[0, 3:][:-1].log_softmax(-1)
        logps = logits.gather(1, ids[0, 1:, None])[len(r.prompt_ids) - 1 :, 0]
        losses.append(-(logps * torch.tensor([a for step, a in zip(r.steps, r.advantages, strict=True) for _ in step])))
    assert trainer.state.log_history[0]["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)


@pytest.mark.parametrize(
    "name, value",
    [("min_length", 9), ("suppress_tokens", list(range(2, 20))), ("no_repeat_ngram_size", 1), ("bad_words_ids", [[7]]),
     ("sequence_bias", [[[7], 9.0]]), ("forced_eos_token_id", 1), ("repetition_penalty", 3.0)],
)  # fmt: skip
def test_the_models_generation_config_changes_nothing(name, value):
    model, sampling = make_model(scale=2.0).eval(), Sampling(max_completion_length=8, eos_token_ids=(1, 4))
    plain = GenerateEngine(0).complete(model, PROMPTS, sampling, SEEDS)
    setattr(model.generation_config, name, value)
    model.generation_config.return_dict_in_generate = True
    assert GenerateEngine(0).complete(model, PROMPTS, sampling, SEEDS) == plain


# ---- rewards


@pytest.mark.parametrize("low, expected", [(-1.0, -1.0), (0.25, 0.0)])
def test_never_to_end_is_no_better_than_the_worst(tmp_path, low, expected):
    def reward(prompt, completion, answer):
        return 1.0 if completion == "2" else low

    tokenizer, kept = make_tokenizer(), []
    trainer = make_trainer(
        tmp_path, tokenizer=tokenizer, rows=ROWS[:1], engine=Says(tokenizer, ["2<eos>", "3<eos>", "3<eos>", "2222"]),
        reward_func=reward, combine="outcome", max_steps=1,
    )  # fmt: skip
    trainer.on_rollouts = kept.extend
    trainer.train()
    by_text = {r.text: r for r in kept}
    assert [by_text[t].reward for t in ("2", "3", "2222")] == [1.0, low, expected]
    assert by_text["2222"].advantages[0] <= by_text["3"].advantages[0] < 0 < by_text["2"].advantages[0]


def test_an_end_that_is_no_special_token_is_not_graded(tmp_path):
    tokenizer, model = make_tokenizer(), make_model()
    end = tokenizer.convert_tokens_to_ids("f")
    model.generation_config.eos_token_id = [1, end]
    trainer = make_trainer(tmp_path, model=model, tokenizer=tokenizer, engine=Says(tokenizer, ["2f", "2<eos>"]))
    rollouts = trainer.roll_out(ROWS[:2], [(0,), (1,)])
    assert [(r.text, r.ended) for r in rollouts] == [("2", True)] * 2 and rollouts[0].completion_ids[-1] == end


@pytest.mark.parametrize("given", (None, "exact", [lambda *a: 1.0, "exact"]))
def test_reward_func_is_a_function_or_several(tmp_path, given):
    with pytest.raises(TypeError, match="reward_func: expected a function, or a list of them, got"):
        make_trainer(tmp_path, reward_func=given)


# ---- rows


def test_a_text_is_not_the_messages_it_spells(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    messages = [{"role": "user", "content": "1"}]
    trainer = make_trainer(tmp_path, tokenizer=tokenizer, engine=Says(tokenizer, ["2<eos>"]))
    rows = [{"prompt": prompt, "answer": "2"} for prompt in (messages, str(messages))]
    chat, text = trainer.roll_out(rows, [(0,), (1,)])
    assert len(text.prompt_ids) > 2 * len(chat.prompt_ids)


@pytest.mark.parametrize("prompt", (None, 3, "", [], [{"content": "1"}], ["1"]))
@pytest.mark.parametrize("chat", (True, False))
def test_prompts_are_looked_at_before_training(tmp_path, prompt, chat):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE if chat else None
    rows = [*ROWS[:2], {"prompt": prompt, "answer": "2"}]
    with pytest.raises(
        ValueError, match="train_dataset: 1 of 3 rows cannot be used:\n  row 2: prompt: expected a text"
    ):
        make_trainer(tmp_path, rows=rows, tokenizer=tokenizer)


def test_an_end_that_the_tokenizer_adds_is_no_part_of_a_prompt():
    from tokenizers.processors import TemplateProcessing

    from sspo_ext.data.prompts import prompt_tokens

    tokenizer = make_tokenizer()
    plain = tokenizer("1+2=").input_ids
    assert prompt_tokens("1+2=", tokenizer) == plain
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        "<pad> $A <eos>", special_tokens=[("<pad>", 0), ("<eos>", 1)]
    )
    assert tokenizer("1+2=").input_ids == [0, *plain, 1]
    assert prompt_tokens("1+2=", tokenizer) == [0, *plain]


def test_messages_need_a_template(tmp_path):
    rows = [*ROWS, {"prompt": [{"role": "user", "content": "1"}], "answer": "2"}]
    with pytest.raises(ValueError, match="prompt: expected a text, since the tokenizer has no chat template"):
        make_trainer(tmp_path, rows=rows)


def test_one_evaluation_set(tmp_path):
    with pytest.raises(ValueError, match="eval_dataset: expected rows with a length.*dict"):
        make_trainer(tmp_path, eval_dataset={"a": ROWS})


def test_prompt_files_that_are_no_text(tmp_path):
    from sspo_ext.data.prompts import load_prompt_rows

    file = tmp_path / "rows.jsonl"
    file.write_bytes('\ufeff{"prompt": "问", "answer": 1}\n'.encode() + b'{"prompt": "\xff", "answer": 1}\n')
    with pytest.raises(ValueError, match="1 of 2 rows cannot be used:\n.*rows.jsonl:2"):
        load_prompt_rows([str(file)])


# ---- options


@pytest.mark.parametrize(
    "options, message",
    [
        ({"probe_options": {"grader": len}}, "probe_options: expected no 'grader'"),
        ({"probe_options": {"tokenizer": len}}, "probe_options: expected no 'tokenizer'"),
        (
            {"probe_options": {"samples": 3}},
            "probe_options: expected some of mode, reduce, .*, got 'samples'",
        ),
        ({"probe_options": {"reduce": "max"}}, "probe_options: reduce: expected one of"),
        ({"probe_options": {"num_samples": 3}}, "probe_options: num_samples: has no effect with mode 'likelihood'"),
        ({"probe_options": {"mode": "graded", "reduce": "mean"}}, "probe_options: reduce: has no effect"),
        ({"probe_options": {"mode": "graded", "engine": "packed"}}, "probe_options: engine: expected one of 'auto'"),
        ({"temperature": 0.0}, "temperature: expected a finite number above 0, got 0.0"),
        ({"top_p": 0.0}, "top_p: expected a finite number above 0"),
        ({"top_p": 1.5}, r"top_p: expected a number in \(0, 1\], got 1.5"),
        ({"top_k": -1}, "top_k: expected a whole number of at least 0, got -1"),
        ({"max_completion_length": 0}, "max_completion_length: expected a whole number of at least 1, got 0"),
        ({"rollout_engine": "trt"}, "rollout_engine: expected one of 'auto', 'compact', 'generate'"),
        ({"kl_estimator": "k4"}, "kl_estimator: expected one of 'k1'"),
        ({"split_by": "numbered"}, "split_by: 'numbered'"),
        ({"split_by": "newlines"}, "'newlines' is none of"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: expected 0"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size, split_batches: expected False"),
        ({"accelerator_config": {"split_batches": True}}, "auto_find_batch_size, split_batches: expected False"),
        ({"rollout_batch_size": 0}, "rollout_batch_size: expected at least 1, or None, got 0"),
        ({"num_generations": 1, "combine": "outcome"}, "num_generations: expected at least 2"),
    ],
)
def test_options_without_effect_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_a_turn_needs_a_template(tmp_path):
    with pytest.raises(ValueError, match="probe_turn: expected a tokenizer with a chat template"):
        make_trainer(tmp_path, probe_turn=True)


def test_predict_names_evaluate(tmp_path):
    with pytest.raises(NotImplementedError, match=r"predict: expected evaluate\(dataset\)"):
        make_trainer(tmp_path).predict(ROWS)


def test_one_completion_a_prompt_where_something_is_learnt(tmp_path):
    config(tmp_path, num_generations=1)
    config(tmp_path, num_generations=1, combine="outcome", baseline="reinforce")


@pytest.mark.parametrize("name", ("compute_metrics", "compute_loss_func"))
def test_functions_without_effect_are_refused(tmp_path, name):
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match=f"{name}: expected None, since the trainer has its own"):
        SSPOTrainer(make_model(), config(tmp_path), len, ROWS, processing_class=tokenizer, **{name: len})


def test_a_probes_own_ends_and_turn(tmp_path):
    probe = Probe("#", ends=("\n", "<eos>"), turn=True)
    assert config(tmp_path, probe=probe).asked == probe
    assert config(tmp_path, probe=probe, probe_end="b").asked.ends == ("b",)
    assert config(tmp_path, probe="#", probe_turn=True, probe_end=["a", ""]).asked == Probe(
        "#", ends=("a", ""), turn=True
    )


def test_the_probes_turn_has_the_prompts_options(tmp_path, monkeypatch):
    """A template that opens a turn to think would hide the answer from a probe that does not say otherwise."""
    tokenizer, asked = make_tokenizer(), []
    tokenizer.chat_template = TEMPLATE
    rows = [{"prompt": [{"role": "user", "content": "1"}], "answer": "2"}]
    trainer = make_trainer(
        tmp_path, rows=rows, tokenizer=tokenizer, engine=Says(tokenizer, ["1\n2<eos>"]), probe_turn=True,
        chat_template_kwargs={"quiet": True},
    )  # fmt: skip
    real = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, **k: asked.append(real(*a, **k)) or asked[-1])
    trainer.step_values(trainer.roll_out(rows, [(0,)]))
    texts = [text if isinstance(text, str) else tokenizer.decode(text) for text in asked]
    assert len(texts) > 1 and all("a:##" in text.replace(" ", "") for text in texts)


def test_columns_of_any_name_reach_a_graded_probe(tmp_path):
    seen = []

    def reward(completions, text, completion, grader, **columns):
        seen.append((text, completion, grader))
        return [0.5] * len(completions)

    tokenizer = make_tokenizer()
    trainer = make_trainer(
        tmp_path, tokenizer=tokenizer, reward_func=reward, engine=Says(tokenizer, ["1\n2<eos>"]),
        probe_options={"mode": "graded", "num_samples": 1, "max_answer_tokens": 1},
    )  # fmt: skip
    row = {**ROWS[0], "text": 1, "completion": 2, "grader": 3}
    values = trainer.step_values(trainer.roll_out([row], [(0,)]))
    assert values == [[0.5, 0.5, 0.0]] and set(map(str, seen)) == {"([1], [2], [3])"}


def test_columns_do_not_depend_on_which_row_ends(tmp_path):
    seen = []

    def reward(completions, weight, **columns):
        seen.append(weight)
        return [1.0] * len(completions)

    tokenizer = make_tokenizer()
    trainer = make_trainer(tmp_path, tokenizer=tokenizer, reward_func=reward, engine=Says(tokenizer, ["2<eos>", "2"]))
    trainer.roll_out([ROWS[0], {**ROWS[0], "weight": 3.0}], [(0,), (1,)])
    assert seen == [[None]]
