# SPDX-License-Identifier: Apache-2.0
"""One renderer of chats for `train`, `rl` and `trace`: a row's own options, words of the assistant to be continued, one
beginning of sequence.

All were red before: no command read the columns "tools" and "chat_template_kwargs", `sspo-ext train` had no option for
the template, a prompt that ends in the assistant's words was closed, and a text that begins with <bos> got another.
"""

import json

import pytest

pytest.importorskip("transformers")

from sspo_ext.data.chat import chat_options, render_response, row_probe
from sspo_ext.data.graders import grade_rows
from sspo_ext.data.prompts import check_rows, load_prompt_rows, prompt_tokens
from sspo_ext.data.rows import load_preference_rows
from sspo_ext.data.tokenize import tokenize_row
from sspo_ext.signals.probing.texts import Probe
from sspo_ext.tracing.chains import load_chains
from sspo_ext.train.experience import prompt_ids

TEMPLATE = (
    "{{ bos_token }}{% if tools %}[{{ tools | map(attribute='name') | join(',') }}]{% endif %}"
    "{% if quiet %}hush {% endif %}"
    "{% for m in messages %}{% if m.role == 'judge' %}{{ raise_exception('no judges') }}{% endif %}"
    "<|{{ m.role }}|>{% if m.role == 'assistant' and thoughtful %}<think></think>{% endif %}"
    "{{ m.content }}<eos>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
USER = {"role": "user", "content": "2 + 3?"}
BEGUN = {"role": "assistant", "content": "It is"}
OWN = {"tools": [{"name": "calc"}], "chat_template_kwargs": {"quiet": True}}


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {word: i for i, word in enumerate(["<pad>", "<eos>", "<bos>", *letters])}
    made = Tokenizer(models.BPE(vocab, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", chat_template=TEMPLATE
    )


def prompts_of(row, tokenizer, given=None):
    """The prompt's text as training, rollouts and traces write it."""
    (pair,) = load_preference_rows([{"chosen": "a", "rejected": "b", **row}])
    feature = tokenize_row(pair, tokenizer, pair_by="sequence", chat_template_kwargs=given)
    train = [i for i, step in zip(feature["chosen_input_ids"], feature["chosen_step_ids"], strict=True) if step < 0]
    (rl,) = prompt_ids(load_prompt_rows([{"answer": "5", **row}]), tokenizer, given or {})
    chains, _ = load_chains(
        [{"response": "a", "answer": "5", "reward": 1, **row}], tokenizer, chat_template_kwargs=given
    )
    return [tokenizer.decode(ids) for ids in (train, rl, chains[0].prompt_ids)]


@pytest.mark.parametrize("written", (False, True))
def test_a_rows_options_reach_the_template(tokenizer, written):
    row = {"prompt": [USER], **({name: json.dumps(one) for name, one in OWN.items()} if written else OWN)}
    assert prompts_of(row, tokenizer) == ["<bos>[calc]hush <|user|>2 + 3?<eos>\n<|assistant|>"] * 3


def test_a_rows_options_come_before_the_commands(tokenizer):
    given = {"quiet": True}
    assert prompts_of({"prompt": [USER]}, tokenizer, given) == ["<bos>hush <|user|>2 + 3?<eos>\n<|assistant|>"] * 3
    for own, head in (({"quiet": False}, ""), ({"quiet": None}, "hush ")):
        row = {"prompt": [USER], "chat_template_kwargs": own}
        assert prompts_of(row, tokenizer, given) == [f"<bos>{head}<|user|>2 + 3?<eos>\n<|assistant|>"] * 3


def test_words_of_the_assistant_are_continued(tokenizer):
    assert prompts_of({"prompt": [USER, BEGUN]}, tokenizer) == ["<bos><|user|>2 + 3?<eos>\n<|assistant|>It is"] * 3
    (pair,) = load_preference_rows([{"prompt": [USER, BEGUN], "chosen": " 5\nSure.", "rejected": " 6\nSure."}])
    feature = tokenize_row(pair, tokenizer)
    assert tokenizer.decode(feature["chosen_input_ids"]) == "<bos><|user|>2 + 3?<eos>\n<|assistant|>It is 5\nSure.<eos>"
    assert feature["pairs"] == [[0, 0], [1, 1]]


def test_the_beginning_is_written_once(tokenizer):
    bos = tokenizer.bos_token_id
    assert prompt_tokens("<bos>Q", tokenizer) == prompt_tokens("Q", tokenizer) == [bos, *tokenizer("Q").input_ids[1:]]
    assert prompts_of({"prompt": "<bos>Q: "}, tokenizer) == ["<bos>Q: "] * 3


@pytest.mark.parametrize(
    "columns, message",
    (
        ({"tools": "calc"}, "tools: expected a list, or one in JSON"),
        ({"tools": {"name": "calc"}}, "tools: expected a list, got"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs: expected an object, got"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs: 'tokenize' is no option"),
    ),
)
def test_columns_of_another_form_are_named(tokenizer, columns, message):
    row = {"prompt": [USER], "chosen": "a", "rejected": "b", "response": "a", "answer": "5", "reward": 1, **columns}
    for load in (load_preference_rows, load_prompt_rows, lambda rows: load_chains(rows, tokenizer)):
        with pytest.raises(ValueError, match=f"row 0: {message}"):
            load([row])


def test_a_refusal_of_the_template_is_a_bad_row(tokenizer):
    row = {"prompt": [{"role": "judge", "content": "?"}], "chosen": "a", "rejected": "b"}
    with pytest.raises(ValueError, match="^prompt: the chat template refuses it: no judges"):
        tokenize_row(load_preference_rows([row])[0], tokenizer)
    with pytest.raises(ValueError, match="^prompt: the chat template refuses it: no judges"):
        prompt_tokens(row["prompt"], tokenizer)
    with pytest.raises(ValueError, match="row 0: prompt: the chat template refuses it: no judges"):
        load_chains([{**row, "response": "a", "answer": "5", "reward": 1}], tokenizer)
    with pytest.raises(ValueError, match="train_dataset: 1 of 1 rows.*\n  row 0: prompt: the chat template refuses it"):
        check_rows("train_dataset", [row], chat=True, tokenizer=tokenizer)


def test_a_response_is_not_sought_in_the_templates_text(tokenizer):
    """ "h" is a letter of "<think>", which the template writes first."""
    prompt = "<bos><|user|>2 + 3?<eos>\n<|assistant|>"
    written, at = render_response([USER], prompt, "h", tokenizer, {"thoughtful": True})
    assert (written, at) == ("<think></think>h<eos>\n", len("<think></think>"))
    (pair,) = load_preference_rows([{"prompt": [USER], "chosen": "h", "rejected": "i", "partial": True}])
    feature = tokenize_row(pair, tokenizer, pair_by="sequence", chat_template_kwargs={"thoughtful": True})
    assert tokenizer.decode(feature["chosen_input_ids"]) == prompt + "<think></think>h"


def test_a_turn_of_the_probe_has_the_rows_options():
    probe = Probe("?", turn=True, chat_template_kwargs={"quiet": False, "loud": True})
    asked = row_probe(probe, {"prompt": [USER], **OWN}).chat_template_kwargs
    assert asked == {"quiet": True, "loud": True, "tools": OWN["tools"]} == chat_options(OWN, {"loud": True})
    assert row_probe(Probe("?"), OWN) == Probe("?")


def test_a_grader_of_trls_form_sees_the_words_it_continues():
    def reward(prompts, completions, **columns):
        seen.append((prompts, completions))
        return [1.0]

    seen: list = []
    grade_rows(reward, [{"prompt": [USER, BEGUN]}], [" 5"])
    assert seen == [([[USER]], [[{"role": "assistant", "content": "It is 5"}]])]
