# SPDX-License-Identifier: Apache-2.0
"""A row of pairs, a byte tokenizer with a chat template, and the steps of what is made of them."""

import pytest

from sspo_ext.data.rows import load_preference_rows

transformers = pytest.importorskip("transformers")
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def byte_level(bos=None, merges=()):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate(["<eos>", "<pad>", "<bos>", *letters, *(a + b for a, b in merges)])}
    tok = Tokenizer(models.BPE(vocab, list(merges)))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = decoders.ByteLevel()
    if bos:
        tok.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tok, eos_token="<eos>", pad_token="<pad>", bos_token="<bos>", chat_template=CHAT
    )


def row(chosen="a\nb\nc", rejected="a\nx\nc", prompt="Q:\n", **more):
    return load_preference_rows([{"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}])[0]


def steps_of(feature, side, tok):
    """The text of each scored step."""
    ids, steps, labels = (feature[f"{side}_{name}"] for name in ("input_ids", "step_ids", "labels"))
    assert len(ids) == len(steps) == len(labels)
    assert all(
        (label == i) if step >= 0 else (label == -100) for i, step, label in zip(ids, steps, labels, strict=True)
    )
    return [tok.decode([i for i, s in zip(ids, steps, strict=True) if s == k]) for k in range(max(steps) + 1)]
