# SPDX-License-Identifier: Apache-2.0
"""Hidden states and heads of real model classes, and the check that they give the model's own logits.

Mutations of sspo_ext/hf that these tests catch: softcap before scale; a field name forgotten; Granite multiplied; the
ladder without its gains; the check in float32 for float64 models; modes not restored.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")
import transformers
from helpers.hf import IDS, SAMPLE, llama, own_logits

from benchmarks.models import families
from sspo_ext.hf.check import check_head
from sspo_ext.hf.forward import forward_hidden
from sspo_ext.hf.head import LMHead, model_head
from sspo_ext.hf.wrappers import UnsupportedHead

pytestmark = pytest.mark.filterwarnings("ignore")


class Capped(transformers.LlamaForCausalLM):
    """Does to its logits what no config field tells."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = 30.0 * torch.tanh(outputs.logits / 30.0)
        return outputs


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
