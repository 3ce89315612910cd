# SPDX-License-Identifier: Apache-2.0
"""A tiny random Llama with a character tokenizer, and rollout engines that say what they are told: for SSPO's tests."""

import torch

PROMPTS = [f"{a}+{b}=\n" for a in range(1, 5) for b in range(1, 5)]
ROWS = [{"prompt": p, "answer": str(eval(p.strip("=\n")))} for p in PROMPTS]
LETTERS = "\n0123456789+=# :abcdef检查🙂"


def make_tokenizer():
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *LETTERS]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    # characters, joined without spaces between them
    from tokenizers import decoders

    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def make_model(seed=0, dropout=0.0, scale=4.0, **options):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=2 + len(LETTERS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, attention_dropout=dropout, pad_token_id=0,
        bos_token_id=None, eos_token_id=1, **options,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # default weights are so small that a mistake in the context would hardly show
        for p in model.parameters():
            if p.ndim == 2:
                p *= scale
    return model


def reward(prompt, completion, answer):
    """Something that differs between completions, whatever a random model writes."""
    return (len(completion) % 5) / 4


class Says:
    """A rollout engine that completes row i of every call with text i of `texts`, in turn."""

    def __init__(self, tokenizer, texts):
        self.completions = [tokenizer(text).input_ids for text in texts]

    def complete(self, model, prompts, sampling, seeds):
        return [self.completions[seed[-1] % len(self.completions)] for seed in seeds]


def config(folder, **options):
    from sspo_ext.train.sspo_config import SSPOConfig

    defaults = dict(
        output_dir=str(folder), per_device_train_batch_size=4, num_generations=4, max_completion_length=12,
        max_steps=2, learning_rate=0.05, lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
        backend="reference", probe="#", min_signal=0.0,  # the values of a random model hardly differ
    )  # fmt: skip
    return SSPOConfig(**{**defaults, **options})


def make_trainer(folder, model=None, rows=ROWS, reward_func=reward, tokenizer=None, trainer_class=None, **options):
    from sspo_ext.train.sspo_trainer import SSPOTrainer

    own = {key: options.pop(key) for key in ("engine", "peft_config", "eval_dataset") if key in options}
    return (trainer_class or SSPOTrainer)(
        model or make_model(), config(folder, **options), reward_func, rows,
        processing_class=tokenizer or make_tokenizer(), **own,
    )  # fmt: skip


def parameters(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])
