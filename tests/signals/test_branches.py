# SPDX-License-Identifier: Apache-2.0
"""Log-probs of branches: three engines, one answer, on small models of many families.

Mutations of sspo_ext/signals/{branches,support}.py that turned a test red: the cached engine's mask without its hole
(test_engines_are_equal[llama-cached]); the window left out of the 4-D mask (test_engines_are_equal[mistral-packed]);
a bound from the weights' dtype, under the caller's autocast (test_*_autocast_does_not_count); every path beyond the
budget as a tree under a mask (test_beyond_the_budget_packed_costs_no_more_than_separate).
"""

import functools
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
from helpers.rl import make_tokenizer, make_trainer

from benchmarks.models import families
from sspo_ext.signals.branches import sample, support
from sspo_ext.signals.branches.branch import Branch
from sspo_ext.signals.branches.score import branch_logps
from sspo_ext.signals.branches.support import why_not

pytestmark = pytest.mark.filterwarnings("ignore")

close = functools.partial(torch.testing.assert_close, atol=5e-4, rtol=1e-5)
ENGINES = ("packed", "cached")

WAYS = (*ENGINES, "shared")
SLIDING = ("mistral", "gemma2", "gemma3")


@pytest.fixture(scope="module")
def models():
    built = {}

    def get(name):
        if name not in built:
            built[name] = families.enlarge(families.build(name))
        return built[name]

    return get


def tokens(n, seed):
    return torch.randint(3, 90, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


TRUNKS = [tokens(6, 1), tokens(17, 2), tokens(11, 3)]
BRANCHES = [
    Branch(0, 6, tokens(4, 4), 2),
    Branch(1, 3, tokens(5, 5)),  # scored from its first token, which the trunk's predicts
    Branch(1, 3, [*tokens(5, 5)[:3], *tokens(2, 6)], 1),  # shares a beginning with the one before
    Branch(1, 17, tokens(2, 7), 1),
    Branch(1, 17, tokens(1, 8)),
    Branch(2, 0, tokens(4, 9), 1),  # leaves before the first token
    Branch(1, 9, tokens(4, 10), 4),  # nothing scored
    Branch(2, 2, TRUNKS[2][2:9]),  # the trunk's own tokens
]
LONGEST = max(b.cut + len(b.ids) for b in BRANCHES)


def by_hand(model, branch):
    """The definition: log_softmax of the plain model on the path alone."""
    ids = torch.tensor([[*TRUNKS[branch.trunk][: branch.cut], *branch.ids]])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    logps = logits[:, -ids.shape[1] :].float().log_softmax(-1)  # without the logits of virtual tokens
    first = branch.cut + branch.start
    return logps[0, first - 1 : -1].gather(-1, ids[0, first:, None])[:, 0]


class TestEngines:
    @pytest.mark.parametrize("name", families.FAMILIES)
    def test_separate_is_the_models_own_log_softmax(self, models, name):
        got = branch_logps(models(name), TRUNKS, BRANCHES, engine="separate")
        close(got.tokens, torch.cat([by_hand(models(name), b) for b in BRANCHES]))
        assert got.offsets.tolist() == [0, 2, 7, 11, 12, 13, 16, 16, 23]

    @pytest.mark.parametrize("engine", WAYS)
    @pytest.mark.parametrize("name", families.FAMILIES)
    def test_engines_are_equal(self, models, name, engine):
        """In forwards of one row and of many; beyond the window of the models that have one."""
        if engine == "cached" and name in SLIDING and (reason := why_not(models(name), engine, LONGEST)):
            assert "sliding window" in reason
            pytest.skip(reason)
        expected = branch_logps(models(name), TRUNKS, BRANCHES, engine="separate")
        for max_tokens in (1, 15, 60, 4096):  # 15: some paths are longer, some are not
            got = branch_logps(models(name), TRUNKS, BRANCHES, engine=engine, max_tokens=max_tokens)
            close(got.tokens, expected.tokens)
            assert got.offsets.tolist() == expected.offsets.tolist()

    @pytest.mark.parametrize("engine", WAYS)
    @pytest.mark.parametrize("name", ("llama", "qwen2", "gpt2", "mistral"))
    def test_order_and_company_do_not_matter(self, models, name, engine):
        if reason := why_not(models(name), engine, LONGEST):
            pytest.skip(reason)
        whole = branch_logps(models(name), TRUNKS, BRANCHES, engine=engine)
        parts = whole.tokens.split(whole.offsets.diff().tolist())
        backwards = branch_logps(models(name), TRUNKS, BRANCHES[::-1], engine=engine)
        for part, again in zip(parts, reversed(backwards.tokens.split(backwards.offsets.diff().tolist())), strict=True):
            close(part, again)
        for part, branch in zip(parts, BRANCHES, strict=True):
            alone = branch_logps(models(name), TRUNKS, [branch], engine=engine).tokens
            close(part, alone)

    def test_trunks_that_begin_alike_share_their_beginning(self, models):
        """Eight chains behind a prompt of 40 tokens, which is computed once; nothing else is saved."""
        model, counts = models("llama"), {}
        prompt = tokens(40, 5)
        trunks = [[*prompt, 30 + b, *tokens(6, 20 + b)] for b in range(8)]
        branches = [Branch(b, cut, [3, 4, 5], 1) for b in range(8) for cut in (40, 44, 47)]
        for engine in ("packed", "shared"):
            branch_logps(model, trunks, branches, engine=engine)  # with its self-check
            seen = []
            hook = model.get_input_embeddings().register_forward_pre_hook(lambda m, a, s=seen: s.append(a[0].numel()))
            got = branch_logps(model, trunks, branches, engine=engine)
            hook.remove()
            counts[engine] = sum(seen)
            close(got.tokens, branch_logps(model, trunks, branches, engine="separate").tokens)
        # the branches behind the prompt alone are the same eight times: two tokens each
        assert counts == {"packed": 8 * (47 + 3 * 2), "shared": 40 + 2 + 8 * (7 + 2 * 2)}
        assert model.config._attn_implementation == "sdpa"

    @pytest.mark.parametrize("name", ("llama", "mistral"))
    def test_beyond_the_budget_packed_costs_no_more_than_separate(self, models, name):
        """The same chain, longer and longer: forwards and tokens, and no mask of ours on a path by itself."""
        model, seen = models(name), []

        def note(module, args, inputs):
            mask = inputs.get("attention_mask")
            seen.append((inputs["input_ids"].numel(), isinstance(mask, dict) or mask is not None and mask.ndim == 4))

        def cost(engine, trunk, max_tokens):
            branches = [Branch(0, cut, [3, 4, 5], 1) for cut in range(4, len(trunk) + 1, 4)]
            branch_logps(model, [trunk], branches, engine=engine, max_tokens=max_tokens)  # with its self-check
            seen.clear()
            hook = model.register_forward_pre_hook(note, with_kwargs=True)
            try:
                branch_logps(model, [trunk], branches, engine=engine, max_tokens=max_tokens)
            finally:
                hook.remove()
            assert not any(masked and size > max_tokens for size, masked in seen)
            return len(seen), sum(size for size, _ in seen)

        for length in (16, 28, 56):
            packed, separate = (cost(engine, tokens(length, 11), 30) for engine in ("packed", "separate"))
            assert packed[0] <= separate[0] + 1 and packed[1] < separate[1]
            if length == 16:
                assert packed == (1, 16 + 4 * 2)
            if length == 56 and name == "llama":  # a trunk's cache is shared by what is beyond the budget
                assert packed[1] < 30 * 3 + 56 + 14 * 3

    def test_eager_attention_gets_a_mask_that_is_added(self):
        model = families.enlarge(families.build("llama"))
        model.set_attn_implementation("eager")
        expected = branch_logps(model, TRUNKS, BRANCHES, engine="separate").tokens
        close(branch_logps(model, TRUNKS, BRANCHES, engine="packed").tokens, expected, atol=5e-4, rtol=0)

    @pytest.mark.parametrize("kind", ("PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"))
    def test_virtual_tokens_come_before_the_text(self, kind):
        peft = pytest.importorskip("peft")
        config = getattr(peft, kind)(num_virtual_tokens=3, task_type="CAUSAL_LM")
        model = peft.get_peft_model(families.enlarge(families.build("llama")), config).eval()
        expected = torch.cat([by_hand(model, b) for b in BRANCHES])
        for engine in ("separate", "auto"):
            close(branch_logps(model, TRUNKS, BRANCHES, engine=engine).tokens, expected)

    def test_sums_are_of_each_branch(self, models):
        got = branch_logps(models("llama"), TRUNKS, BRANCHES)
        expected = [part.sum() for part in got.tokens.split(got.offsets.diff().tolist())]
        close(got.sums(), torch.stack(expected))
        assert got.sums()[6] == 0

    def test_modes_and_gradients_are_left_alone(self, models):
        model = models("llama").train()
        try:
            got = branch_logps(model, TRUNKS, BRANCHES)
            assert model.training and model.model.layers[0].training
            assert not got.tokens.requires_grad and torch.is_grad_enabled()
        finally:
            model.eval()

    def test_the_head_computes_the_needed_positions_only(self, models):
        seen = []
        hook = models("llama").lm_head.register_forward_hook(lambda m, args, out: seen.append(out.shape[:-1].numel()))
        try:
            branch_logps(models("llama"), TRUNKS, BRANCHES, engine="packed")
        finally:
            hook.remove()
        assert sum(seen) == 23

    def test_nothing_to_score(self, models):
        for branches in ([], [BRANCHES[6]]):
            got = branch_logps(models("llama"), TRUNKS, branches)
            assert got.tokens.shape == (0,) and got.offsets.tolist() == [0] * (len(branches) + 1)

    @pytest.mark.parametrize(
        "branch", (Branch(3, 0, [5], 0), Branch(0, 7, [5]), Branch(0, 0, [5, 6], 0), Branch(0, 2, [5], 2))
    )
    def test_impossible_branches_are_named(self, models, branch):
        with pytest.raises(ValueError, match="branch 0"):
            branch_logps(models("llama"), TRUNKS, [branch])


class IgnoresMasks(nn.Module):
    """Reads every token before a position, whatever the mask says, as a recurrent model does."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(97, 97)
        self.config = SimpleNamespace(_attn_implementation="sdpa", eos_token_id=2)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        return SimpleNamespace(logits=self.embed(input_ids).cumsum(1))


def rounds_in_bf16():
    """fp32 weights, large enough that engines under bf16 autocast differ by .02, and by 1e-6 without it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(make_tokenizer()), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2,
        pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class TestSupport:
    def test_a_model_that_ignores_the_mask_is_found_out(self):
        model = IgnoresMasks()
        assert "differ from separate forwards" in why_not(model, "packed")
        assert "no cache" in why_not(model, "cached")
        assert support.choose_engine(model, "auto") == "separate"
        with pytest.raises(ValueError, match="engine: 'packed' cannot run IgnoresMasks: its log-probs differ"):
            branch_logps(model, TRUNKS, BRANCHES, engine="packed")
        close(branch_logps(model, TRUNKS, BRANCHES).tokens, torch.cat([hand_rolled(model, b) for b in BRANCHES]))

    @pytest.mark.parametrize(
        ("attention", "reason"),
        (("flex_attention", "does not support"), ("flash_attention_2", "4-D mask"), (None, "4-D mask")),
    )
    def test_attention_that_takes_no_mask_of_our_own_is_refused_unrun(self, attention, reason):
        model = IgnoresMasks()
        model.config._attn_implementation = attention
        assert reason in why_not(model, "packed")

    def test_unknown_layers_are_refused(self):
        model = IgnoresMasks()
        model.config.layer_types = ["full_attention", "linear_attention"]
        assert "linear_attention" in why_not(model, "packed")

    @pytest.mark.parametrize("engine", ENGINES)
    def test_asked_once_and_forgotten_with_the_model(self, engine):
        model, runs = families.enlarge(families.build("llama")), []
        model.register_forward_pre_hook(lambda module, args: runs.append(1))
        for _ in range(3):
            assert why_not(model, engine) is None
        assert len(runs) == {"packed": 5 + 1, "cached": 5 + 4}[engine]  # five paths alone, then together
        known = weakref.ref(model)
        del model
        assert known() is None

    def test_auto_takes_what_works(self, models):
        assert support.choose_engine(models("llama"), "auto") == "packed"
        assert support.choose_engine(models("mistral"), "auto", 40) == "packed"

    @pytest.mark.parametrize("engine", ENGINES)
    def test_autocast_of_the_callers_does_not_count(self, engine):
        """fp32 weights: what is checked is masks and positions, and bf16's rounding is no wrong mask."""
        with torch.autocast("cpu", torch.bfloat16):
            assert why_not(rounds_in_bf16(), engine) is None

    @pytest.mark.parametrize("peft", (False, True))
    def test_a_trainers_bf16_autocast_does_not_count(self, tmp_path, monkeypatch, peft):
        """accelerate puts autocast into model.forward itself."""
        ran = []
        name = "sspo_ext.signals.branches.score.run_engine"
        monkeypatch.setattr(name, lambda *a, run=support.run_engine, **o: ran.append(a[3]) or run(*a, **o))
        options = {}
        if peft:
            options["peft_config"] = pytest.importorskip("peft").LoraConfig(r=2, target_modules=["q_proj"])
        make_trainer(tmp_path, model=rounds_in_bf16(), max_steps=1, bf16=True, **options).train()
        assert ran == ["shared"]

    def test_separate_without_a_known_reason_is_told_once(self, caplog):
        model = IgnoresMasks()
        for engine in ("packed", "cached", "auto"):
            for _ in range(2):
                if engine == "auto":
                    assert support.choose_engine(model, engine) == "separate"
                else:
                    why_not(model, engine)
        warned = [r.message for r in caplog.records if r.levelname == "WARNING"]
        assert len(warned) == 1 and "packed: its log-probs differ" in warned[0] and "cached: " in warned[0]
        assert sample.sample_branches(model, [[5, 6]], [Branch(0, 2, [])], 1, max_new_tokens=1)
        caplog.clear()
        model = IgnoresMasks()
        model.config._attn_implementation = "flash_attention_2"
        assert support.choose_engine(model, "auto", among=("packed", "separate")) == "separate"
        assert not [r for r in caplog.records if r.levelname == "WARNING"]

    def test_unknown_engine(self, models):
        with pytest.raises(ValueError, match="engine: expected one of"):
            branch_logps(models("llama"), TRUNKS, BRANCHES, engine="fast")


def hand_rolled(model, branch):
    ids = torch.tensor([[*TRUNKS[branch.trunk][: branch.cut], *branch.ids]])
    with torch.no_grad():
        logps = model(ids).logits.log_softmax(-1)
    first = branch.cut + branch.start
    return logps[0, first - 1 : -1].gather(-1, ids[0, first:, None])[:, 0]
