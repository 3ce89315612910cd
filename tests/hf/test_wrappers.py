# SPDX-License-Identifier: Apache-2.0
"""Wrapped models: adapters, compiled parts, hooks, several processes.

Mutations of sspo_ext/hf that these tests catch: the hook left behind after an error; the hook narrowing another
thread's call; hidden detached; the adapter or virtual token check dropped.
"""

import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.launch import torchrun
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")
import peft
import transformers
from helpers.hf import IDS, SAMPLE, llama, own_logits

from benchmarks.models import families
from sspo_ext.hf.check import check_head
from sspo_ext.hf.forward import forward_hidden
from sspo_ext.hf.head import model_head
from sspo_ext.hf.wrappers import UnsupportedHead, unwrap

pytestmark = pytest.mark.filterwarnings("ignore")


def lora(model, **options):
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{"target_modules": ["q_proj", "v_proj"], **options})
    return families.enlarge(peft.get_peft_model(model, config), 1.0)


class TestPeft:
    def test_lora_beside_the_head(self):
        model = lora(llama())
        for context in (torch.enable_grad, model.disable_adapter):
            with context():
                head = check_head(model, SAMPLE)
                hidden, _ = forward_hidden(model, input_ids=IDS)
                assert torch.equal(head.logits(hidden), own_logits(model))
        assert not head.weight.requires_grad

    @pytest.mark.parametrize(
        "options",
        [
            dict(target_modules=["q_proj", "lm_head"]),
            dict(target_parameters=["lm_head.weight"]),
            dict(target_modules=["embed_tokens"], ensure_weight_tying=True),
        ],
        ids=["module", "parameter", "tied"],
    )
    def test_an_adapter_on_the_head(self, options):
        model = lora(llama(tie_word_embeddings="ensure_weight_tying" in options), **options)
        for call in (lambda: model_head(model), lambda: check_head(model, SAMPLE)):
            with pytest.raises(UnsupportedHead, match="LlamaForCausalLM: has an adapter on its output head"):
                call()

    def test_modules_to_save_resolve_to_the_active_copy(self):
        model = lora(llama(), modules_to_save=["lm_head"])
        wrapper = model.base_model.model.lm_head
        with torch.no_grad():
            wrapper.modules_to_save["default"].weight.mul_(1.5)
        assert check_head(model, SAMPLE).weight is wrapper.modules_to_save["default"].weight
        hidden, _ = forward_hidden(model, input_ids=IDS)
        assert torch.equal(model_head(model).logits(hidden), own_logits(model))
        with model.disable_adapter():
            assert check_head(model, SAMPLE).weight is wrapper.original_module.weight

    def test_trainable_tokens_keep_their_gradient(self):
        model = lora(llama(tie_word_embeddings=True), trainable_token_indices=[3, 4])
        hidden, _ = forward_hidden(model, input_ids=IDS)
        logits = check_head(model, SAMPLE).logits(hidden)
        assert torch.equal(logits, own_logits(model))
        logits.square().mean().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        model.zero_grad()
        model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(grads[name], p.grad, msg=name)

    @pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig"])
    def test_virtual_tokens(self, kind):
        config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
        model = peft.get_peft_model(llama(), config)
        for call in (lambda: model_head(model), lambda: forward_hidden(model, input_ids=IDS)):
            with pytest.raises(UnsupportedHead, match="LlamaForCausalLM: prepends virtual tokens"):
                call()

    def test_virtual_tokens_of_an_unknown_kind_show_in_the_shape(self):
        class Prefixed(transformers.LlamaForCausalLM):
            def forward(self, input_ids, **kwargs):
                return super().forward(F.pad(input_ids, (2, 0), value=5), **kwargs)

        with pytest.raises(UnsupportedHead, match=r"Prefixed: .*\(1, 14, 32\) for inputs of shape \(1, 12\)"):
            check_head(llama(Prefixed), SAMPLE)

    def test_prefix_tuning_shifts_nothing(self):
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        model = families.enlarge(peft.get_peft_model(llama(), config)).eval()
        head = check_head(model, SAMPLE)
        hidden, _ = forward_hidden(model, input_ids=IDS)
        expected = model(input_ids=IDS).logits
        assert torch.equal(head.logits(hidden), expected)


class TestHook:
    @pytest.mark.parametrize("inputs", [dict(labels=IDS), dict(use_cache=True), dict(logits_to_keep=1)])
    def test_inputs_that_would_be_wrong(self, inputs):
        with pytest.raises(TypeError, match=next(iter(inputs))):
            forward_hidden(llama(), input_ids=IDS, **inputs)

    def test_removed_after_an_error(self):
        model = llama()
        with pytest.raises(IndexError):
            forward_hidden(model, input_ids=IDS + 97)
        assert not model.lm_head._forward_pre_hooks
        assert model(input_ids=IDS).logits.shape == (4, 12, 97)

    def test_another_threads_call_is_not_narrowed(self):
        model, seen = llama(), []

        def generate(*_):
            thread = threading.Thread(target=lambda: seen.append(model.lm_head(torch.zeros(1, 5, 32)).shape))
            thread.start()
            thread.join()

        handle = model.model.register_forward_hook(generate)
        hidden, _ = forward_hidden(model, input_ids=IDS)
        handle.remove()
        assert seen == [(1, 5, 97)]
        assert torch.equal(model_head(model).logits(hidden), own_logits(model))

    def test_head_called_twice(self):
        class Twice(transformers.LlamaForCausalLM):
            def forward(self, *args, **kwargs):
                self.lm_head(torch.zeros(1, 1, 32))
                return super().forward(*args, **kwargs)

        with pytest.raises(UnsupportedHead, match="^Twice: called its output embeddings 2 times"):
            forward_hidden(llama(Twice), input_ids=IDS)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_activation_checkpointing(self, use_reentrant):
        model = families.build("qwen3").train()

        def gradients():
            model.zero_grad()
            hidden, _ = forward_hidden(model, input_ids=IDS)
            model_head(model).logits(hidden).square().mean().backward()
            return [p.grad for p in model.parameters()]

        expected = gradients()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        assert all(map(torch.equal, gradients(), expected))

    def test_inputs_embeds_and_no_grad(self):
        model = llama()
        embeds = model.get_input_embeddings()(IDS).detach()
        with torch.no_grad():
            hidden, _ = forward_hidden(model, inputs_embeds=embeds)
        assert not hidden.requires_grad
        assert torch.equal(model_head(model).logits(hidden), own_logits(model))


class TestWrappers:
    def test_compiled_as_a_whole(self):
        inplace = llama()
        inplace.compile(backend="eager")
        for model in (torch.compile(llama(), backend="eager"), inplace):
            with pytest.raises(UnsupportedHead, match="LlamaForCausalLM: is compiled as a whole"):
                forward_hidden(model, input_ids=IDS)

    def test_compiled_parts(self):
        model = llama(num_hidden_layers=1)
        expected = own_logits(model)
        model.model.compile(backend="eager")
        model.lm_head = torch.compile(model.lm_head, backend="eager")
        model(input_ids=IDS)  # compiled before there is a hook
        hidden, _ = forward_hidden(model, input_ids=IDS)
        torch.testing.assert_close(check_head(model, SAMPLE).logits(hidden), expected)

    def test_engine_with_a_module(self):
        class Engine(nn.Module):
            def __init__(self, module):
                super().__init__()
                self.module = module

            def forward(self, **inputs):
                return self.module(**inputs)

        model = llama()
        assert unwrap(Engine(Engine(model))) is model
        assert check_head(Engine(model), SAMPLE).weight is model.lm_head.weight

    def test_fsdp1(self):
        wrapper = nn.Module()
        wrapper._fsdp_wrapped_module = llama()
        with pytest.raises(UnsupportedHead, match="LlamaForCausalLM: is wrapped in FSDP1"):
            model_head(wrapper)

    @pytest.mark.parametrize(
        "make",
        [
            lambda: llama().model,
            lambda: nn.Linear(3, 3),
        ],
        ids=["decoder", "module"],
    )
    def test_no_output_embeddings(self, make):
        model = make()
        with pytest.raises(UnsupportedHead, match=f"^{type(model).__name__}: has no output embeddings"):
            model_head(model)

    @pytest.mark.parametrize(
        ("weight", "message"),
        [
            (torch.zeros(97, 32, dtype=torch.int8), "is torch.int8, expected a float tensor"),
            (torch.zeros(97, 32, device="meta"), "is offloaded"),
            (torch.zeros(0), r"has shape \(0,\) here \(sharded"),
            (torch.zeros(97 * 32), r"has shape \(3104,\) here \(sharded"),
            (None, "is NoneType"),
        ],
    )
    def test_weights_that_are_none(self, weight, message):
        model = llama()
        model.lm_head.weight = None if weight is None else nn.Parameter(weight, requires_grad=False)
        with pytest.raises(UnsupportedHead, match=message):
            model_head(model)

    def test_data_parallel(self):
        with pytest.raises(UnsupportedHead, match="^DataParallel: .*DistributedDataParallel"):
            forward_hidden(nn.DataParallel(llama()), input_ids=IDS)

    def test_prophetnet_has_another_kind_of_head(self):
        sizes = dict(vocab_size=97, hidden_size=32, num_decoder_layers=1, num_encoder_layers=1, is_decoder=True)
        heads = dict(num_decoder_attention_heads=4, num_encoder_attention_heads=4)
        model = transformers.ProphetNetForCausalLM(transformers.ProphetNetConfig(**sizes, **heads))
        with pytest.raises(UnsupportedHead, match="something other than one"):
            check_head(model, SAMPLE)

    def test_a_model_that_is_not_transformers(self):
        class Tiny(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed, self.head = nn.Embedding(97, 8), nn.Linear(8, 97)

            def get_output_embeddings(self):
                return self.head

            def forward(self, input_ids):
                return SimpleNamespace(logits=self.head(self.embed(input_ids)))

        model = Tiny()
        head = check_head(model, SAMPLE)
        hidden, _ = forward_hidden(model, input_ids=IDS)
        assert head.bias is model.head.bias and torch.equal(hidden, model.embed(IDS))


@pytest.mark.slow
def test_two_ranks(tmp_path):
    """DDP, FSDP2 in three layouts, tensor parallel: every rank gets the whole batch's gradients (hf_two_ranks.py)."""
    assert "all right" in torchrun("helpers.ranks.hf_two_ranks", tmp_path)
