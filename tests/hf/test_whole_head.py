# SPDX-License-Identifier: Apache-2.0
"""`with_head`, with a stand-in for ZeRO-3: a weight that is empty outside a call of its module.

tests/train/test_sharded.py has DeepSpeed itself. Mutations tried (what was broken -> which tests went red):
    the function is called without the module  -> all three under ZeRO-3
    what comes out of the module is not used   -> the forward and the gradient under ZeRO-3
"""

import pytest
import torch

pytest.importorskip("transformers")

from helpers.preference import make_features, make_model

from sspo_ext.data.collator import StepPreferenceCollator
from sspo_ext.hf import UnsupportedHead, forward_hidden, model_head, with_head
from sspo_ext.hf.check import compare_head
from sspo_ext.losses import linear_step_pref_loss

BATCH = StepPreferenceCollator(0)(make_features(4))
INPUTS = {name: BATCH[name] for name in ("input_ids", "attention_mask")}


def shared_out(model, *, doubled: bool = False):
    """Gives the head hooks like DeepSpeed's: gather before its forward, release after it, a mark on what it gave."""
    head, calls = model.get_output_embeddings(), []
    whole, empty = head.weight.data, torch.empty(0)
    head.weight.ds_id, head.weight.ds_shape = 0, whole.shape

    def gather(module, args):
        head.weight.data = whole
        calls.append("gather")

    def release(module, args, output):
        head.weight.data = empty
        calls.append("release")
        tensors = output if isinstance(output, tuple) else (output,)
        marked = tuple(2 * t if doubled else t * 1 for t in tensors)
        return marked if isinstance(output, tuple) else marked[0]

    def fetch(grad):  # as DeepSpeed does before the module's backward
        head.weight.data = whole

    head.weight.data = empty
    head.register_forward_pre_hook(gather)
    head.register_forward_hook(release)
    head.register_full_backward_pre_hook(lambda module, grads: fetch(grads))
    return calls


def loss_of(hidden, head):
    out = linear_step_pref_loss(
        hidden, head.weight, BATCH["layout"], BATCH["pairs"], reference_free=True, backend="reference", **head.options
    )
    return out


def test_of_a_whole_head_it_is_a_call():
    model = make_model()
    hidden, _ = forward_hidden(model, **INPUTS)
    assert with_head(model, hidden, lambda h, head: (h is hidden, head.weight)) == (True, model.lm_head.weight)


def test_under_zero3_the_function_is_the_forward_of_the_module():
    truth = make_model()
    hidden, _ = forward_hidden(truth, **INPUTS)
    expected = loss_of(hidden, model_head(truth))
    model = make_model()
    calls = shared_out(model)
    hidden, _ = forward_hidden(model, **INPUTS)
    calls.clear()
    with pytest.raises(UnsupportedHead, match="sharded by ZeRO-3"):
        model_head(model)
    out = with_head(model, hidden, loss_of)
    assert calls == ["gather", "release"] and "forward" not in vars(model.lm_head)
    assert torch.equal(out.loss, expected.loss) and torch.equal(out.step_logps, expected.step_logps)
    assert out.loss.grad_fn.name() != expected.loss.grad_fn.name()  # what came out of the module
    with torch.no_grad():
        assert torch.equal(with_head(model, hidden, loss_of).loss, expected.loss)


def test_under_zero3_the_gradient_passes_the_hooks():
    model = make_model()
    shared_out(model, doubled=True)
    hidden, _ = forward_hidden(model, **INPUTS)
    out, scalar = with_head(model, hidden, loss_of), with_head(model, hidden, lambda h, head: head.logits(h).sum())
    single = make_model()
    hidden, _ = forward_hidden(single, **INPUTS)
    assert torch.equal(out.loss, 2 * loss_of(hidden, model_head(single)).loss)
    assert torch.equal(scalar, 2 * model_head(single).logits(hidden).sum())


def test_the_check_of_a_head_takes_a_shared_one():
    model = make_model()
    shared_out(model)
    compare_head(model, {"input_ids": torch.arange(20, 28)[None]})
    model.config.logit_scale = 2.0
    with pytest.raises(UnsupportedHead, match="its logits differ"):
        compare_head(model, {"input_ids": torch.arange(20, 28)[None]})
