# SPDX-License-Identifier: Apache-2.0
"""Loads any Hugging Face causal LM, by name or path, ready to be trained and saved."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    name_or_path: str | os.PathLike,
    *,
    dtype: torch.dtype | str = torch.float32,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal LM and its tokenizer.

    GGUF weights are dequantised to `dtype` and put into an ordinary model.

    Args:
        name_or_path: A name on the hub, a folder, a folder with one .gguf file, or a .gguf file.
        dtype: The dtype of the weights. "auto" keeps the checkpoint's; for GGUF it is float32.
        attn_implementation: "eager", "sdpa", "flash_attention_2", ...; None is the model's default.
        trust_remote_code: Whether to run code that comes with the model.
        tokenizer: The tokenizer, if it is loaded already (`load_tokenizer`).

    Returns:
        The model in evaluation mode, and the tokenizer. A tokenizer without a padding token pads with its
        end-of-sequence token.

    Raises:
        ValueError: If a path holds no model, or several .gguf files.
        OSError: If a model on the hub cannot be reached, or a file cannot be read.

    Example:
        >>> import tempfile
        >>> from sspo_ext.train import load_model
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     files = tokenizer.save_pretrained(folder)
        ...     loaded, loaded_tokenizer = load_model(folder, dtype="auto")
    """
    if tokenizer is None:
        tokenizer = load_tokenizer(name_or_path, trust_remote_code=trust_remote_code)
    folder, gguf = _folder(name_or_path)
    options = {"trust_remote_code": trust_remote_code, **gguf}
    if gguf and dtype == "auto":
        dtype = torch.float32
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    with _named(name_or_path):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    return (rebuild_gguf(model) if gguf else model), tokenizer


def model_and_tokenizer(model, tokenizer) -> tuple[Any, Any]:
    """Loads `model` and its tokenizer if it is a name or a path. A tokenizer that is given stays."""
    if not isinstance(model, (str, os.PathLike)):
        return model, tokenizer
    loaded, its_tokenizer = load_model(model)
    return loaded, tokenizer or its_tokenizer


def with_adapter(model: nn.Module, peft_config) -> Any:
    """Wraps the model in a new adapter."""
    from peft import PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        raise ValueError("peft_config: expected None for a PeftModel, which has an adapter; or merge that")
    return get_peft_model(cast(PreTrainedModel, model), peft_config)


def load_tokenizer(name_or_path: str | os.PathLike, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads only the tokenizer of `load_model`, so that rows can be checked before a model is loaded.

    Args:
        name_or_path: As in `load_model`.
        trust_remote_code: Whether to run code that comes with the tokenizer.

    Returns:
        The tokenizer, with a padding token.
    """
    folder, gguf = _folder(name_or_path)
    with _named(name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **gguf)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def rebuild_gguf(model: PreTrainedModel) -> PreTrainedModel:
    """Puts the weights of a model loaded from GGUF into an ordinary model.

    `from_pretrained(gguf_file=...)` marks its result as quantised although the weights are dense. Neither Trainer nor
    `save_pretrained` accepts such a model.
    """
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    dense = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    dense.load_state_dict(model.state_dict())
    dense.tie_weights()
    dense.generation_config = copy.deepcopy(model.generation_config)
    return dense.eval()


def _folder(name_or_path: str | os.PathLike) -> tuple[str, dict[str, str]]:
    """The folder or hub name, and {"gguf_file": its name} if there is one."""
    path = Path(name_or_path)
    gguf = _gguf_file(path)
    if gguf is not None:
        return str(gguf.parent), {"gguf_file": gguf.name}
    if path.exists() and not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
        raise ValueError(f"model: expected config.json or a .gguf file in {str(path)!r}, found neither")
    return str(name_or_path), {}


@contextlib.contextmanager
def _named(name_or_path: str | os.PathLike) -> Iterator[None]:
    """Puts the argument's name and value before the message of an OSError."""
    try:
        yield
    except OSError as error:
        where = "cannot be loaded"
        if not Path(name_or_path).exists():
            where = "is no local folder, and could not be loaded from the hub"
        raise OSError(f"model: {str(name_or_path)!r} {where}: {error}") from error


def _gguf_file(path: Path) -> Path | None:
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"model: expected a GGUF file, {str(path)!r} is not a file")
        return path
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(f.name for f in files)
        raise ValueError(f"model: expected one .gguf file in {str(path)!r}, got {names}; name one")
    return files[0] if files else None
