# SPDX-License-Identifier: Apache-2.0
"""An adapter as the start: its folder as --model, and models of which nothing would be trained."""

import json
import math
import warnings

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sspo_ext.cli.main import main
from sspo_ext.train.models import adapter_base, load_model, load_tokenizer, with_adapter
from sspo_ext.train.preference_config import StepPreferenceConfig
from sspo_ext.train.preference_trainer import StepPreferenceTrainer
from sspo_ext.train.sspo_config import SSPOConfig
from sspo_ext.train.sspo_trainer import SSPOTrainer

peft = pytest.importorskip("peft")

PAIRS = [
    {"prompt": f"{a}+{b}=", "chosen": f"{a + b}\n", "rejected": f"{a + b + 1}\n"} for a in range(3) for b in range(3)
]
PROBLEMS = [{"prompt": f"{a}+1=", "answer": str(a + 1)} for a in range(4)]


def make_model():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, pad_token_id=0, eos_token_id=1, initializer_range=0.3, **shape))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base model with its tokenizer, and an adapter of it that says something else, without a tokenizer."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    base, adapter = (str(tmp_path_factory.mktemp(name)) for name in ("base", "adapter"))
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *"0123456789+=\n#"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(base)
    make_model().save_pretrained(base)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(load_model(base)[0], config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora" in name:
                weight += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(adapter)
    return base, adapter


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(2, 12)[None]).logits


def test_what_peft_reads_warns_of_nothing(folders):
    """peft 0.21 reads a name that transformers 5.24 has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*gradient_checkpointing", FutureWarning)
        load_model(folders[1])
        with_adapter(make_model(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


def test_load_model_gives_the_adapter_trainable_on_its_base(folders):
    base, adapter = folders
    model, tokenizer = load_model(adapter)
    assert isinstance(model, peft.PeftModel) and not model.training
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, p in model.named_parameters() if "lora" in name
    }
    expected = peft.PeftModel.from_pretrained(load_model(base)[0], adapter)
    assert torch.equal(logits(model), logits(expected))
    assert (logits(model) - logits(load_model(base)[0])).abs().max() > 1e-2
    assert tokenizer.get_vocab() == load_tokenizer(base).get_vocab()
    assert adapter_base(adapter) == base and adapter_base(base) is None


def test_train_goes_on_from_the_adapter(folders, tmp_path, capsys):
    """The first loss is log 2: the reference is the model with the adapter. The saved adapter is the trained one."""
    _, adapter = folders
    data, out = write(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "out"
    more = ["--batch-size", "3", "--max-steps", "2", "--lr", "1e-2", "--logging-steps", "1", "--save-steps", "1"]
    assert main(["train", "--model", adapter, "--data", data, "--output-dir", str(out), *more]) == 0
    state = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())
    logged = 0.6931 if transformers.__version__.startswith("4.") else math.log(2)  # 4 rounds it
    assert state["log_history"][0]["loss"] == pytest.approx(logged, abs=1e-5)
    trained, before = logits(load_model(out)[0]), logits(load_model(adapter)[0])
    assert 0 < (trained - before).abs().max()
    first = sum(p.numel() for p in load_model(adapter)[0].parameters())
    assert sum(p.numel() for p in load_model(out)[0].parameters()) == first, "one adapter, not two"


def test_rl_goes_on_from_the_adapter(folders, tmp_path):
    """With beta the KL starts at 0: the reference is the model with the adapter."""
    _, adapter = folders
    data, out = write(tmp_path / "problems.jsonl", PROBLEMS), tmp_path / "out"
    more = ["--batch-size", "4", "--num-generations", "4", "--max-completion-length", "6", "--max-steps", "2"]
    more += ["--beta", "0.1", "--lr", "1e-2", "--combine", "outcome", "--save-steps", "1", "--grader", "exact:="]
    assert main(["rl", "--model", adapter, "--data", data, "--output-dir", str(out), *more]) == 0
    state = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["log_history"][0]["kl"] == pytest.approx(0, abs=1e-6)
    assert isinstance(load_model(out)[0], peft.PeftModel)


@pytest.mark.parametrize("command", ["train", "rl"])
def test_a_new_adapter_over_the_adapter_is_an_error(folders, tmp_path, capsys, command):
    _, adapter = folders
    data = write(tmp_path / "rows.jsonl", PAIRS if command == "train" else PROBLEMS)
    assert main([command, "--model", adapter, "--data", data, "--output-dir", str(tmp_path / "out"), "--lora-r", "2"])
    said = capsys.readouterr().err
    assert "--lora-r: expected 0, since --model" in said and "is an adapter" in said and "Traceback" not in said


def test_a_new_adapter_over_adapter_layers_is_an_error():
    """What `AutoModelForCausalLM.from_pretrained(ADAPTER)` gives: adapter layers, and no PeftModel."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.inject_adapter_in_model(config, make_model())
    with pytest.raises(ValueError, match="peft_config: expected a model without an adapter"):
        with_adapter(model, config)


def preference_trainer(model, folder, rows):
    args = StepPreferenceConfig(str(folder), use_cpu=True, report_to="none", max_steps=1, disable_tqdm=True)
    row = {"pairs": [[0, 0]], "weight": 1.0, "margin": 0.0, "source": "test:1"}
    for side, ids in (("chosen", [3, 4, 5, 6]), ("rejected", [3, 4, 9])):
        row |= {f"{side}_input_ids": ids, f"{side}_labels": [-100, -100, *ids[2:]]}
        row[f"{side}_step_ids"] = [-1, -1, *(0 for _ in ids[2:])]
    return StepPreferenceTrainer(model, args, *([row] if r else None for r in rows))


def sspo_trainer(model, folder, rows, tokenizer):
    args = SSPOConfig(
        str(folder), use_cpu=True, report_to="none", max_steps=1, num_generations=2, per_device_train_batch_size=2,
        max_completion_length=2, combine="outcome", disable_tqdm=True,
    )  # fmt: skip

    def reward(prompt, completion, answer):
        return 1.0

    given = [PROBLEMS if r else None for r in rows]
    return SSPOTrainer(model, args, reward, *given, processing_class=tokenizer)


@pytest.mark.parametrize("kind", ["preference", "sspo"])
@pytest.mark.parametrize("what", ["frozen model", "adapter for inference"])
def test_nothing_to_train_is_an_error_at_the_start(folders, tmp_path, kind, what):
    base, adapter = folders
    model, tokenizer = load_model(base)
    if what == "frozen model":
        model.requires_grad_(False)
    else:
        model = peft.PeftModel.from_pretrained(model, adapter)

    def make(*rows):
        if kind == "preference":
            return preference_trainer(model, tmp_path, rows)
        return sspo_trainer(model, tmp_path, rows, tokenizer)

    with pytest.raises(ValueError, match="model: expected parameters that require a gradient, got none"):
        make(True, False)
    make(False, True).evaluate()
    with pytest.raises(ValueError, match="model: expected parameters that require a gradient, got none"):
        make(False, True).train()


def test_an_adapter_must_name_a_whole_model(folders, tmp_path):
    _, adapter = folders
    settings = json.loads(open(f"{adapter}/adapter_config.json").read())
    for base, match in ((None, "expected base_model_name_or_path"), (adapter, "whose base model is an adapter itself")):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": base}))
        with pytest.raises(ValueError, match=match):
            load_model(tmp_path)
