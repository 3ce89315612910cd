# SPDX-License-Identifier: Apache-2.0
"""Small models of transformers, and their own logits."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
import transformers

from benchmarks.models import families

IDS = families.batch()[0]
SAMPLE = {"input_ids": IDS[:1]}


def own_logits(model, **inputs):
    with torch.no_grad():
        return model(**{"input_ids": IDS, "use_cache": False, **inputs}).logits


def llama(model_class=transformers.LlamaForCausalLM, **options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**families.FAMILIES["llama"][2] | options)
    return families.enlarge(model_class(config)).eval()
