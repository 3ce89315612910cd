# SPDX-License-Identifier: Apache-2.0
"""A small random model on disk, for `sspo-ext trace`."""

import pytest
import torch


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from helpers.tracing import TOKENIZER
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    TOKENIZER.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=512, eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4.0)
    model.save_pretrained(folder)
    return str(folder)
