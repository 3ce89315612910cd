# SPDX-License-Identifier: Apache-2.0
"""The examples in the docstrings of the package run, and print what stands below them.

An example may use torch, every public name of sspo_ext, its losses, signals and hf, and the names of `given` below.
What it prints is compared where the docstring says what that is.
"""

import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

import sspo_ext

transformers = pytest.importorskip("transformers")
FOLDER = Path(sspo_ext.__file__).parent
# its modules need a compiler or a GPU; a program; engines that need not be installed
APART = ("backends", "cli/__main__.py", "integrations/trl.py", "integrations/verl")
MODULES = sorted(
    path.relative_to(FOLDER.parent).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
    for path in FOLDER.rglob("*.py")
    if not path.relative_to(FOLDER).as_posix().startswith(APART)
)
FEWEST = 90
HEADER = re.compile(r"^\s*Examples?::?\s*$", re.MULTILINE)
SHAPE = (4, 16)


class Checker(doctest.OutputChecker):
    def check_output(self, want, got, flags):
        return not want or super().check_output(want, got, flags)


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(FOLDER / "demo" / "start")


def given(tokenizer) -> dict:
    """What an example may use: names of its own, which it may change."""
    names = {"torch": torch}
    for module in ("sspo_ext", "sspo_ext.tree", "sspo_ext.losses", "sspo_ext.signals", "sspo_ext.hf"):
        names |= {name: value for name, value in vars(importlib.import_module(module)).items() if name[0] != "_"}
    torch.manual_seed(0)
    vocabulary = len(tokenizer)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=512, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    input_ids = torch.randint(vocabulary, SHAPE)
    step_ids = (torch.arange(16) // 4 - 1).expand(SHAPE).clone()  # a prompt of 4 tokens and 3 steps of 4
    labels = input_ids.masked_fill(step_ids < 0, -100)
    layout = sspo_ext.StepLayout.from_step_ids(labels, step_ids)
    logits, hidden = torch.randn(*SHAPE, vocabulary), torch.randn(*SHAPE, 16)
    steps = layout.num_steps
    return names | {
        "model": transformers.LlamaForCausalLM(config),
        "tokenizer": tokenizer,
        "input_ids": input_ids,
        "ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": labels,
        "step_ids": step_ids,
        "layout": layout,
        "pairs": layout.pair_by_index(),
        "logits": logits.requires_grad_(),
        "hidden": hidden.requires_grad_(),
        "ref_logits": torch.randn(*SHAPE, vocabulary),
        "ref": torch.randn(steps),
        "ref_sums": torch.randn(steps),
        "ref_step_sums": torch.randn(steps),
        "advantages": torch.randn(steps),
        "old": -torch.rand(layout.num_rows),
    }


def documented(module) -> list[tuple[str, str]]:
    """(name, docstring) of a module, its classes and functions, and of their methods."""
    found = [(module.__name__, module.__doc__)]
    for name, value in vars(module).items():
        if (inspect.isclass(value) or inspect.isroutine(value)) and value.__module__ == module.__name__:
            found.append((f"{module.__name__}.{name}", value.__doc__))
            for key, part in vars(value).items() if inspect.isclass(value) else ():
                part = getattr(part, "__func__", getattr(part, "fget", part))
                if inspect.isfunction(part):
                    found.append((f"{module.__name__}.{name}.{key}", part.__doc__))
    return [(name, text) for name, text in found if text]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    runner = doctest.DocTestRunner(Checker(), optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    problems = []
    for where, text in documented(importlib.import_module(name)):
        if not (HEADER.search(text) or ">>>" in text):
            continue
        test = doctest.DocTestParser().get_doctest(text, given(tokenizer), where, None, None)
        if not test.examples:
            problems.append(f"{where}: an example without a line of code (>>>)")
            continue
        runner.run(test, out=problems.append, clear_globs=False)
    assert not problems, "\n".join(problems)


def test_there_are_examples():
    texts = [text for name in MODULES for _, text in documented(importlib.import_module(name))]
    assert sum(">>>" in text for text in texts) >= FEWEST
