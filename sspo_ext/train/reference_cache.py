"""Reference step log-probs: computed once, kept on disk under the hash of what they depend on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

_FORMAT = 1

_SAVE_EVERY_S = 30.0

_NOTHING = (np.zeros(0, np.float32), 0)

_PARTS = ("input_ids", "labels", "step_ids")

TOKEN_COLUMNS = tuple(f"{side}_{part}" for side in ("chosen", "rejected") for part in _PARTS)


@dataclass
class ReferenceCache:
    """Where step sums are kept, and how the work is shared by processes (each needs the same folder)."""

    folder: str | os.PathLike
    batch_size: int = 8
    rank: int = 0
    world_size: int = 1
    barrier: Callable[[], None] = lambda: None
    progress: bool = True

    def file(self, key: str, rank: int) -> Path:
        suffix = "" if self.world_size == 1 else f".{rank}-of-{self.world_size}"
        return Path(self.folder) / f"{key}{suffix}.npz"


def reference_key(model: nn.Module, settings: dict, *, adapters: bool = False) -> str:
    """Hash of a model's weights (those of its adapters if `adapters`), its config and `settings`: 40 hex digits."""
    config = model.config.to_dict() if hasattr(model, "config") else {}
    for name in ("_name_or_path", "transformers_version", "use_cache"):
        config.pop(name, None)
    header = json.dumps([_FORMAT, config, settings], sort_keys=True, default=str)
    digest = hashlib.blake2b(header.encode(), digest_size=20)
    prefix = None
    if hasattr(model, "peft_config") and not adapters:
        prefix = getattr(getattr(model, "base_model", None), "prefix", None)
    weights = {
        name: value
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor) and not (prefix and (prefix in name or ".modules_to_save." in name))
    }
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        for name, tensor_digest in zip(weights, pool.map(_tensor_digest, weights.values()), strict=True):
            digest.update(name.encode() + tensor_digest)
    return digest.hexdigest()


def _tensor_digest(value: Tensor) -> bytes:
    data = value.detach().cpu().contiguous().reshape(-1)
    digest = hashlib.blake2b(f"{value.dtype}{tuple(value.shape)}".encode(), digest_size=20)
    digest.update(data.view(torch.uint8).numpy())
    return digest.digest()


def _data_digest(features: Sequence[dict], model_key: str) -> str:
    """Token ids, labels and step ids decide the sums: whatever split or cut the text is in them."""
    digest = hashlib.blake2b(model_key.encode(), digest_size=20)
    for feature in features:
        for name in TOKEN_COLUMNS:
            values = np.asarray(feature[name], np.int64)
            digest.update(len(values).to_bytes(8, "little") + values.tobytes())
    return digest.hexdigest()


def add_reference(
    dataset,
    model_key: str,
    cache: ReferenceCache,
    collate: Callable[[list[dict]], dict],
    step_sums: Callable[[dict], Tensor],
    name: str = "dataset",
):
    """The dataset with columns `ref_chosen` (K_c,) and `ref_rejected` (K_r,): reference log-prob of each step of each
    row.

    Args:
        dataset: list of features, or a datasets.Dataset; must have a length.
        model_key: `reference_key` of the model behind `step_sums`.
        step_sums: batch -> (S,) step log-probs in the layout's order, sequence by sequence.

    Looks in the cache first. Otherwise computes, longest rows first, writing what is done every half minute (tmp
    file, then os.replace), so that an interrupted run goes on where it was. Raises ValueError for a dataset without
    length and for log-probs that are not finite, naming the row.
    """
    if not hasattr(dataset, "__len__"):
        got = type(dataset).__name__
        raise ValueError(f"{name}: expected a length (to precompute the reference), or reference_free, got {got}")
    features = list(dataset)
    key = _data_digest(features, model_key)
    # Rows of like length share a batch. The order, and so what a half-written file means, depends on the data alone.
    order = np.argsort([-len(f["chosen_input_ids"]) - len(f["rejected_input_ids"]) for f in features], kind="stable")
    counts = [[max(f[f"{side}_step_ids"], default=-1) + 1 for side in ("chosen", "rejected")] for f in features]
    counts = np.array(counts, np.int64).reshape(-1, 2)
    shares = [order[rank :: cache.world_size] for rank in range(cache.world_size)]
    share = shares[cache.rank]
    _compute([features[i] for i in share], counts[share], cache.file(key, cache.rank), cache, collate, step_sums, name)
    cache.barrier()
    chosen, rejected = [None] * len(features), [None] * len(features)
    for rank, share in enumerate(shares):
        sums, _ = _load(cache.file(key, rank))
        parts = np.split(sums, np.cumsum(counts[share].reshape(-1))[:-1])
        for i, of_chosen, of_rejected in zip(share, parts[::2], parts[1::2], strict=False):
            chosen[i], rejected[i] = of_chosen.tolist(), of_rejected.tolist()
            if not (np.isfinite(of_chosen).all() and np.isfinite(of_rejected).all()):
                source = features[i].get("source", "no source")
                raise ValueError(f"{name}: reference log-probs of row {i} ({source}) are not finite")
    if hasattr(dataset, "add_column"):
        return dataset.add_column("ref_chosen", chosen).add_column("ref_rejected", rejected)
    return [{**f, "ref_chosen": c, "ref_rejected": r} for f, c, r in zip(features, chosen, rejected, strict=True)]


def _compute(features, counts: np.ndarray, file: Path, cache: ReferenceCache, collate, step_sums, name: str) -> None:
    """Completes `file`, which holds the sums of the first `rows` rows: chosen steps, then rejected ones, row by row."""
    sums, done = _load(file)
    if done > len(features) or len(sums) != counts[:done].sum():
        sums, done = _NOTHING
    if done == len(features):
        return
    parts, saved = [sums], time.monotonic()
    title = f"reference log-probs of {name}"
    bar = tqdm(total=len(features), initial=done, desc=title, unit="row", disable=not cache.progress)
    try:
        while done < len(features):
            rows = features[done : done + cache.batch_size]
            batch = collate(rows)
            values = step_sums(batch).float().cpu().numpy()
            steps = np.bincount(np.asarray(batch["layout"].host_step_sequence), minlength=2 * len(rows))
            of_sequence = np.split(values, np.cumsum(steps)[:-1])
            parts += [of_sequence[i + side * len(rows)] for i in range(len(rows)) for side in (0, 1)]
            done += len(rows)
            bar.update(len(rows))
            if time.monotonic() - saved > _SAVE_EVERY_S:
                _save(file, np.concatenate(parts), done)
                saved = time.monotonic()
    finally:
        bar.close()
        _save(file, np.concatenate(parts), done)


def _load(file: Path) -> tuple[np.ndarray, int]:
    try:
        with np.load(file) as data:
            return data["sums"], int(data["rows"])
    except FileNotFoundError:
        return _NOTHING
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("reference cache %s cannot be read (%s); computing it again", file, error)
        return _NOTHING


def _save(file: Path, sums: np.ndarray, rows: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as out:
        np.savez(out, sums=sums.astype(np.float32), rows=rows)
    os.replace(temporary, file)
