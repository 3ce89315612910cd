# SPDX-License-Identifier: Apache-2.0
"""docs/integrating.md, as written: its snippets run, and do what the page says of them.

Mutations of the page, each caught by the test named:
  no reference, in either call; another beta; an import left out       test_plain_loop
  an import left out                                                    test_trainer
  loss_is_scaled_for_ga = False; sequences counted in place of pairs; no num_items; no reference
                                                          test_trainer_of_your_own
  a span moved by one; spans counted from a sequence's start            test_packed_spans
The Trainer was also run on two processes, micro-batches of unequal numbers of pairs: 1e-7 from one big batch.
"""

import json

import pytest
import torch
from helpers.pages import blocks
from helpers.paths import DOCS
from helpers.preference import batch_loss, make_features, make_model
from helpers.tokenizer import byte_tokenizer

from sspo_ext.data.collator import StepPreferenceCollator
from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses.policy import step_policy_loss
from sspo_ext.losses.pref import step_pref_loss

transformers = pytest.importorskip("transformers")
PYTHON = [block.text for block in blocks(DOCS / "integrating.md") if block.language == "python"]
MARKS = ("rows: [chosen_0", "delimiter_mask(tokenizer, by", "from sspo_ext.hf", "AutoTokenizer", "class StepTrainer",
         "step_spans", "from sspo_ext.tree")  # fmt: skip


def snippet(mark: str) -> str:
    (found,) = [text for text in PYTHON if mark in text]
    return found


def test_every_snippet_has_a_test():
    assert len(PYTHON) == len(MARKS) and {snippet(mark) for mark in MARKS} == set(PYTHON)


def parameters(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def shard(seed):
    """Logits' input, labels and step ids of one pair of sequences, with as many steps as the seed says."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(11, (2, 9), generator=g)
    ids = (torch.arange(9) // (3 - seed) - 1).expand(2, 9)
    return torch.randn(2, 9, 11, generator=g, dtype=torch.float64), labels, ids


@pytest.mark.parametrize("loss", ["preference", "policy"])
def test_mean_of_shards_times_world_size_is_one_batch(loss):
    """What DDP does: each process its own shard, `num_items` of all, gradients averaged, the loss times world size."""
    weight = torch.eye(11, dtype=torch.float64, requires_grad=True)

    def gradient(x, labels, ids, num_items=None, factor=1):
        layout = StepLayout.from_step_ids(labels, ids)
        if loss == "preference":
            out = step_pref_loss(x @ weight, layout, num_items=num_items, backend="reference")
            count = layout.pair_by_index().num_valid
        else:
            advantages = torch.ones(layout.num_steps, dtype=torch.float64)
            out = step_policy_loss(x @ weight, layout, advantages, num_items=num_items, backend="reference")
            count = layout.num_rows
        return torch.autograd.grad(out.loss * factor, weight)[0], count

    shards = [shard(0), shard(1)]
    counts = [gradient(*one)[1] for one in shards]
    assert counts[0] != counts[1]
    # [chosen_0, chosen_1, rejected_0, rejected_1]
    whole = [torch.cat([a[:1], b[:1], a[1:], b[1:]]) for a, b in zip(*shards, strict=True)]
    want, total = gradient(*whole)
    assert total == sum(counts)
    mean = sum(gradient(*one, num_items=total, factor=2)[0] for one in shards) / 2
    torch.testing.assert_close(mean, want, rtol=1e-12, atol=1e-14)


ROWS = [
    {"prompt": "1+1=\n", "chosen": "1 and 1\nis 2\n", "rejected": "1 or 1\nis 3\n"},
    {"prompt": "2+3=\n", "chosen": "2 and 3\nis 5\n", "rejected": "it is 4\n"},
]


def byte_model(tokenizer, seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, eos_token_id=0, pad_token_id=0, bos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def test_plain_loop():
    """Steps from token ids, the loss from logits and the same loss from hidden states."""
    tokenizer = byte_tokenizer()
    texts = [row["prompt"] + row[side] for side in ("chosen", "rejected") for row in ROWS]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    ids, mask = batch.input_ids, batch.attention_mask
    prompt = len(ROWS[0]["prompt"])
    response = mask.bool() & (torch.arange(ids.shape[1]) >= prompt)
    logged = {}
    scope = {
        "model": byte_model(tokenizer), "ref_model": byte_model(tokenizer, seed=1), "tokenizer": tokenizer,
        "input_ids": ids, "attention_mask": mask, "response_mask": response, "labels": ids.where(response, -100),
        "device": "cpu", "log": logged.update,
    }  # fmt: skip
    exec(snippet("delimiter_mask(tokenizer, by"), scope)
    assert scope["step_ids"].amax(1).tolist() == [1, 1, 1, 0]
    exec(snippet("rows: [chosen_0"), scope)
    gradient = [p.grad.clone() for p in scope["model"].parameters()]
    assert logged["pairs/count"] == 3 and logged["rewards/margins"] != 0
    from_logits = scope["out"].loss
    exec(snippet("from sspo_ext.hf"), scope)
    torch.testing.assert_close(scope["out"].loss.detach(), from_logits.detach(), rtol=1e-4, atol=1e-5)
    want = step_pref_loss(
        scope["model"](ids).logits, scope["labels"], scope["step_ids"], beta=0.1, backend="reference",
        ref=scope["ref"],
    )  # fmt: skip
    torch.testing.assert_close(from_logits.detach(), want.loss.detach(), rtol=1e-4, atol=1e-5)
    want = torch.autograd.grad(want.loss, list(scope["model"].parameters()))
    for got, true in zip(gradient, want, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-4, atol=1e-5)


def test_trainer(tmp_path, monkeypatch):
    """The five lines of StepPreferenceTrainer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    tokenizer = byte_tokenizer()
    byte_model(tokenizer).save_pretrained("name")
    tokenizer.save_pretrained("name")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    scope = {"name": "name"}
    exec(snippet("AutoTokenizer"), scope)
    assert [len(row["pairs"]) for row in scope["rows"]] == [2, 1]
    assert any((tmp_path / "out").glob("checkpoint-*"))


def test_trainer_of_your_own(tmp_path):
    """Accumulated over micro-batches of different numbers of pairs, the update is that of one big batch."""
    features = make_features(4, steps=(1, 6))
    assert len({len(f["pairs"]) for f in features}) > 1
    for feature in features:
        for side in ("chosen", "rejected"):
            steps = max(feature[f"{side}_step_ids"]) + 1
            feature[f"ref_{side}"] = torch.linspace(-3, -1, steps).tolist()
    model = make_model()
    out = batch_loss(model, features, ref=StepPreferenceCollator(0)(features)["ref"], beta=0.1)
    out.loss.backward()
    want = torch.cat([(p - p.grad).detach().reshape(-1) for p in model.parameters()])
    args = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=1, learning_rate=1.0,
        lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0, save_strategy="no", report_to="none",
        use_cpu=True, disable_tqdm=True, logging_steps=1, remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    scope = {"model": make_model(), "args": args, "collator": StepPreferenceCollator(0), "rows": features}
    exec(snippet("class StepTrainer"), scope)
    scope["trainer"].train()
    assert (want - parameters(make_model())).abs().max() > 1e-2
    torch.testing.assert_close(parameters(scope["model"]), want, rtol=0, atol=5e-6)
    logged = [entry["loss"] for entry in scope["trainer"].state.log_history if "loss" in entry]
    assert logged == pytest.approx([out.loss.item()], rel=1e-4)


def test_packed_spans():
    g = torch.Generator().manual_seed(0)
    chosen, rejected = (torch.randint(11, (n,), generator=g) for n in (9, 8))
    scope = {"torch": torch, "StepLayout": StepLayout, "chosen_labels": chosen, "rejected_labels": rejected}
    exec(snippet("step_spans"), scope)
    layout, pairs = scope["layout"], scope["pairs"]
    assert layout.counts.tolist() == [2, 3, 2, 2] and pairs.index.tolist() == [[0, 2], [1, 3]]
    logits = torch.randn(17, 11, generator=g)
    ids = torch.full((2, 9), -1)
    ids[0, 4:6], ids[0, 6:9], ids[1, 4:6], ids[1, 6:8] = 0, 1, 0, 1
    labels, padded = torch.full((2, 9), -100), torch.zeros(2, 9, 11)
    labels[0], labels[1, :8], padded[0], padded[1, :8] = chosen, rejected, logits[:9], logits[9:]
    want = step_pref_loss(padded, labels, ids, backend="reference")
    got = step_pref_loss(logits, layout, pairs, backend="reference")
    torch.testing.assert_close(got.loss, want.loss)


def test_tree():
    """Both sequences score the token 6, by one row; the losses are those of a padded batch."""
    scope = {"torch": torch, "StepLayout": StepLayout}
    exec(snippet("from sspo_ext.tree"), scope)
    tree, layout, ids, steps = (scope[name] for name in ("tree", "layout", "ids", "steps"))
    assert tree.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert layout.num_rows == 5 and layout.rows.tolist() == [0, 1, 2, 1]
    logits, pad = torch.randn(1, 5, 11), torch.nn.utils.rnn.pad_sequence
    labels, padded = (pad(x, batch_first=True, padding_value=-100) for x in (ids, steps))
    unshared = torch.stack([logits[0, [0, 1, 2, 3]], logits[0, [0, 1, 4, 4]]])
    want = step_pref_loss(unshared, labels, padded.clamp(min=-1), backend="reference", reference_free=True)
    got = step_pref_loss(logits, layout, reference_free=True)
    torch.testing.assert_close(got.loss, want.loss)
