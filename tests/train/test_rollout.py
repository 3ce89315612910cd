# SPDX-License-Identifier: Apache-2.0
"""Rollout engines and graders."""

import pytest
import torch

pytest.importorskip("transformers")

from helpers.rl import make_model, make_tokenizer

from sspo_ext.data.graders import final_text, grade, load_grader
from sspo_ext.data.prompts import prompt_tokens
from sspo_ext.train.rollout import CompactEngine, GenerateEngine, make_engine, up_to_end
from sspo_ext.train.sampling import Sampling

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [5, 6], [20, 3, 4]]
SEEDS = [(0, i) for i in range(len(PROMPTS))]


def sampling(**options):
    return Sampling(**{"max_completion_length": 10, "eos_token_ids": (1, 4), **options})


@pytest.fixture(scope="module")
def model():
    return make_model(scale=2.0).eval()


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"temperature": 0.7, "top_k": 5}, {"top_p": 0.6}])
def test_engines_draw_the_same(model, options):
    engines = (GenerateEngine(0), CompactEngine(0))
    generate, compact = (engine.complete(model, PROMPTS, sampling(**options), SEEDS) for engine in engines)
    assert generate == compact
    assert len({len(c) for c in generate}) > 1  # some rows ended before others
    for ids in generate:
        assert len(ids) == 10 or ids[-1] in (1, 4)
        assert not {1, 4} & set(ids[:-1])


@pytest.mark.parametrize("engine", [GenerateEngine, CompactEngine])
def test_a_row_depends_on_nothing_beside_it(model, engine):
    whole = engine(0).complete(model, PROMPTS, sampling(), SEEDS)
    assert engine(0, rows_at_once=2).complete(model, PROMPTS, sampling(), SEEDS) == whole
    torch.rand(3)  # nor on torch's random state
    back = engine(0).complete(model, PROMPTS[::-1], sampling(), SEEDS[::-1])
    assert back[::-1] == whole
    other = engine(0).complete(model, PROMPTS, sampling(), [(1, i) for i in range(5)])
    assert other != whole


def test_what_is_drawn_has_the_models_distribution(model):
    """First tokens of 4000 rows against the softmax at that temperature."""
    n = 4000
    drawn = CompactEngine(0).complete(
        model, [PROMPTS[0]] * n, sampling(max_completion_length=1, temperature=1.5), [(7, i) for i in range(n)]
    )
    counts = torch.bincount(torch.tensor([ids[0] for ids in drawn]), minlength=model.config.vocab_size)
    p = (model(torch.tensor([PROMPTS[0]])).logits[0, -1] / 1.5).softmax(-1)
    assert ((counts / n - p).abs() < 4.5 * (p * (1 - p) / n).sqrt() + 1e-9).all()


def test_greedy_is_hugging_faces(model):
    found = CompactEngine(0).complete(model, PROMPTS[:1], sampling(temperature=0.0), SEEDS[:1])[0]
    expected = model.generate(
        torch.tensor(PROMPTS[:1]), max_new_tokens=10, do_sample=False, eos_token_id=[1, 4], pad_token_id=0
    )[0, 3:].tolist()
    assert found == up_to_end(expected, (1, 4))


def test_what_is_refused():
    with pytest.raises(
        ValueError, match="rollout_engine: expected one of 'auto', 'compact', .*, 'vllm', 'vllm_server', got 'hf'"
    ):
        make_engine("hf", make_tokenizer())
    for bad, message in (({"temperature": -1.0}, "temperature: "), ({"top_p": 0.0}, "top_p: expected a number in"),
                         ({"max_completion_length": 0}, "max_completion_length: expected at least 1")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            sampling(**bad)
    with pytest.raises(ValueError, match="seeds: expected one for each of 5 prompts, got 2"):
        GenerateEngine(0).complete(None, PROMPTS, sampling(), SEEDS[:2])


def test_vllm_says_what_is_missing():
    try:
        import vllm  # noqa: F401
    except ImportError:
        with pytest.raises(ModuleNotFoundError, match="vllm"):
            make_engine("vllm", make_tokenizer(), model="x")


def test_prompts():
    tokenizer = make_tokenizer()
    assert prompt_tokens("1+1", tokenizer) == tokenizer("1+1").input_ids
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}:{% endfor %}"
    assert prompt_tokens([{"role": "user", "content": "1+1"}], tokenizer) == tokenizer("1+1:").input_ids
    with pytest.raises(ValueError, match="prompt: expected at least one token"):
        prompt_tokens("", tokenizer)


# ---- graders


@pytest.mark.parametrize(
    "completion,expected",
    [
        ("1\n#### 26", 1.0),
        ("#### 25\n####  26 ", 1.0),
        ("#### 26 or so", 0.0),
        ("first\n26", 1.0),
        ("26\nlast", 0.0),
        ("", 0.0),
    ],
)
def test_exact(completion, expected):
    assert load_grader("exact")("", completion, "26") == expected
    assert load_grader("exact")("", completion, 26) == expected


def test_exact_with_another_marker():
    grader = load_grader("exact:答案")
    assert grader("", "想想🙂\n答案 二十六", "二十六") == 1.0 and grader("", "答案 25", "26") == 0.0
    assert final_text("a\n答案:3\n", "答案:") == "3"


def test_own_function_and_mistakes():
    assert load_grader("helpers.rl:reward")("", "abc", "") == 0.75
    with pytest.raises(ValueError, match="grader: expected 'exact'"):
        load_grader("exakt")
    with pytest.raises(ValueError, match="has no function 'nothing'"):
        load_grader("helpers.rl:nothing")
    with pytest.raises(ModuleNotFoundError):
        load_grader("no_such_module:f")
    with pytest.raises(TypeError, match="answer: expected a text"):
        load_grader("exact")("", "x", None)
    with pytest.raises(TypeError, match="grader: expected a number, got None"):
        grade(lambda *a: None, "", "x", "y")


def test_math_verify():
    pytest.importorskip("math_verify")
    grader = load_grader("math-verify")
    assert grader("", "so it is $\\frac{1}{2}$", "0.5") == 1.0 and grader("", "so it is $2$", "0.5") == 0.0


def test_reasoning_gym():
    gym = pytest.importorskip("reasoning_gym")
    entry = gym.create_dataset("chain_sum", size=1, seed=3)[0]
    grader = load_grader("reasoning-gym")
    assert grader("", f"let me see\n#### {entry['answer']}", entry) == 1.0
    assert grader("", "#### 1000000", entry) < 0.5
    with pytest.raises(ValueError, match="answer: expected reasoning-gym's entry"):
        grader("", "#### 1", "1")
