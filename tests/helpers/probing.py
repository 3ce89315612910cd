# SPDX-License-Identifier: Apache-2.0
"""A model whose answers have known probabilities, a batch for it and a tokenizer."""

from types import SimpleNamespace

import torch
from torch import nn

from sspo_ext.signals.values import StepBatch


class Knows(nn.Module):
    """Answers with known probabilities: p(7) = 0.2, once token 5 has been read 0.6; p(8 after 7) = 0.5, p(9) = 0.25;
    all else shares the rest. Vocabulary of 16."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(eos_token_id=1)

    def forward(self, input_ids, attention_mask=None):
        knows = (input_ids == 5).cumsum(1) > 0
        p = torch.zeros(*input_ids.shape, 16)
        p[..., 7] = torch.where(knows, 0.6, 0.2)
        p[input_ids == 7] = 0.0
        p[..., 8] = torch.where(input_ids == 7, 0.5, 0.0)
        p[..., 9] = torch.where(input_ids == 7, 0.25, 0.0)
        rest = torch.tensor([i not in (7, 8, 9) for i in range(16)])
        p += rest * (1 - p.sum(-1, keepdim=True)) / rest.sum()
        return SimpleNamespace(logits=p.log())


BATCH = StepBatch([[3, 4], [3]], [[[6, 6], [5], [6, 1]], []])


class Letters:
    """Token i is the i-th letter; 1 ends a sequence."""

    all_special_ids = (1,)

    def decode(self, ids, **options):
        return "".join("abcdefghijklmnop"[i] for i in ids)

    def __call__(self, text, **options):
        return {"input_ids": ["abcdefghijklmnop".index(c) for c in text]}
