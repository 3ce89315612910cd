# SPDX-License-Identifier: Apache-2.0
"""FlexAttention on trees: its own kernels on CPUs (forward only) and GPUs, and its mathematics with gradients here.

FlexAttention has no backward on CPUs, and for some orders of lengths torch 2.13 generates C++ that does not compile.
What is checked here of the gradients is the mask's function, since the unfused mathematics reads no lists of blocks;
tests/tree/test_masks.py holds the lists against torch's own.
"""

import pytest
import torch

pytest.importorskip("transformers")
from torch.nn.attention import flex_attention as flex

from benchmarks.models import families, trees
from sspo_ext.layout.tree import PADDING, TokenTree
from sspo_ext.tree import support, tree_attention, tree_inputs, why_not
from sspo_ext.tree.masks import block_mask, seen_keys

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = dict(hidden_size=128, max_position_embeddings=512)


def long_tree():
    """Several blocks of 128 in a row: a trunk of 300 tokens, and branches that leave it everywhere."""
    generator = torch.Generator().manual_seed(0)
    trunk = torch.randint(3, 97, (300,), generator=generator)
    tails = [torch.randint(3, 97, (17 + 9 * k,), generator=generator) for k in range(10)]
    return TokenTree.from_sequences(
        [torch.cat([trunk[: 30 * k], tail]) for k, tail in enumerate(tails)], max_tokens=700
    )


@pytest.mark.slow
@pytest.mark.parametrize("window", (None, 40))
def test_compiled_on_a_cpu(window):
    tree = long_tree()
    q, k, v = torch.randn(3, tree.shape[0], 2, tree.shape[1], 32, generator=torch.Generator().manual_seed(1))
    got = torch.compile(flex.flex_attention)(q, k, v, block_mask=block_mask(tree, window))
    mask = seen_keys(tree, window)[:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(got, expected, atol=3e-6, rtol=0)


@pytest.fixture
def unfused(monkeypatch):
    """FlexAttention's unfused mathematics, which has a backward on CPUs too."""
    integration = pytest.importorskip("transformers.integrations.flex_attention")
    if not hasattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"):
        pytest.skip("this torch compiles always")
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex, "_validate_device", lambda query, key, value: None)

    def run(query, key, value, training=False, **options):
        return flex.flex_attention(query, key, value, **options)

    monkeypatch.setattr(integration, "compile_friendly_flex_attention", run)


@pytest.mark.parametrize("name", ("llama", "gemma2", "gemma3", "mistral"))
def test_mathematics_and_gradients(unfused, name):
    """Gemma-2 caps its scores, too."""
    model, b = trees.build(name, **trees.MODELS[name][1]), trees.batch()
    with tree_attention(model, trees.MODELS[name][0]):
        logps, loss, grads = trees.results(model, *trees.alone(model, b, "logits"), "logits")
    with tree_attention(model, "flex_attention"):
        assert why_not(model) is None
        found, layout = trees.shared(model, b, "logits")
        got = trees.results(model, found, layout, "logits")
    torch.testing.assert_close(got[0], logps, atol=2e-5, rtol=0)
    torch.testing.assert_close(got[1], loss, atol=2e-6, rtol=0)
    for key, grad in grads.items():
        torch.testing.assert_close(got[2][key], grad, atol=5e-5, rtol=1e-4)


def test_a_class_without_it_is_refused():
    model = families.build("gpt2")
    if type(model)._supports_flex_attn:
        pytest.skip("it has it")
    with pytest.raises(support.UnsupportedTree, match="GPT2LMHeadModel cannot run a tree: with flex_attention: "):
        with tree_attention(model, "flex_attention"):
            pass


@pytest.mark.gpu
@pytest.mark.parametrize("name", ("llama", "qwen2", "gemma2", "gemma3", "mistral"))
def test_on_a_gpu_it_is_taken_and_right(name):
    """Chosen by itself, forward and backward, against the dense masks."""
    options = trees.MODELS[name][1] | SIZES | dict(head_dim=32)
    model = trees.build(name, **(options | ({"sliding_window": 40} if "sliding_window" in options else {}))).cuda()
    tree, results = long_tree().to("cuda"), {}
    for attention in ("auto", "eager"):
        model.zero_grad()
        with tree_attention(model, attention) as used:
            logits = model(**tree_inputs(model, tree)).logits
            real = tree.parent != PADDING
            weights = torch.linspace(-1, 1, logits.shape[-1], device="cuda")
            (logits.log_softmax(-1)[real] * weights).sum().backward()
        results[used] = logits[real].detach(), {n: p.grad.clone() for n, p in model.named_parameters()}
    assert list(results) == ["flex_attention", "eager"]
    (got, grads), (expected, others) = results.values()
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=1e-3)
    for key, grad in others.items():
        torch.testing.assert_close(grads[key], grad, atol=2e-3 * float(grad.abs().max()), rtol=1e-2)
