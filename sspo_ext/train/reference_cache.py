# SPDX-License-Identifier: Apache-2.0
"""Reference step log-probs: computed once and kept on disk, under a hash of everything that they depend on."""

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

from .checkpoints import written
from .model_call import hf_model
from .sharded import is_shared_out, whole

logger = logging.getLogger(__name__)

_FORMAT = 1

_SAVE_EVERY_S = 30.0

_NOTHING = (np.zeros(0, np.float32), 0)

_LAYER_STATES = ("active_adapters", "merged_adapters", "disable_adapters", "scaling")

_NOT_OF_THE_FUNCTION = ("base_model_name_or_path", "revision", "inference_mode", "peft_version")

_PARTS = ("input_ids", "labels", "step_ids")

TOKEN_COLUMNS = tuple(f"{side}_{part}" for side in ("chosen", "rejected") for part in _PARTS)


@dataclass
class ReferenceCache:
    """Where step sums are kept, and how processes share the work.

    Attributes:
        folder: Where the files are. All processes must see the same folder.
        batch_size: Rows in a batch.
        rank: The number of this process.
        world_size: The number of processes.
        barrier: Waits for all processes.
        most: The largest of all processes' numbers, where all of them have to run the model equally often.
        progress: Whether to show a bar.
    """

    folder: str | os.PathLike
    batch_size: int = 8
    rank: int = 0
    world_size: int = 1
    barrier: Callable[[], None] = lambda: None
    most: Callable[[int], int] = int
    progress: bool = True

    def file(self, key: str, rank: int) -> Path:
        """The file with the share of one process."""
        suffix = "" if self.world_size == 1 else f".{rank}-of-{self.world_size}"
        return Path(self.folder) / f"{key}{suffix}.npz"


def reference_key(model: nn.Module, settings: dict, *, adapters: bool = False) -> str:
    """Hashes a model's weights, its config and the settings.

    Args:
        model: The reference model.
        settings: Anything else that the log-probs depend on, as JSON.
        adapters: Whether its adapters count: their weights, their configs, and which of them act how strongly.

    Returns:
        40 hex digits.
    """
    config: dict = hf_model(model).config.to_dict() if hasattr(model, "config") else {}
    for name in ("_name_or_path", "transformers_version", "use_cache"):
        config.pop(name, None)
    header = json.dumps([_FORMAT, config, settings], sort_keys=True, default=str)
    digest = hashlib.blake2b(header.encode(), digest_size=20)
    if adapters:
        digest.update(_adapter_state(model))
    prefix = None
    if hasattr(model, "peft_config") and not adapters:
        prefix = getattr(getattr(model, "base_model", None), "prefix", None)
    weights = {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor) and not (prefix and (prefix in name or ".modules_to_save." in name))
    }
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        # all processes gather sharded weights in the same order, one at a time
        sharded = any(map(is_shared_out, weights.values()))
        digests = (map if sharded else pool.map)(_tensor_digest, weights.values())
        for name, tensor_digest in zip(weights, digests, strict=True):
            digest.update(name.encode() + tensor_digest)
    return digest.hexdigest()


def _adapter_state(model: nn.Module) -> bytes:
    """What adapters do beside their weights; empty for a model without any.

    The layers say it, since a config may differ from what `set_adapter` or `set_scale` did later. The configs say the
    rest, such as LoRA's `use_dora`.
    """
    layers = {
        name: [getattr(module, state, None) for state in _LAYER_STATES]
        for name, module in model.named_modules()
        if isinstance(getattr(module, "disable_adapters", None), bool)
    }
    given = getattr(model, "peft_config", None) or {}
    configs = {
        name: {key: value for key, value in config.to_dict().items() if key not in _NOT_OF_THE_FUNCTION}
        for name, config in given.items()
    }
    if not layers and not configs:
        return b""
    # the wrapper's own choice, which prompt learning has instead of layers
    active = getattr(model, "active_adapters", None)
    state = [layers, configs, None if callable(active) else active]
    return json.dumps(state, sort_keys=True, default=lambda x: sorted(x) if isinstance(x, set) else str(x)).encode()


def _tensor_digest(value: Tensor) -> bytes:
    value = whole(value)
    data = value.cpu().contiguous().reshape(-1)
    digest = hashlib.blake2b(f"{value.dtype}{tuple(value.shape)}".encode(), digest_size=20)
    # numpy's stubs declare an array a buffer only from Python 3.12 on.
    digest.update(data.view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
    return digest.digest()


def _data_digest(features: Sequence[dict], model_key: str) -> str:
    """Hashes token ids, labels and step ids. They decide the sums, however the text was split or cut."""
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
    """Adds the columns `ref_chosen` (K_c,) and `ref_rejected` (K_r,): the reference log-prob of each step of each row.

    The sums are taken from the cache if they are there. Otherwise they are computed, longest rows first, and saved
    every half minute, so that an interrupted run goes on from there.

    Args:
        dataset: A list of features, or a datasets.Dataset. It must have a length.
        model_key: `reference_key` of the model behind `step_sums`.
        cache: The folder and this process's share of the work.
        collate: Makes a batch from features.
        step_sums: Returns the step log-probs (S,) of a batch in the layout's order, sequence by sequence.
        name: What errors call the dataset.

    Returns:
        A new list, or the datasets.Dataset with the two columns.

    Raises:
        ValueError: For a dataset without a length, and for log-probs that are not finite, naming the row.
    """
    if not hasattr(dataset, "__len__"):
        got = type(dataset).__name__
        raise ValueError(f"{name}: expected a length (to precompute the reference), or reference_free, got {got}")
    features = list(dataset)
    key = _data_digest(features, model_key)
    # Rows of similar length share a batch. The order depends only on the data, so a half-written file stays valid.
    order = np.argsort([-len(f["chosen_input_ids"]) - len(f["rejected_input_ids"]) for f in features], kind="stable")
    steps = [[max(f[f"{side}_step_ids"], default=-1) + 1 for side in ("chosen", "rejected")] for f in features]
    counts = np.array(steps, np.int64).reshape(-1, 2)
    shares = [order[rank :: cache.world_size] for rank in range(cache.world_size)]
    share = shares[cache.rank]
    mine, file = [features[i] for i in share], cache.file(key, cache.rank)
    sums, done = _load(file)
    if done > len(mine) or len(sums) != counts[share][:done].sum():
        sums, done = _NOTHING
    batches = -(-(len(mine) - done) // cache.batch_size)
    idle = cache.most(batches) - batches
    if batches:
        _complete(file, sums, done, mine, cache, collate, step_sums, name)
    for _ in range(idle):
        step_sums(collate(features[:1]))
    cache.barrier()
    chosen: list[list[float]] = [[] for _ in features]
    rejected: list[list[float]] = [[] for _ in features]
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


def _complete(file: Path, sums: np.ndarray, done: int, features, cache: ReferenceCache, collate, step_sums, name: str):
    """Completes `file`. It holds the sums of the first `rows` rows: row by row, chosen steps, then rejected ones."""
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
    """The sums, and the number of rows that they belong to."""
    try:
        with np.load(file) as data:
            return data["sums"], int(data["rows"])
    except FileNotFoundError:
        return _NOTHING
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("reference cache %s cannot be read (%s); computing it again", file, error)
        return _NOTHING


def _save(file: Path, sums: np.ndarray, rows: int) -> None:
    """Writes a temporary file, then renames it, so that no reader sees half a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with written(file) as temporary, open(temporary, "wb") as out:
        np.savez(out, sums=sums.astype(np.float32), rows=rows)
