"""Hidden states and heads of real model classes, wrapped and not.

Mutations of sspo_ext/hf.py that these tests catch: softcap before scale; a field name forgotten; Granite multiplied;
the hook left behind after an error; the hook narrowing another thread's call; hidden detached; the adapter or virtual
token check dropped; the ladder without its gains; the check in float32 for float64 models; modes not restored.
"""

import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.launch import torchrun
from helpers.paths import ROOT
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")
import peft
import transformers

from benchmarks.models import families
from sspo_ext.hf.check import check_head
from sspo_ext.hf.forward import forward_hidden
from sspo_ext.hf.head import LMHead, model_head
from sspo_ext.hf.wrappers import UnsupportedHead, unwrap

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = families.batch()[0]
SAMPLE = {"input_ids": IDS[:1]}


def own_logits(model, **inputs):
    with torch.no_grad():
        return model(**{"input_ids": IDS, "use_cache": False, **inputs}).logits


def lora(model, **options):
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{"target_modules": ["q_proj", "v_proj"], **options})
    return families.enlarge(peft.get_peft_model(model, config), 1.0)


class Capped(transformers.LlamaForCausalLM):
    """Does to its logits what no config field tells."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = 30.0 * torch.tanh(outputs.logits / 30.0)
        return outputs


def llama(model_class=transformers.LlamaForCausalLM, **options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**families.FAMILIES["llama"][2] | options)
    return families.enlarge(model_class(config)).eval()


class TestFamilies:
    @pytest.mark.parametrize("name", families.FAMILIES)
    def test_logits_of_hidden_and_head_are_the_models_own(self, name):
        model = families.build(name)
        expected = model(input_ids=IDS, use_cache=False)
        hidden, outputs = forward_hidden(model, input_ids=IDS)
        head = model_head(model)
        # a quotient by 3 against a product with 1/3: one last bit
        bound = 2**-23 * expected.logits.abs().max() if name == "granite" else 0.0
        difference = (head.logits(hidden) - expected.logits).abs().max()
        assert difference <= bound, f"{name}: {difference}"
        assert hidden.requires_grad and hidden.shape[:2] == IDS.shape
        assert torch.equal(outputs.logits, expected.logits[:, :1]), "the one position that the head computed"
        embeddings = model.get_output_embeddings()
        assert head.weight is embeddings.weight and head.bias is getattr(embeddings, "bias", None)
        assert (head.weight is model.get_input_embeddings().weight) == model.config.tie_word_embeddings
        assert not embeddings._forward_pre_hooks
        again = check_head(model, SAMPLE)
        assert again.weight is head.weight and again.bias is head.bias and again.options == head.options

    @pytest.mark.parametrize("name", ["mixtral", "qwen2-moe"])
    def test_router_loss_is_kept(self, name):
        model = families.build(name)
        _, outputs = forward_hidden(model, input_ids=IDS)
        assert outputs.aux_loss.requires_grad
        assert torch.equal(outputs.aux_loss, model(input_ids=IDS, use_cache=False).aux_loss)

    @pytest.mark.parametrize("name", ["llama-tied", "gemma2", "opt", "phi", "granite", "mixtral", "llama-lora"])
    def test_gradients_equal_those_of_the_models_own_logits(self, name):
        model, (ids, layout) = families.build(name, torch.float64), families.batch()

        def through_hidden(model, ids, layout):
            hidden, outputs = forward_hidden(model, input_ids=ids)
            logits = model_head(model).logits(hidden)
            return families.step_pref_loss(logits, layout, beta=1.0).loss + families._router_loss(model, outputs)

        loss, grads = families.gradients(model, through_hidden, ids, layout)
        expected, expected_grads = families.gradients(model, families.logits_route, ids, layout)
        torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)
        assert grads.keys() == expected_grads.keys()
        for key, grad in expected_grads.items():
            torch.testing.assert_close(grads[key], grad, rtol=0, atol=1e-13)

    @pytest.mark.parametrize("name", ["llama-tied", "gemma2", "phi", "cohere", "granite", "qwen2-moe", "llama-lora"])
    def test_linear_route_equals_logits_route(self, name):
        row = families.compare(name, torch.float64)
        assert row.d_loss < 1e-13 and row.d_grad < 1e-13 and row.max_grad > 0.1, row

    @pytest.mark.parametrize("name", ["gemma2", "gemma3", "cohere", "granite"])
    def test_scale_and_softcap_matter_in_these_tests(self, name):
        model = families.build(name)
        hidden, _ = forward_hidden(model, input_ids=IDS)
        head = model_head(model)
        raw = F.linear(hidden, head.weight, head.bias)
        assert (raw - head.post(raw)).abs().max() > 1e-2

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "phi"])
    def test_check_in_other_dtypes(self, name, dtype):
        model = families.build(name, dtype)
        check_head(model, SAMPLE)
        hidden, _ = forward_hidden(model, input_ids=IDS)
        assert hidden.dtype == dtype

    def test_check_under_autocast(self):
        model = families.build("gemma2")
        with torch.autocast("cpu", torch.bfloat16):
            assert check_head(model, SAMPLE).weight.dtype == torch.float32

    @pytest.mark.parametrize("kind", ["recurrent_gemma", "xlstm", "hyperclovax", "inkling2_text", "mpt"])
    def test_rarer_names_of_scale_softcap_and_vocabulary(self, kind):
        if kind not in transformers.CONFIG_MAPPING:
            pytest.skip(f"transformers {transformers.__version__} has no {kind}")
        model = families.sweep_model(kind)
        head = check_head(model, SAMPLE)
        hidden, _ = forward_hidden(model, input_ids=IDS)
        assert torch.equal(head.logits(hidden), own_logits(model))

    def test_post_applies_the_scale_before_the_softcap(self):
        head = LMHead(torch.eye(3), logit_scale=0.5, logit_softcap=2.0)
        x = torch.tensor([-8.0, 0.5, 3.0])
        torch.testing.assert_close(head.logits(x), 2.0 * torch.tanh(0.5 * x / 2.0))
        assert head.options == {"bias": None, "logit_scale": 0.5, "logit_softcap": 2.0}


class TestCheck:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_softcap_that_the_config_does_not_tell(self, dtype):
        with pytest.raises(UnsupportedHead, match=r"^Capped: .*softcap None by .*use route='logits'$"):
            check_head(llama(Capped).to(dtype), SAMPLE)

    def test_a_softcap_that_the_class_does_not_apply(self):
        text = transformers.Gemma3TextConfig(**families.FAMILIES["gemma3"][2])
        sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        vision = transformers.SiglipVisionConfig(**sizes, image_size=28, patch_size=14)
        config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
        model = transformers.Gemma3ForConditionalGeneration(config).eval()
        with pytest.raises(UnsupportedHead, match="^Gemma3ForConditionalGeneration: its logits differ"):
            check_head(model, SAMPLE)
        model.config.text_config.final_logit_softcapping = None
        check_head(model, SAMPLE)

    def test_wrong_scale(self):
        model = families.build("cohere")
        model.config.logit_scale = 0.26  # the model has kept 0.25
        with pytest.raises(UnsupportedHead, match="scale 0.26"):
            check_head(model, SAMPLE)

    def test_a_head_that_is_more_than_a_matrix(self):
        class Gelu(nn.Linear):
            def forward(self, x):
                return F.gelu(super().forward(x))

        model = llama()
        model.lm_head = Gelu(32, 97)
        with pytest.raises(UnsupportedHead, match="its logits differ"):
            check_head(model, SAMPLE)

    def test_modes_and_random_state_are_left_alone(self):
        model = families.build("gpt2").train()  # with dropout
        model.transformer.h[0].eval()
        modes, state = [m.training for m in model.modules()], torch.get_rng_state()
        check_head(model, SAMPLE)
        assert [m.training for m in model.modules()] == modes
        assert torch.equal(torch.get_rng_state(), state)

    def test_nothing_to_see(self):
        model = llama()
        nn.init.zeros_(model.lm_head.weight)
        with pytest.raises(UnsupportedHead, match="too small"):
            check_head(model, SAMPLE)
        nn.init.constant_(model.model.norm.weight, float("nan"))
        with pytest.raises(UnsupportedHead, match="non-finite"):
            check_head(model, SAMPLE)

    def test_a_scale_that_is_no_number(self):
        model = llama()
        model.config.logit_scale = "inv_sqrt"
        with pytest.raises(UnsupportedHead, match="logit_scale='inv_sqrt'"):
            model_head(model)


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


def test_imports_neither_transformers_nor_peft():
    code = "import sys, sspo_ext.hf.head; sys.exit(bool({'transformers', 'peft'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.slow
def test_two_ranks(tmp_path):
    """DDP, FSDP2 in three layouts, tensor parallel: every rank gets the whole batch's gradients (hf_two_ranks.py)."""
    assert "all right" in torchrun("helpers.ranks.hf_two_ranks", tmp_path)
