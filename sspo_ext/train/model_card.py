# SPDX-License-Identifier: Apache-2.0
"""The model card, README.md, that is written beside every saved model: what it was made from, how, and with what."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# The fields of a config that a card tells, where they differ from the class's defaults or have no plain ones.
_TOLD = (
    "loss_type", "loss_weights", "loss_options", "beta", "label_smoothing", "reference_free", "combine", "baseline",
    "gamma", "lam", "probe", "num_generations", "max_completion_length", "temperature", "learning_rate",
    "lr_scheduler_type", "weight_decay", "per_device_train_batch_size", "gradient_accumulation_steps", "seed",
)  # fmt: skip


def model_card(trainer: Any, model_name: str, tags: list[str] | None = None) -> str:
    """The text of a model card.

    Nothing in it depends on the machine: folders are named by their last part, if at all.

    Args:
        trainer: A transformers.Trainer, before or after its training.
        model_name: The title.
        tags: More tags than "sspo_ext".

    Returns:
        Markdown with the hub's metadata in front.
    """
    from huggingface_hub import ModelCardData

    from .. import __version__

    config = getattr(trainer.model, "peft_config", None)
    base = _name(getattr(trainer.model.config, "_name_or_path", ""))
    data = ModelCardData(
        base_model=base if "/" in base else None,  # a name on the hub
        library_name="peft" if config else "transformers",
        pipeline_tag="text-generation",
        tags=["sspo_ext", *(tags or [])],
    )
    kind = type(trainer).__name__
    adapter = f" an adapter ({_plain_kind(config)}) of" if config else ""
    told = {name: getattr(trainer.args, name) for name in _TOLD if hasattr(trainer.args, name)}
    settings = [f"| {name} | {_plain(value)} |" for name, value in told.items() if value not in (None, {}, [])]
    return "\n".join(
        [
            f"---\n{data.to_yaml()}\n---\n",
            f"# {model_name}\n",
            f"This is{adapter} {base or 'a model'}, trained for {trainer.state.global_step} updates by `{kind}` of "
            f"sspo_ext {__version__}.\n",
            *_results(trainer.state.log_history),
            "## Settings\n",
            "| setting | value |\n| --- | --- |",
            *settings,
            "\n## Use\n",
            "```python\nfrom sspo_ext.train.models import load_model\n",
            f'model, tokenizer = load_model("{model_name}")  # a name on the hub, or a folder\n```\n',
        ]
    )


def write_model_card(trainer: Any, folder: Path, model_name: str, tags: list[str] | None = None) -> None:
    """Writes the card as README.md. One that neither this package nor PEFT has written stays as it is."""
    before = folder / "README.md"
    if before.is_file() and not any(
        mark in before.read_text("utf-8") for mark in ("\n- sspo_ext\n", "library_name: peft")
    ):
        return
    (folder / "README.md").write_text(model_card(trainer, model_name, tags), "utf-8")


def _results(history: list[dict[str, Any]]) -> list[str]:
    """The last evaluation and the last loss that was logged."""
    found: dict[str, Any] = {}
    for entry in history:
        kept = [name for name in entry if name.startswith("eval_") or name in ("loss", "reward")]
        found |= {name: entry[name] for name in kept}
    rows = [f"| {name} | {value:.4g} |" for name, value in found.items() if isinstance(value, int | float)]
    return ["## Last logged\n", "| metric | value |\n| --- | --- |", *rows, ""] if rows else []


def _name(path: str) -> str:
    """A name on the hub as it is; of a folder only the last part, since the rest tells of a machine."""
    known = str(path or "")
    on_the_hub = known.count("/") <= 1 and not known.startswith(("/", ".", "~")) and not Path(known).exists()
    return known if on_the_hub else Path(known).name


def _plain_kind(configs: Mapping) -> str:
    kind = next(iter(configs.values())).peft_type
    return str(getattr(kind, "value", kind))


def _plain(value: Any) -> str:
    value = getattr(value, "value", value)
    if isinstance(value, Mapping):
        value = ", ".join(f"{name}={one}" for name, one in value.items())
    elif isinstance(value, list):
        value = ", ".join(map(str, value))
    text = " ".join(str(value).split())
    return f"`{text}`".replace("|", "\\|") if text else "(empty)"
