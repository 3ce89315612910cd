# SPDX-License-Identifier: Apache-2.0
"""Which models run trees, what is refused and how, and the attention that a model has meanwhile."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
import transformers

from benchmarks.models import families, trees
from sspo_ext.tree import TokenTree, UnsupportedTree, inputs, support, tree_attention, tree_inputs, why_not

pytestmark = pytest.mark.filterwarnings("ignore")

TREE = TokenTree.from_sequences([[5, 6, 7, 8], [5, 6, 9], [10, 11]])


class TestInputs:
    def test_what_a_model_gets(self):
        got = tree_inputs(families.build("llama"), TREE)
        assert got.keys() == {"input_ids", "position_ids", "attention_mask"}
        assert torch.equal(got["input_ids"], TREE.input_ids) and torch.equal(got["position_ids"], TREE.position_ids)
        assert got["attention_mask"].shape == (2, 1, 5, 5) and got["attention_mask"].dtype == torch.bool

    def test_eager_attention_gets_a_mask_that_is_added(self):
        model = families.build("llama", torch.bfloat16)
        with tree_attention(model, "eager"):
            mask = tree_inputs(model, TREE)["attention_mask"]
        assert mask.dtype == torch.bfloat16 and set(mask.unique().tolist()) == {0.0, torch.finfo(torch.bfloat16).min}

    def test_layers_of_two_kinds_get_two_masks(self):
        mask = tree_inputs(families.build("gemma3", **trees.MODELS["gemma3"][1]), TREE)["attention_mask"]
        assert mask.keys() == {"full_attention", "sliding_attention"}

    def test_nothing_to_run(self):
        """One position of padding: a forward, finite logits, and a gradient of nothing."""
        model = families.build("llama")
        logits = model(**tree_inputs(model, TokenTree.from_sequences([[], []]))).logits
        assert logits.shape[:2] == (1, 1) and torch.isfinite(logits).all()

    @pytest.mark.parametrize("name", ("gpt2", "opt"))
    def test_positions_end(self, name):
        model = families.build(name)
        tree_inputs(model, TokenTree.from_sequences([[5] * 64, [6] * 64]))
        with pytest.raises(
            ValueError, match=r"tree: expected at most 64 tokens, which is where the positions .* got 65"
        ):
            tree_inputs(model, TokenTree.from_sequences([[5] * 65]))

    def test_no_tree(self):
        with pytest.raises(TypeError, match="tree: expected a TokenTree, got"):
            tree_inputs(families.build("llama"), [[5, 6]])

    def test_a_loss_of_routers_is_refused(self):
        model = families.build("mixtral")
        with pytest.raises(UnsupportedTree, match=r"MixtralForCausalLM .*2-D mask.*output_router_logits = False"):
            tree_inputs(model, TREE)


class IgnoresMasks(nn.Module):
    """Reads every token before a position, whatever the mask says, as a recurrent model does."""

    def __init__(self, attention="sdpa"):
        super().__init__()
        self.embed = nn.Embedding(97, 97)
        self.config = SimpleNamespace(_attn_implementation=attention)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        return SimpleNamespace(logits=self.embed(input_ids).cumsum(1))


class IgnoresPositions(transformers.LlamaForCausalLM):
    def forward(self, *args, position_ids=None, **kwargs):
        return super().forward(*args, **kwargs)


class WindowByColumn(transformers.MistralForCausalLM):
    """Its window counts columns, and is added to every mask."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, **kwargs):
        if attention_mask is not None and attention_mask.ndim == 4:
            column = torch.arange(attention_mask.shape[-1])
            attention_mask = attention_mask & (column[:, None] - column < self.config.sliding_window)
        return super().forward(input_ids, attention_mask, position_ids, **kwargs)


class TestRefusals:
    def test_the_self_check_finds_out(self):
        assert "differ from separate forwards" in why_not(IgnoresMasks())
        options = families.FAMILIES["llama"][2]
        torch.manual_seed(0)
        model = families.enlarge(IgnoresPositions(transformers.LlamaConfig(**options))).eval()
        assert "differ from separate forwards" in why_not(model)
        with pytest.raises(
            UnsupportedTree, match="IgnoresPositions cannot run a tree: its log-probs differ .* unshared"
        ):
            tree_inputs(model, TREE)

    def test_the_self_check_goes_beyond_a_window_where_the_paths_do(self):
        torch.manual_seed(0)
        options = families.FAMILIES["mistral"][2] | {"sliding_window": 40}
        model = families.enlarge(WindowByColumn(transformers.MistralConfig(**options))).eval()
        assert "differ from separate forwards" in why_not(model, 60)

    @pytest.mark.parametrize("attention", ("flash_attention_2", "paged_attention", None))
    def test_attention_without_a_mask(self, attention):
        model = IgnoresMasks(attention)
        assert why_not(model) == f"attention {attention!r} takes no 4-D mask"
        with pytest.raises(UnsupportedTree, match="IgnoresMasks cannot run a tree: attention .*with tree_attention"):
            tree_inputs(model, TREE)

    @pytest.mark.parametrize("kind", ("chunked_attention", "linear_attention", "mamba", "conv"))
    def test_layers_that_are_no_attention(self, kind):
        model = IgnoresMasks()
        model.config.layer_types = ["full_attention", kind]
        assert why_not(model) == f"layers of type {kind} take no 4-D mask"

    def test_recurrent_models(self):
        config = transformers.MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1, state_size=4)
        model = transformers.MambaForCausalLM(config)
        assert "take no 4-D mask" in why_not(model)
        with pytest.raises(UnsupportedTree, match="MambaForCausalLM"), tree_attention(model):
            pass

    def test_a_model_that_counts_its_positions_itself(self):
        torch.manual_seed(0)
        config = transformers.BloomConfig(vocab_size=97, hidden_size=16, n_layer=1, n_head=2)
        assert why_not(transformers.BloomForCausalLM(config)) is not None

    def test_the_check_is_made_once_and_forgotten_with_the_model(self, monkeypatch):
        model, runs = families.build("llama").train(), []
        model.register_forward_pre_hook(lambda module, args: runs.append(module.training))
        for longest in (0, 10, 1000):
            assert why_not(model, longest) is None
        assert runs == [False] * 6 and model.training  # five paths alone, then one tree
        with tree_attention(model, "eager"):
            assert why_not(model) is None
        assert len(runs) == 12
        known = weakref.ref(model)
        del model
        assert known() is None


class TestAttention:
    def test_auto_keeps_what_takes_trees(self):
        model = families.build("llama")
        for attention, expected in (("sdpa", "sspo_tree"), ("eager", "eager")):
            model.set_attn_implementation(attention)
            with tree_attention(model) as name:
                assert name == expected == model.config._attn_implementation
            assert model.config._attn_implementation == attention

    def test_its_own_comes_back(self):
        model = families.build("llama")
        model.config._attn_implementation = "flash_attention_2"
        with tree_attention(model) as name:
            assert name == "sdpa" == model.config._attn_implementation
            tree_inputs(model, TREE)
        assert model.config._attn_implementation == "flash_attention_2"

    def test_its_own_comes_back_after_an_error(self):
        model = families.build("llama")
        with pytest.raises(ZeroDivisionError), tree_attention(model, "eager"):
            raise ZeroDivisionError
        assert model.config._attn_implementation == "sdpa"

    def test_flex_comes_first_on_a_gpu(self, monkeypatch):
        model = families.build("llama")
        monkeypatch.setattr(inputs, "model_device", lambda model: torch.device("cuda"))
        candidates = inputs._candidates
        assert candidates(model, model.config) == ["flex_attention", "sdpa", "eager"]
        model.config.attention_dropout = 0.1
        assert candidates(model, model.config) == ["sdpa", "eager"]

    def test_only_the_decoder_of_a_model_with_pictures_changes(self):
        text = families.FAMILIES["gemma3"][2]
        vision = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=28)
        config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
        model = transformers.Gemma3ForConditionalGeneration(config).eval()
        with tree_attention(model, "eager"):
            assert model.config.text_config._attn_implementation == "eager"
            assert model.config.vision_config._attn_implementation == "sdpa"
        assert model.config.text_config._attn_implementation == "sdpa"

    def test_all_that_was_tried_is_told(self):
        model = families.build("llama")
        model.config.layer_types = ["chunked_attention"] * 2
        with pytest.raises(UnsupportedTree, match="with sdpa: layers of type .*; with eager: layers"):
            with tree_attention(model):
                pass

    def test_unknown_attention(self):
        with pytest.raises(
            ValueError, match="attention: expected one of 'auto', 'flex_attention', 'sspo_tree', 'sdpa'"
        ):
            with tree_attention(families.build("llama"), "flash"):
                pass

    def test_a_lora_model(self):
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(families.build("llama"), peft.LoraConfig(task_type="CAUSAL_LM"))
        with tree_attention(model, "eager"):
            assert model(**tree_inputs(model, TREE)).logits.shape[:2] == (2, 5)
        assert support.attention_of(support.text_config(model)) == "sdpa"
