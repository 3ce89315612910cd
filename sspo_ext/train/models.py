"""Load any Hugging Face causal LM, by name or path, ready to be trained and saved."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    name_or_path: str | os.PathLike,
    *,
    dtype: torch.dtype | str = torch.float32,  # "auto" keeps the checkpoint's
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer from a hub name, a folder, a folder with one .gguf file, or a .gguf file.

    GGUF weights are dequantised to `dtype` and put into an ordinary model (`rebuild_gguf`). A tokenizer without a
    padding token pads with its end-of-sequence token. Raises ValueError naming `model` when there is nothing to load;
    a hub name that cannot be reached is OSError.
    """
    path = Path(name_or_path)
    gguf = _gguf_file(path)
    options = {"trust_remote_code": trust_remote_code}
    if gguf is not None:
        folder, options["gguf_file"] = str(gguf.parent), gguf.name
        if dtype == "auto":
            dtype = torch.float32
    elif path.exists() and not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
        raise ValueError(f"model: expected config.json or a .gguf file in {str(path)!r}, found neither")
    else:
        folder = str(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        attention = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options, **attention)
    except OSError as error:
        where = "cannot be loaded" if path.exists() else "is no local folder, and the hub does not give it"
        raise OSError(f"model: {str(name_or_path)!r} {where}: {error}") from error
    return (model if gguf is None else rebuild_gguf(model)), tokenizer


def rebuild_gguf(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in an ordinary model.

    `from_pretrained(gguf_file=...)` marks its result as quantised although the weights are already dense, and then
    neither Trainer nor `save_pretrained` accepts it.
    """
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    dense = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    dense.load_state_dict(model.state_dict())
    dense.tie_weights()
    dense.generation_config = copy.deepcopy(model.generation_config)
    return dense.eval()


def _gguf_file(path: Path) -> Path | None:
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"model: expected a GGUF file, {str(path)!r} is none")
        return path
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(f.name for f in files)
        raise ValueError(f"model: expected one .gguf file in {str(path)!r}, got {names}; name one")
    return files[0] if files else None
