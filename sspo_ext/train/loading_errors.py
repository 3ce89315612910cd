# SPDX-License-Identifier: Apache-2.0
"""One sentence for a model that cannot be loaded, with the file that is broken where one is."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

from safetensors import SafetensorError, safe_open

# What transformers, tokenizers, safetensors and torch raise for files that are cut or of another form.
BROKEN = (
    ValueError, TypeError, KeyError, AttributeError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError,
)  # fmt: skip


def loading_error(name_or_path: str | os.PathLike, error: Exception) -> Exception:
    """What to raise in place of an error of loading.

    Args:
        name_or_path: As in `load_model`.
        error: One of `BROKEN` or an ImportError.

    Returns:
        An error whose message begins with the argument's name: the same one if its message does already.
    """
    if str(error).startswith("model: "):
        return error
    broken = broken_file(
        name_or_path
    )  # first: transformers 4 looks for another package where tokenizer.json is cut off
    if broken is not None:
        return ValueError(f"model: {broken}; it may be cut off, so copy or save it again")
    if isinstance(error, ImportError):
        return ImportError(
            f"model: {str(name_or_path)!r} cannot be loaded: {_first_sentence(error)}; install what is missing, or ask "
            "for something else (attn_implementation)"
        )
    return ValueError(f"model: {str(name_or_path)!r} cannot be loaded: {_first_sentence(error)}")


def broken_file(folder: str | os.PathLike) -> str | None:
    """The first file of a model's folder that cannot be read, with the reason; None if there is none."""
    for path in sorted(Path(folder).glob("*")):
        try:
            if path.suffix == ".json" and not isinstance(json.loads(path.read_bytes()), dict):
                return f"{str(path)!r} holds no JSON object"
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
        except (ValueError, RecursionError) as error:  # of JSON, or of its UTF-8
            return f"{str(path)!r} is no JSON: {error}"
        except SafetensorError as error:
            return f"{str(path)!r} is no whole safetensors file: {error}"
    return None


def _first_sentence(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")
