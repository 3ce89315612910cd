# SPDX-License-Identifier: Apache-2.0
"""Loads any Hugging Face causal LM, by name or path, ready to be trained and saved."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from .loaded_weights import check_adapter, check_loaded, naming_the_adapter
from .loading_errors import BROKEN, loading_error


def load_model(
    name_or_path: str | os.PathLike,
    *,
    dtype: torch.dtype | str = torch.float32,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal LM and its tokenizer.

    GGUF weights are dequantised to `dtype` and put into an ordinary model. An adapter is loaded onto its base model,
    ready to be trained on.

    Args:
        name_or_path: A name on the hub, a folder, a folder with one .gguf file, or a .gguf file. The folder, or the
            name, may be that of an adapter (PEFT), which names its base model.
        dtype: The dtype of the weights. "auto" keeps the checkpoint's; for GGUF it is float32.
        attn_implementation: "eager", "sdpa", "flash_attention_2", ...; None is the model's default.
        trust_remote_code: Whether to run code that comes with the model.
        tokenizer: The tokenizer, if it is loaded already (`load_tokenizer`).

    Returns:
        The model in evaluation mode, a PeftModel for an adapter, and the tokenizer. A tokenizer without a padding token
        pads with its end-of-sequence token.

    Raises:
        ValueError: If a path holds no model, or several .gguf files, or an adapter that names no base model; and for a
            checkpoint that lacks weights of the model, or has other ones than its config says.
        OSError: If a model on the hub cannot be reached, or a file cannot be read.

    Examples:
        >>> import tempfile
        >>> from sspo_ext.train import load_model
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     files = tokenizer.save_pretrained(folder)
        ...     loaded, loaded_tokenizer = load_model(folder, dtype="auto")
    """
    if tokenizer is None:
        tokenizer = load_tokenizer(name_or_path, trust_remote_code=trust_remote_code)
    base = adapter_base(name_or_path)
    if base is not None:
        loading = {"attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
        model, _ = load_model(base, dtype=dtype, tokenizer=tokenizer, **loading)
        with _named(name_or_path):
            return _load_adapter(model, name_or_path), tokenizer
    folder, gguf = _folder(name_or_path)
    options = {"trust_remote_code": trust_remote_code, **gguf}
    if gguf and dtype == "auto":
        dtype = torch.float32
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    with _named(name_or_path):
        # shapes are checked below, with the file's name
        loading = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = cast(Any, AutoModelForCausalLM.from_pretrained(folder, **loading, **options))
    check_loaded(model, name_or_path, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
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
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(model, PeftModel):
        raise ValueError("peft_config: expected None for a PeftModel, which has an adapter; or merge that")
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "peft_config: expected a model without an adapter, got one with adapter layers, which a new adapter could "
            "overwrite; load it as a PeftModel and give no peft_config, or merge the adapter first"
        )
    with _old_names_of_peft():
        return get_peft_model(cast(PreTrainedModel, model), peft_config)


def adapter_base(name_or_path: str | os.PathLike) -> str | None:
    """The base model that an adapter names.

    Args:
        name_or_path: As in `load_model`.

    Returns:
        The name or path of the base model; None if `name_or_path` is no adapter.

    Raises:
        ValueError: For an adapter that names no base model.
    """
    if Path(name_or_path).suffix == ".gguf":
        return None
    file = find_adapter_config_file(str(name_or_path))
    if file is None:
        return None
    with _named(name_or_path):
        base = json.loads(Path(file).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"model: expected base_model_name_or_path in the adapter's {file}, got {base!r}")
    return base


def check_trainable(model: nn.Module) -> None:
    """Raises ValueError for a model of which nothing would be trained. Otherwise only backward would fail."""
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "model: expected parameters that require a gradient, got none; load an adapter by its folder or with "
            "PeftModel.from_pretrained(..., is_trainable=True), give peft_config, or call model.requires_grad_(True)"
        )


def load_tokenizer(name_or_path: str | os.PathLike, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads only the tokenizer of `load_model`, so that rows can be checked before a model is loaded.

    Args:
        name_or_path: As in `load_model`. An adapter saved without a tokenizer has its base model's.
        trust_remote_code: Whether to run code that comes with the tokenizer.

    Returns:
        The tokenizer, with a padding token.
    """
    base = adapter_base(name_or_path)
    if base is not None and not _has_tokenizer(name_or_path):
        return load_tokenizer(base, trust_remote_code=trust_remote_code)
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


def _load_adapter(model: PreTrainedModel, name_or_path: str | os.PathLike) -> Any:
    """The model with the adapter, trainable, in evaluation mode."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ValueError(
            f"model: {str(name_or_path)!r} is an adapter: {error}; install it with: pip install peft"
        ) from error
    if isinstance(model, PeftModel):
        raise ValueError(
            f"model: expected an adapter of a whole model, got {str(name_or_path)!r}, whose base model is an adapter "
            "itself; merge that first"
        )
    with naming_the_adapter(name_or_path), _old_names_of_peft():
        loaded = PeftModel.from_pretrained(model, str(name_or_path), is_trainable=True)
    check_adapter(loaded, name_or_path)
    return loaded.eval()


@contextlib.contextmanager
def _old_names_of_peft() -> Iterator[None]:
    """Hides a warning that a user can do nothing about: peft 0.21 reads a name that transformers 5.24 has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _has_tokenizer(name_or_path: str | os.PathLike) -> bool:
    found = cached_file(
        str(name_or_path),
        "tokenizer_config.json",
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found is not None


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
    """Names the argument, and the file that is broken, in an error of loading."""
    try:
        yield
    except OSError as error:
        where = "cannot be loaded"
        if not Path(name_or_path).exists():
            where = "is no local folder, and could not be loaded from the hub"
        raise OSError(f"model: {str(name_or_path)!r} {where}: {error}") from error
    except (*BROKEN, ImportError) as error:
        raise loading_error(name_or_path, error) from error


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
