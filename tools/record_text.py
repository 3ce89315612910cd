# SPDX-License-Identifier: Apache-2.0
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false, reportReturnType=false, reportPrivateImportUsage=false
# (calls are made from tables of options, for the package of today and for older ones)
"""The cases of record_outputs.py from text to trainers: signals, hidden states, rows, graders, trainers, command line.

Everything is tiny and made here: models with random weights, a tokenizer of bytes. Only the demo's model is a file of
the package. What holds a time or a path of this machine is left out of the outputs.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import tempfile
import warnings
from pathlib import Path

import torch
from record_outputs import Record, find

from sspo_ext import signals
from sspo_ext.hf import check_head, forward_hidden, forward_logits_at, model_head
from sspo_ext.signals import StepBatch, StepValues

PROMPTS = ["2 + 3 = ?\n", "问：二加三？\n", "rev a b\n"]
TEXTS = [
    "2 + 3 = 5\n\n5 * 4 = 20\nA: 20",
    "  Step 1: add.\n\n  2) halve. It is 3!\n(3) done? yes\n\n\n",
    "第一步：计算。\n\n1、二加三\n2、答案 42 😀\n",
    "one line",
    "\n\n",
    "",
    "**Step 4:** x\r\n\r\n5. y\r\n",
]
SPLITS = ["newline", "blank_line", "numbered", r"(?<=[.!?])\s+", r"(?=Step)", r"\n+"]
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def quiet() -> None:
    from transformers.utils.logging import disable_progress_bar

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    disable_progress_bar()


def make_tokenizer(chat: bool = False):
    """Every byte is a token: Chinese and emoji are several tokens each."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<eos>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", chat_template=CHAT if chat else None
    )


def small_tokenizer():
    """A few characters: a random model then ends a line, and its turn, soon."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<eos>", "<pad>", *"\n0123456789+=#: 好🙂"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


class Says:
    """A rollout engine that says texts in turn, so that rewards, steps and ends differ."""

    texts = ("1+1\n#2<eos>", "3<eos>", "0\n1\n2<eos>", "=\n:")

    def __init__(self, tokenizer):
        self.completions = [tokenizer(text).input_ids for text in self.texts]

    def complete(self, model, prompts, sampling, seeds):
        return [self.completions[seed[-1] % len(self.completions)] for seed in seeds]


def make_model(dtype: torch.dtype = torch.float32, **options):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    config = LlamaConfig(**{**sizes, "pad_token_id": 1, "bos_token_id": None, "eos_token_id": 0, **options})
    return enlarged(LlamaForCausalLM(config)).to(dtype)


def enlarged(model):
    """Weights so large that a context counts."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p *= 4.0
    return model


def dig(prompt, completion, answer=None) -> float:
    """A reward that differs between what a random model writes."""
    return (len(completion) % 5) / 4


# ---- signals


def splitting(rec: Record) -> None:
    quiet()
    tokenizer = make_tokenizer()
    for by in SPLITS:
        for n, text in enumerate(TEXTS):
            spans = rec.case(f"{by}/{n}/spans", signals.split_text, text, by)
            offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
            for dense in (True, False):
                rec.case(f"{by}/{n}/{dense}", signals.token_step_ids, text, offsets, spans, dense=dense)
        mask = rec.case(f"{by}/mask", signals.delimiter_mask, tokenizer, by, vocab_size=300)
        if mask is None:
            continue
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor([*tokenizer(t).input_ids, 0], dtype=torch.int64) for t in TEXTS], True, padding_value=1
        )
        for name, response in (("all", ids != 1), ("part", (ids != 1) & (torch.arange(ids.shape[1]) % 7 != 3))):
            rec.case(f"{by}/ids, {name}", signals.step_ids_from_tokens, ids, response, mask)
            rec.case(f"{by}/bool, {name}", signals.step_ids_from_tokens, ids, response, mask > 0)
    for name in ("newlines", "(", 3):
        rec.case(f"refused/{name}", signals.split_text, "a\nb", name)
    rec.case("probes", lambda: {name: signals.as_probe(name) for name in (*signals.PROBES, "French", "So: ", "jp")
                                if name != "jp"})  # fmt: skip
    rec.case("refused probe", signals.as_probe, "jp")


def advantages(rec: Record) -> None:
    for dtype in (torch.float32, torch.float64):
        g = torch.Generator().manual_seed(3)
        offsets = torch.tensor([0, 4, 5, 12, 14, 17])
        values = StepValues.from_tensor(torch.rand(17, generator=g, dtype=dtype), offsets)
        rewards, shaped = torch.rand(5, generator=g), torch.randn(values.num_steps, generator=g)
        groups = torch.tensor([7, 7, 2, 2, 2])
        rec.add(f"{dtype}/values", {"lists": str(values.to_lists()), "per": values.steps_per_sequence,
                                    "sequence": values.step_sequence})  # fmt: skip
        for gamma, lam in ((1.0, 1.0), (0.9, 0.0), (0.9, 0.5), (0.0, 1.0)):
            for normalize in ("none", "batch", "group"):
                more = {"groups": groups} if normalize == "group" else {}
                for name, steps in (("", None), (", shaped", shaped)):
                    rec.case(f"{dtype}/gae/{gamma}/{lam}/{normalize}{name}", signals.step_gae, values, rewards,
                             gamma=gamma, lam=lam, normalize=normalize, step_rewards=steps, **more)  # fmt: skip
        for name in signals.BASELINES:
            outcome = rec.case(f"{dtype}/{name}", signals.outcome_advantages, rewards.to(dtype), name, groups=groups)
            for how in ("add", "multiply", "replace"):
                rec.case(f"{dtype}/{name}/{how}", signals.combine_advantages, shaped.to(dtype), outcome,
                         values.step_sequence, how, step_scale=0.5, outcome_scale=2.0)  # fmt: skip
    labels, ids = torch.tensor([[9, 4, 5, 6, 8], [9, 4, 7, 6, 8]]), torch.tensor([[-1, 0, 0, 1, 1], [-1, 0, 0, 1, 1]])
    rec.case("divergence", signals.divergence_weights, labels, ids, torch.tensor([[0, 2]]))
    rec.case("divergence, none", signals.divergence_weights, labels, ids, torch.tensor([[1, 3]]))
    rec.case("step batch", lambda: StepBatch.from_tensors(labels, ids, torch.tensor([[1, 1, 1, 1, 0], [1] * 5])))


def make_batch(tokenizer) -> StepBatch:
    steps = [["2 + 3 = 5\n", "#### 5"], ["二加三是五 🙂\n", "好\n", "#### 5"], []]
    ids = [[tokenizer(s).input_ids for s in some] for some in steps]
    ids[0][-1] = [*ids[0][-1], 0]  # an end of sequence
    return StepBatch([tokenizer(p).input_ids for p in PROMPTS], ids)


def probing(rec: Record) -> None:
    quiet()
    tokenizer = make_tokenizer(chat=True)
    batch, answers = make_batch(tokenizer), ["5", ["5", "五"], 7]
    models = {"fp32": make_model(), "bf16": make_model(torch.bfloat16), "window": windowed(), "gpt2": gpt2()}
    for name, model in models.items():
        for engine in ("auto", "separate", "packed", "cached"):
            if engine != "auto":
                rec.case(f"{name}/why not {engine}", lambda m, e: str(signals.why_not(m, e, 60)), model, engine)
            for reduce in ("joint", "mean"):
                rec.case(f"{name}/{engine}/{reduce}", probed, model, batch, "en", answers, tokenizer=tokenizer,
                         engine=engine, reduce=reduce, max_tokens=300)  # fmt: skip
            if engine != "packed":
                rec.case(f"{name}/{engine}/graded", probed, model, batch, "####", answers, tokenizer=tokenizer,
                         engine=engine, mode="graded", num_samples=2, max_answer_tokens=4, temperature=1.5,
                         grader=lambda text, answer: len(text) % 3 / 2)  # fmt: skip
        trunks = [batch.sequence(b) for b in range(2)]
        branches = [signals.Branch(t, cut, list(range(2 + cut, 6 + cut)), start) for t in (0, 1)
                    for cut, start in ((3, 0), (9, 2), (len(trunks[t]), 1))]  # fmt: skip
        for engine in ("separate", "packed", "cached"):
            rec.case(f"{name}/branches/{engine}", signals.branch_logps, model, trunks, branches, engine=engine)
        sample = find("signals.sample:sample_branches", "signals.branches.sample:sample_branches")
        for engine, temperature in (("separate", 1.0), ("cached", 1.0), ("cached", 0.0)):
            rec.case(f"{name}/sampled/{engine}/{temperature}", sample, model, trunks, branches, 3, max_new_tokens=5,
                     eos_token_ids=[0], temperature=temperature, seed=4, engine=engine)  # fmt: skip
    model = models["fp32"]
    for language in signals.PROBES:
        rec.case(f"language/{language}", probed, model, batch, language, answers, tokenizer=tokenizer)
    rec.case("a probe each", probed, model, batch, ["en", "zh", signals.Probe("A:", ends=("\n", " "))], answers,
             tokenizer=tokenizer)  # fmt: skip
    rec.case("turn", probed, model, batch, signals.Probe("Answer now.", turn=True), answers, tokenizer=tokenizer)
    rec.case("ids", probed, model, batch, [5, 6], [[7, 8], [[7], [8, 9]], [3]])
    rec.case("refused", probed, model, batch, "jp", answers, tokenizer=tokenizer)


def probed(*args, **kwargs):
    values = signals.probe_step_values(*args, **kwargs)
    return {"values": values.values, "offsets": values.offsets}


def windowed():
    return make_family("MistralForCausalLM", "MistralConfig", {**GROUPED, **BYTES, "sliding_window": 24})


def gpt2():
    return make_family(
        "GPT2LMHeadModel", "GPT2Config", {**GPT2, "vocab_size": 258, "n_positions": 256, "eos_token_id": 0}
    )


def tracing(rec: Record) -> None:
    quiet()
    tokenizer, model = make_tokenizer(), make_model()
    batch, answers = make_batch(tokenizer), ["5", "五", "c"]
    some = {"split_by": r"(?<=[a-z0-9])", "num_candidates": 6, "max_step_tokens": 24, "max_continuation_tokens": 8,
            "temperature": 1.2, "seed": 3}  # fmt: skip
    for value in ("probe", "continuation", "both"):
        for engine in ("auto", "separate", "cached"):
            grader = None if value == "probe" else (lambda text, answer: len(text) % 4 / 3)
            nodes = rec.case(f"{value}/{engine}", signals.trace_candidates, model, tokenizer, batch, answers,
                value=value,
                             engine=engine, grader=grader, final=r"[0-9]$", **some)  # fmt: skip
            if nodes is None:
                continue
            for weight, margin, most in (("one", "none", None), ("gap", "gap", 2)):
                pairs = signals.pair_candidates(nodes, min_gap=0.0, weight=weight, margin=margin, max_pairs=most)
                rec.add(f"{value}/{engine}/{weight}", json.dumps(signals.pair_rows(pairs, PROMPTS, [["a\n"] * 4] * 3)))
    rollouts = StepBatch([[5, 6]] * 4, [[[7, 8], [9]], [[7, 8], [10]], [[11]], [[7, 8]]])
    nodes = signals.nodes_from_rollouts(rollouts, torch.linspace(-1, 1, 6), tokenizer)
    rec.add("rollouts", nodes)
    rec.add("rollouts/pairs", json.dumps(signals.pair_rows(signals.pair_candidates(nodes), ["p"] * 4, [["a"] * 3] * 4)))


# ---- hidden states


SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0,
         "intermediate_size": 48, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
BYTES = {"vocab_size": 258, "eos_token_id": 0, "pad_token_id": 1, "bos_token_id": None}
GPT2 = {
    "vocab_size": 97,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**GROUPED, "tie_word_embeddings": False}),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", {**GROUPED, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**GROUPED, "head_dim": 8, "final_logit_softcapping": 2.0}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 8}),
    "phi": ("PhiForCausalLM", "PhiConfig", SIZES),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "opt": ("OPTForCausalLM", "OPTConfig", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 16}),
    "cohere": ("CohereForCausalLM", "CohereConfig", {**GROUPED, "logit_scale": 0.25}),
    "granite": ("GraniteForCausalLM", "GraniteConfig", {**GROUPED, "logits_scaling": 3.0}),
    "bert": ("BertLMHeadModel", "BertConfig", {**SIZES, "is_decoder": True}),
}


def make_family(model_class: str, config_class: str, options: dict):
    import transformers

    torch.manual_seed(1)
    return enlarged(getattr(transformers, model_class)(getattr(transformers, config_class)(**options)))


def hidden_states(rec: Record) -> None:
    quiet()
    g = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 97, (2, 9), generator=g)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name, made in FAMILIES.items():
        model = make_family(*made).eval()
        hidden = rec.case(f"{name}/hidden", lambda m: forward_hidden(m, **inputs)[0], model)
        rec.case(f"{name}/logits at", lambda m: forward_logits_at(m, torch.tensor([3, 17, 3, 0]), **inputs)[0], model)
        for how in (model_head, check_head):
            arguments = (model,) if how is model_head else (model, inputs)
            head = rec.case(f"{name}/{how.__name__}", how, *arguments)
        if head is not None and hidden is not None:
            rec.case(f"{name}/post", lambda h, x: h.post(torch.nn.functional.linear(x, h.weight, h.bias)), head, hidden)
            rec.case(f"{name}/gradient", lambda m: of_gradient(m, forward_hidden(m, **inputs)[0]), model)


def of_gradient(model, hidden) -> dict:
    model.zero_grad()
    hidden.square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# ---- rows


USER = [{"role": "user", "content": "p?"}]
ROWS = [
    {"prompt": "Q:\n", "chosen": "a\nb\nc", "rejected": "a\nx\nc d", "weight": 2, "margin": 0.5},
    {"prompt": "Q: 和\n", "chosen": ["a", "b\n", "c 😀"], "rejected": ["a", "d"], "branch": 1},
    {"prompt": "p", "initial_reason_steps": "Step 1: a\nStep 2:", "chosen": " b", "rejected": " c"},
    {"prompt": "p", "chosen": "long one. Two of it.\n\nThird", "rejected": "short", "partial": True},
]
CHAT_ROWS = [
    {"prompt": USER, "chosen": [{"role": "assistant", "content": "a\nb"}], "rejected": "c\nd"},
    {
        "chosen": [*USER, {"role": "assistant", "content": "a"}],
        "rejected": [*USER, {"role": "assistant", "content": "b\n"}],
    },
]
PRM_ROWS = [
    {"prompt": "2+3\n", "completions": ["two", "five"], "labels": [True, True]},
    {"prompt": "2+3\n", "completions": ["two", "six"], "labels": [True, False]},
    {"prompt": "2+3\n", "completions": ["no"], "labels": [False]},
]


def as_text(fn, *args, **kwargs) -> str:
    return json.dumps(fn(*args, **kwargs), ensure_ascii=False)


def rows(rec: Record) -> None:
    quiet()
    from sspo_ext.train import load_preference_rows, tokenize_rows

    collator = find("train.collator:StepPreferenceCollator", "data.collator:StepPreferenceCollator")
    forms = {"plain": ROWS, "chat": CHAT_ROWS, "prm": PRM_ROWS}
    for form, given in forms.items():
        tokenizer = make_tokenizer(chat=form == "chat")
        for separator in ("\n", " "):
            found = rec.case(
                f"{form}/rows/{separator!r}", as_text, load_preference_rows, given, step_separator=separator
            )
        found = json.loads(found)
        for name, options in {
            "default": {}, "branch": {"pair_by": "branch"}, "sequence": {"pair_by": "sequence"},
            "no eos": {"add_eos": False},
            "shared": {"skip_shared": False}, "sentences": {"split_by": r"(?<=[.!?])\s+"}, "cut": {"max_length": 24,
            "overflow": "cut"},
            "drop": {"max_length": 24}, "error": {"max_length": 9, "overflow": "error"},
            "divergence": {"pair_by": "branch", "token_weights": "divergence"}, "blank": {"split_by": "blank_line"},
        }.items():  # fmt: skip
            features = rec.case(f"{form}/tokens/{name}", as_text, tokenize_rows, found, tokenizer, **options)
            features = features and json.loads(features)
            for packing, more in {
                "padded": {}, "packed": {"packed": True}, "flash": {"packed": True, "flash_attention": True},
                "multiple": {"pad_to_multiple_of": 16, "vocab_size": 258},
            }.items() if features else ():  # fmt: skip
                rec.case(f"{form}/batch/{name}/{packing}", lambda f, m: collator(1, **m)(f), features, more)
    bad = [ROWS[0], {"prompt": "x", "chosen": "y"}, {"prompt": "x", "chosen": 3, "rejected": "z"}]
    rec.case("bad rows", load_preference_rows, bad)
    chains = [
        {"id": "sum", "prompt": "Q: 2 + 3?\n", "response": "2 + 3 = 5\n#### 5", "answer": "5"},
        {"id": "和", "prompt": "问\n", "response": ["二加三 🙂", "#### 5"], "answer": ["5", "五"], "reward": 0.5},
        {"id": "none", "prompt": "Q: 1?\n", "response": None, "answer": 1},
        {"id": "wrong", "prompt": "Q\n", "response": "#### 6", "answer": "5", "is_correct": False},
    ]
    load_chains = find("train.chains:load_chains", "tracing.chains:load_chains")
    from sspo_ext.train import load_grader

    for name, options in {"default": {}, "short": {"max_length": 20}, "blank": {"split_by": "blank_line"}}.items():
        rec.case(f"chains/{name}", load_chains, chains, make_tokenizer(), grader=load_grader("exact"), **options)


def grading(rec: Record) -> None:
    quiet()
    from sspo_ext.train import load_grader

    places = {
        name: (f"train.grade:{name}", f"data.graders:{name}")
        for name in ("grade", "grade_rows", "answer_grader", "final_text")
    }
    tools = {name: find(*where) for name, where in places.items()}
    said = [
        "so\n#### 5",
        "#### 5\n#### 6",
        "5",
        "  5  \n",
        "",
        "the answer is 5",
        "A: 5 ",
        r"$\frac{1}{2}$",
        "\\boxed{0.5}",
    ]
    for name in ("exact", "exact:A:", "math-verify", "reasoning-gym", "nothing", "record_text:dig"):
        grader = rec.case(f"{name}/load", lambda n: str(callable(load_grader(n))), name)
        if grader is None:
            continue
        grader = load_grader(name)
        entry = {"answer": "5", "metadata": {"source_dataset": "chain_sum"}}
        for answer in (entry,) if name == "reasoning-gym" else ("5", 5, ["6", "5"], r"\frac{1}{2}", entry):
            for n, text in enumerate(said):
                rec.case(f"{name}/{answer!r}/{n}", tools["grade"], grader, "p", text, answer)
                if name == "exact":
                    rec.case(
                        f"{name}/{answer!r}/{n}/probe",
                        tools["answer_grader"](grader, signals.PROBES["en"]),
                        text,
                        answer,
                    )
    rec.add("final", [tools["final_text"](text) for text in said])

    def trl(prompts, completions, answer, **columns):
        return [
            None if a is None else float(len(c)) / len(p) for p, c, a in zip(prompts, completions, answer, strict=True)
        ]

    batch = [{"prompt": "pp", "answer": 1}, {"prompt": "p", "answer": None}]
    rec.case("in batches", tools["grade_rows"], trl, batch, ["a", "b"])
    rec.case("unit", tools["grade_rows"], dig, batch, ["a", "bbb"], unit=True)


# ---- trainers


COMMON = {"max_steps": 3, "learning_rate": 0.05, "lr_scheduler_type": "constant", "logging_steps": 1,
    "save_strategy": "no",
          "report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False,
          "per_device_train_batch_size": 2, "seed": 3}  # fmt: skip
_TIMES = ("time", "runtime", "per_second", "total_flos", "memory")


def of_trainer(trainer) -> dict:
    logs = [{k: v for k, v in entry.items() if not any(t in k for t in _TIMES)} for entry in trainer.state.log_history]
    return {"logs": logs, "weights": dict(trainer.model.state_dict())}


def lora():
    from peft import LoraConfig

    return LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def preference_rows() -> list[dict]:
    made = [("2 + 3\n", "2 + 3 = 5\nA: 5", "2 + 3 = 6\nA: 6 so"), ("1 + 1\n", "1 + 1 = 2\nA: 2", "1 + 1 = 3\nhm\nA: 3")]
    made += [("问\n", "好\n五", "好\n六"), ("4 - 2\n", "4 - 2 = 2\n\nA: 2", "4 - 2 = 1\n\nA: 1")]
    return [{"prompt": p, "chosen": c, "rejected": r, "margin": 0.1 * i} for i, (p, c, r) in enumerate(made)]


def run_preference(peft: bool = False, evaluate: bool = False, **options) -> dict:
    from sspo_ext.train import StepPreferenceConfig, StepPreferenceTrainer, load_preference_rows, tokenize_rows

    features = tokenize_rows(load_preference_rows(preference_rows()), make_tokenizer())
    with tempfile.TemporaryDirectory() as folder:
        config = StepPreferenceConfig(folder, **{**COMMON, **options})
        more = {"peft_config": lora()} if peft else {}
        model = make_model()
        if peft:
            from peft import get_peft_model

            torch.manual_seed(5)
            model, more = get_peft_model(model, more["peft_config"]), {}
        trainer = StepPreferenceTrainer(
            model, config, train_dataset=features, eval_dataset=features[:2] if evaluate else None, **more
        )
        trainer.train()
        if evaluate:
            trainer.evaluate()
        return of_trainer(trainer)


def preference_trainer(rec: Record) -> None:
    quiet()
    for name, options in {
        "linear": {}, "logits": {"route": "logits"}, "packed": {"packing": True}, "logits, packed": {"route": "logits",
        "packing": True},
        "reference free": {"reference_free": True, "loss_type": "simpo", "loss_options": {"simpo_gamma": 0.3}},
        "mixture": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}, "bf16": {"bf16": True},
        "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
        "evaluated": {"evaluate": True},
        "lora": {"peft": True}, "lora, packed": {"peft": True, "packing": True},
        "reference backend": {"backend": "reference"},
        "chunks": {"chunk_bytes": 4000}, "adam": {"optim": "adamw_torch", "gradient_checkpointing": True},
    }.items():  # fmt: skip
        rec.case(name, run_preference, **options)


def run_sspo(peft: bool = False, sampled: bool = False, **options) -> dict:
    from sspo_ext.train import SSPOConfig, SSPOTrainer

    rows = [{"prompt": f"{a}+{b}=\n", "answer": str(a + b)} for a in range(1, 4) for b in range(1, 4)]
    defaults = {**COMMON, "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 24,
        "probe": "#",
                "optim": "sgd", "max_steps": 2}  # fmt: skip
    tokenizer = small_tokenizer()
    more = {"peft_config": lora()} if peft else {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = SSPOTrainer(
            make_model(vocab_size=len(tokenizer)), SSPOConfig(folder, **{**defaults, **options}), dig, rows, rows[:3],
            processing_class=tokenizer, engine=None if sampled else Says(tokenizer), **more,
        )  # fmt: skip
        trainer.train()
        trainer.evaluate()
        return of_trainer(trainer)


def sspo_trainer(rec: Record) -> None:
    quiet()
    for name, options in {
        "linear": {}, "logits": {"route": "logits"}, "outcome": {"combine": "outcome"}, "lora": {"peft": True,
        "beta": 0.1},
        "ppo": {"loss_type": "ppo", "epsilon": 0.1, "num_iterations": 2, "max_steps": 4},
        "entropy": {"entropy_coef": 0.02},
        "reference": {"beta": 0.2, "gamma": 0.8, "lam": 0.5}, "step": {"aggregation": "step", "baseline": "grpo"},
        "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        "graded": {"probe_options": {"mode": "graded", "num_samples": 2}}, "replace": {"combine": "replace",
        "lam": 0.0},
        "sequence": {"loss_type": "cispo", "loss_options": {"importance_sampling_level": "sequence"}},
        "sampled": {"sampled": True}, "compact": {"sampled": True, "rollout_engine": "compact", "temperature": 0.8},
        "plain": {"scale_advantages": False, "aggregation": "sequence", "backend": "reference"},
    }.items():  # fmt: skip
        rec.case(name, run_sspo, **options)
    rec.case("demo", run_demo)


def run_demo() -> dict:
    from sspo_ext.demo import arms, tasks

    (model, tokenizer), task = arms.load_start(), tasks.Task("sums")
    with tempfile.TemporaryDirectory() as folder:
        trainer = arms.make_trainer(model, tokenizer, task, folder, updates=2, seed=0, prompts=4, num_generations=4,
            gamma=0.9,
                                    lam=0.0)  # fmt: skip
        trainer.train()
        return {"problems": [p.prompt for p in task.problems(5, 1, held_out=True)], **of_trainer(trainer)}


# ---- command line


def run_main(folder: str, *arguments: str) -> dict:
    """The exit status, what is printed, and the files that are written, but for those that hold times or paths."""
    main = find("cli.main:main", "cli:main")
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(list(arguments))
        except SystemExit as stop:
            status = f"exit {stop.code}"
    made = {"status": str(status), "out": timeless(out.getvalue())}
    if status != 0:
        made["err"] = timeless(err.getvalue())
    for path in sorted(Path(folder).rglob("*")) if folder else ():
        if path.suffix in (".jsonl", ".html", ".png", ".md") and path.is_file():
            made[str(path.relative_to(folder))] = path.read_bytes()
        if path.suffix == ".safetensors" and path.parent == Path(folder):
            from safetensors.torch import load_file

            made[path.name] = load_file(path)
    return made


def timeless(text: str) -> str:
    """Lines without those of progress, whose times differ."""
    lines = text.replace("\r", "\n").splitlines()
    return "\n".join(
        line for line in lines if not any(word in line for word in ("it/s", "s/it", "second", " s left", "time/"))
    )


def command_line(rec: Record) -> None:
    quiet()
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # relative names, so that no output holds the folder's
        try:
            make_model().save_pretrained("model")
            make_tokenizer().save_pretrained("model")
            make_model(vocab_size=len(small_tokenizer())).save_pretrained("small")
            small_tokenizer().save_pretrained("small")
            write("pairs.jsonl", preference_rows())
            write("problems.jsonl", [{"prompt": f"{a}+1=\n", "answer": str(a + 1)} for a in range(1, 6)])
            write("chains.jsonl", [
                {"id": "sum", "prompt": "Q: 2 + 3?\n", "response": "2 + 3 = 5\n#### 5", "answer": "5"},
                {"id": "和", "prompt": "问：\n", "response": ["二 🙂", "#### 5"], "answer": ["5", "五"], "reward": 0.5},
                {"id": "wrong", "prompt": "Q: 2 + 3?\n", "response": "2 + 3 = 6\n#### 6", "answer": "5"},
            ])  # fmt: skip
            commands(rec)
        finally:
            os.chdir(before)


def write(path: str, rows: list[dict]) -> None:
    Path(path).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def commands(rec: Record) -> None:
    train = ["train", "--model", "model", "--data", "pairs.jsonl", "--batch-size", "2", "--lr", "1e-2", "--max-steps",
             "2"]  # fmt: skip
    rl = ["rl", "--model", "small", "--data", "problems.jsonl", "--batch-size", "4", "--num-generations", "4", "--lr",
        "1e-3",
          "--max-completion-length", "30", "--probe", "#", "--max-steps", "2", "--grader",
          "record_text:dig"]  # fmt: skip
    trace = ["trace", "--model", "model", "--data", "chains.jsonl", "--device", "cpu"]
    sampled = ["--pairs", "sampled", "--num-candidates", "4", "--max-step-tokens", "30", "--min-gap", "0", "--split-by",
               r"(?<=[a-z0-9])", "--max-continuation-tokens", "8"]  # fmt: skip
    for name, arguments in {
        "train": [*train, "--eval-data", "pairs.jsonl"], "train, lora": [*train, "--lora-r", "2", "--packing"],
        "train, mixture": [*train, "--loss-type", "sigmoid", "sft", "--loss-weights", "1", "0.2", "--route", "logits"],
        "rl": [*rl, "--eval-data", "problems.jsonl"], "rl, ppo": [*rl, "--loss-type", "ppo", "--epsilon", "0.1"],
        "trace": [*trace, "--gamma", "1", "--probe", "####", "--plot", "2"], "trace, chains": [*trace, "--pairs",
        "chains"],
        "trace, sampled": [*trace, *sampled, "--value", "probe"], "trace, both": [*trace, *sampled, "--value", "both"],
        "trace, graded": [*trace, "--mode", "graded", "--num-samples", "2", "--batch-size", "1"],
        "no file": [*train[:3], "--data", "nowhere.jsonl"], "loss type": [*train, "--loss-type", "dpo"],
        "option": [*train, "--loss-option", "gamma=1"], "mode": [*trace, "--gamma", "2"],
    }.items():  # fmt: skip
        folder = name.replace(", ", "-").replace(" ", "-")
        rec.case(name, run_main, folder, *arguments, "--output-dir", folder)
    for command in ("train", "rl", "trace", "demo"):
        rec.case(f"help/{command}", run_main, "", command, "--help")
    rec.case("help", run_main, "", "--help")


CHAPTERS = {
    "splitting": splitting, "advantages": advantages, "probing": probing, "tracing": tracing,
    "hidden states": hidden_states,
    "rows": rows, "grading": grading, "preference trainer": preference_trainer, "sspo trainer": sspo_trainer,
    "command line": command_line,
}  # fmt: skip
