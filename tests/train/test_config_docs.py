# SPDX-License-Identifier: Apache-2.0
"""The options of both configs are documented once, in the docstring, and `HfArgumentParser` shows the same texts."""

from dataclasses import fields

import pytest
from transformers import HfArgumentParser, TrainingArguments

from sspo_ext.train import SSPOConfig, StepPreferenceConfig


@pytest.mark.parametrize("config", [SSPOConfig, StepPreferenceConfig])
def test_every_option_has_its_text_of_the_docstring(config):
    doc = " ".join(config.__doc__.split())
    helps = {field.name: field.metadata.get("help") for field in fields(config) if field.name in config.__annotations__}
    assert len(helps) > 10 and all(helps.values()), [name for name, text in helps.items() if not text]
    for name, text in helps.items():
        assert f" {name}: {text} " in doc and text.endswith(".")
    shown = " ".join(HfArgumentParser(config).format_help().split())
    assert helps["beta"] in shown and helps["loss_options"] in shown


def test_texts_of_transformers_stay():
    theirs, ours = TrainingArguments.__dataclass_fields__, SSPOConfig.__dataclass_fields__
    for name in ("logging_steps", "learning_rate", "remove_unused_columns"):
        assert theirs[name].metadata.get("help") != ours[name].metadata["help"]
    assert theirs["seed"].metadata.get("help") == ours["seed"].metadata.get("help")
