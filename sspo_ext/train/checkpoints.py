# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as folders: which ones are whole, which is the newest, and what one lacks. Imports nothing heavy.

`checkpoint-N` appears under its name when all of it is written: StepTrainer writes it in `unfinished/` and then renames
it. A checkpoint of another program is whole if its `trainer_state.json` is, which Trainer writes last.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

STATE = "trainer_state.json"

UNFINISHED = "unfinished"

_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")

_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def updates_done(folder: str | os.PathLike) -> int | None:
    """The updates behind a checkpoint, or behind the model of a finished run.

    Args:
        folder: A checkpoint, or a run's output folder.

    Returns:
        The number in its trainer_state.json; None without that file, or if it was not written to its end.
    """
    try:
        return int(json.loads((Path(folder) / STATE).read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def checkpoint_folders(folder: str | os.PathLike) -> list[Path]:
    """The folders named checkpoint-N of a run, whole or not, the smallest N first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=lambda path: int(path.name.partition("-")[2]))


def newest_checkpoint(folder: str | os.PathLike) -> Path | None:
    """The whole checkpoint of a run with the most updates; None if there is none."""
    return next((path for path in reversed(checkpoint_folders(folder)) if updates_done(path) is not None), None)


def check_checkpoint(
    checkpoint: str | os.PathLike, *, rank: int | None = None, scaler: bool = False, sharded: bool = False
) -> None:
    """Checks that training can go on from a checkpoint exactly. Trainer itself goes on without what is missing.

    Args:
        checkpoint: The folder.
        rank: The number of this process, if several train; each has a random state of its own.
        scaler: Whether they scale gradients (fp16).
        sharded: Whether FSDP or DeepSpeed wrote weights and optimizer, in files of their own.

    Raises:
        ValueError: Naming the first file that is missing or damaged.
    """
    folder = Path(checkpoint)
    if updates_done(folder) is None:
        raise _unusable(folder, STATE, "is missing or was not written to its end")
    needed = ["rng_state.pth" if rank is None else f"rng_state_{rank}.pth"]
    needed += ["scaler.pt"] if scaler else []
    if not sharded:
        needed += ["optimizer.pt", "scheduler.pt"]
        _check_weights(folder)
    for name in needed:
        if not (folder / name).is_file():
            savers = len(list(folder.glob("rng_state*.pth")))
            other = " (another number of processes saved it)" if savers and name.startswith("rng") else ""
            raise _unusable(folder, name, f"is missing{other}")
        if _is_torn(folder / name):
            raise _unusable(folder, name, "was not written to its end")


def _check_weights(folder: Path) -> None:
    for name in _INDICES:
        if (folder / name).is_file():
            shards = json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"].values()
            names = sorted(set(shards))
            break
    else:
        names = [name for name in _WEIGHTS if (folder / name).is_file()]
        names = names or sorted(str(path.relative_to(folder)) for path in folder.glob("*/adapter_model.*"))
    if not names:
        raise _unusable(folder, _WEIGHTS[0], "is missing (or adapter_model.safetensors, for an adapter)")
    for name in names:
        if not (folder / name).is_file():
            raise _unusable(folder, name, "is missing")
        if name.endswith(".safetensors") and not _whole_safetensors(folder / name):
            raise _unusable(folder, name, "was not written to its end")


def _is_torn(file: Path) -> bool:
    """Whether a file of torch.save, which is a zip archive, was not written to its end; False for other files."""
    return file.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(file)


def _whole_safetensors(file: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt"):
            return True
    except SafetensorError:
        return False


def _unusable(folder: Path, name: str, what: str) -> ValueError:
    return ValueError(f"resume: {name} {what} in {str(folder)!r}; without it the run would go on to other weights")


def put_in_place(new: Path, place: Path) -> None:
    """Renames a finished folder to its place. What was there before is moved away first, then deleted."""
    if place.exists():
        remove(place)
    os.replace(new, place)


def remove(folder: Path) -> None:
    """Deletes a checkpoint. It loses its name first, so that half of it is never taken for a checkpoint."""
    old = folder.with_name(UNFINISHED) / f"old-{folder.name}"
    old.parent.mkdir(exist_ok=True)
    shutil.rmtree(old, ignore_errors=True)
    os.replace(folder, old)
    shutil.rmtree(old, ignore_errors=True)


def rotate(folder: str | os.PathLike, limit: int | None, best: str | None) -> None:
    """Deletes old checkpoints, by the time when they were written, so that `limit` are left.

    Args:
        folder: Of the run.
        limit: Trainer's `save_total_limit`; None or 0 keeps all.
        best: The best checkpoint, which stays, as the last one does.
    """
    if not limit or limit < 0:
        return
    whole = [path for path in checkpoint_folders(folder) if updates_done(path) is not None]
    whole.sort(key=lambda path: (path / STATE).stat().st_mtime_ns)
    kept = {path for path in whole[-1:] + [path for path in whole if best and path == Path(best)]}
    others = [path for path in whole if path not in kept]
    for path in others[: max(len(others) - max(limit - len(kept), 0), 0)]:
        remove(path)


@contextlib.contextmanager
def naming_the_file(place: Path) -> Iterator[None]:
    """Names the file `place`, or in the folder `place`, that could not be written. Nobody else does on a full disk."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch.save has no exception of its own
        if isinstance(error, RuntimeError) and not re.search("inline_container|PytorchStreamWriter", str(error)):
            raise
        files = [path for path in place.glob("*") if path.is_file()]
        file = max(files, key=lambda path: (_is_torn(path), path.stat().st_mtime_ns), default=place)
        if isinstance(error, SafetensorError):
            file = place / "*.safetensors"  # it leaves nothing of the file
        raise OSError(f"{str(file)!r} cannot be written: {str(error).splitlines()[0]}") from error


@contextlib.contextmanager
def written(place: Path) -> Iterator[Path]:
    """A temporary file that gets its name `place` when all of it is written. Nothing of it stays after an error."""
    temporary = place.with_name(f"{place.name}.{os.getpid()}.tmp")
    try:
        with naming_the_file(place):
            yield temporary
        os.replace(temporary, place)
    finally:
        temporary.unlink(missing_ok=True)
