# SPDX-License-Identifier: Apache-2.0
"""Records what the package computes, bit for bit, so that a change that must not change behaviour can be held to it.

    PYTHONPATH=OLD python -m tools.record_outputs record before.pt
    PYTHONPATH=NEW python -m tools.record_outputs record after.pt
    python -m tools.record_outputs compare before.pt after.pt

OLD and NEW are folders with a `sspo_ext` in them, whose C++ module is built. `record` runs the cases of
record_kernels.py and record_text.py and stores every tensor, number and text that comes out, each under a readable key.
`compare` asks for the same keys and the same bits; a NaN equals a NaN of the same bits. Its exit status is 1 on any
difference. Both records must be made on one machine, with the same libraries and the same cases: other vector
instructions or another matrix library round otherwise.

Where OLD or NEW has a folder `tools` of its own, `python FOLDER/tools/record_outputs.py` says whose cases are run; the
first line that `record` prints tells both.

What `sspo_ext` exports is called by its public name. For the rest `find` has the places before and after the move.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import importlib
import io
import os
import sys
import time
import zlib
from pathlib import Path

# Triton and the threads of the libraries ask when they are imported.
os.environ.update(TRITON_INTERPRET="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", COLUMNS="120")
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", MPLBACKEND="Agg", WANDB_DISABLED="true")
os.environ.pop("SSPO_BACKEND", None)
# `python -m` puts the working folder before PYTHONPATH: the package that stands there would be recorded by accident.
sys.path[:0] = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402


def find(*places: str):
    """The first of "module:name" that there is, the module's path being below sspo_ext."""
    for place in places:
        module, name = place.split(":")
        try:
            return getattr(importlib.import_module(f"sspo_ext.{module}"), name)
        except (ImportError, AttributeError):
            continue
    raise LookupError(f"none of {', '.join(places)}")


class Record:
    """Outputs by key. A case that raises is an output too: the error's type and words."""

    def __init__(self):
        self.outputs: dict[str, Tensor | str] = {}
        self.raised: list[str] = []
        self.prefix = ""

    def add(self, key: str, value) -> None:
        if isinstance(value, Tensor):
            self._store(key, value.detach().cpu().clone(memory_format=torch.contiguous_format))
        elif isinstance(value, np.ndarray):
            self.add(key, torch.from_numpy(np.ascontiguousarray(value)))
        elif isinstance(value, (float, np.floating)):
            self._store(key, f"float {float(value).hex()}")
        elif isinstance(value, (bytes, str)):
            self._store(key, value if isinstance(value, str) else value.decode("latin-1"))
        elif isinstance(value, dict):
            self._store(f"{key}/keys", ", ".join(map(str, value)))
            for name, part in value.items():
                self.add(f"{key}/{name}", part)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = [f.name for f in dataclasses.fields(value) if not f.name.startswith("_")]
            self.add(key, {name: getattr(value, name) for name in fields})
        elif isinstance(value, (list, tuple)) and not all(isinstance(v, (int, str, type(None))) for v in value):
            self._store(f"{key}/len", str(len(value)))
            for i, part in enumerate(value):
                self.add(f"{key}/{i}", part)
        else:
            self._store(key, repr(value))

    def _store(self, key: str, value) -> None:
        key = self.prefix + key
        if key in self.outputs:
            raise KeyError(f"two outputs are called {key}")
        self.outputs[key] = value

    def case(self, key: str, fn, *args, **kwargs):
        """Runs fn with the generators seeded by the key, so that a case is the same whatever ran before it."""
        torch.manual_seed(zlib.crc32(key.encode()))
        np.random.seed(zlib.crc32(key.encode()))
        try:
            value = fn(*args, **kwargs)
        except Exception as error:
            self._store(f"{key}/raises", f"{type(error).__name__}: {error}")
            self.raised.append(f"{self.prefix}{key}: {type(error).__name__}: {error}")
            return None
        self.add(key, value)
        return value


def chapters() -> dict:
    """Name -> what fills a Record. Other files of this folder hold them, so that `compare` needs no package."""
    sys.path.insert(0, str(Path(__file__).parent))
    kernels, text = (importlib.import_module(name) for name in ("record_kernels", "record_text"))
    return {**kernels.CHAPTERS, **text.CHAPTERS}


# ---- command line


def catalogue_digest() -> str:
    """Of the files that say what is recorded. Records of different catalogues have other keys, or inputs."""
    digest = hashlib.sha256()
    for name in ("record_kernels.py", "record_text.py"):
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()


def record(path: str, only: list[str] | None, quiet: bool) -> int:
    import sspo_ext

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    print(f"sspo_ext is {Path(sspo_ext.__file__).parent}, recorded by {Path(__file__).parent}", file=sys.stderr)
    known = chapters()
    unknown = set(only or ()) - set(known)
    if unknown:
        raise SystemExit(f"--only: expected some of {', '.join(map(repr, known))}, got {sorted(unknown)}")
    rec = Record()
    for name in only or known:
        start, before = time.perf_counter(), len(rec.outputs)
        rec.prefix = f"{name}: "
        with contextlib.redirect_stdout(io.StringIO()):  # what trainers print holds times
            known[name](rec)
        if not quiet:
            print(f"{name}: {len(rec.outputs) - before} outputs, {time.perf_counter() - start:.1f} s", file=sys.stderr)
    about = {"sspo_ext": sspo_ext.__file__, "torch": str(torch.__version__), "catalogue": catalogue_digest()}
    torch.save({"about": about, "outputs": rec.outputs}, path)
    for line in rec.raised:
        print(f"raised: {line.splitlines()[0][:200]}", file=sys.stderr)
    print(f"{len(rec.outputs)} outputs, {len(rec.raised)} cases raised", file=sys.stderr)
    return 0


def same(a, b) -> bool:
    if isinstance(a, str) or isinstance(b, str):
        return type(a) is type(b) and a == b
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def difference(old, new) -> str:
    """What differs, in a few lines: of tensors of one kind the places that do, with the first one's values."""
    both = (old, new)
    if not any(isinstance(value, str) for value in both) and (old.dtype, old.shape) == (new.dtype, new.shape):
        bits = [value.reshape(-1, 1).view(torch.uint8) for value in both]
        places = (bits[0] != bits[1]).any(1).nonzero()[:, 0]
        first = int(places[0])
        values = " and ".join(repr(value.flatten()[first].item()) for value in both)
        return f"    {len(places)} of {old.numel()} {old.dtype} differ, the first at {first}: {values}"
    if all(isinstance(value, str) for value in both):
        first = next((i for i, (a, b) in enumerate(zip(*both, strict=False)) if a != b), min(map(len, both)))
        return "\n".join(f"    {value[max(first - 40, 0) : first + 80]!r}" for value in both)
    return "\n".join(f"    {value!r:.120}" for value in both)


def compare(old_path: str, new_path: str, show: int, only: list[str] | None) -> int:
    records = [torch.load(path, weights_only=True) for path in (old_path, new_path)]
    for name in ("catalogue", "torch"):
        if records[0]["about"].get(name) != records[1]["about"].get(name):
            print(f"made with another {name}: what differs may be due to that", file=sys.stderr)
    old, new = (made["outputs"] for made in records)
    if only:
        start = tuple(f"{name}: " for name in only)
        old, new = ({k: v for k, v in values.items() if k.startswith(start)} for values in (old, new))
    missing, added = [k for k in old if k not in new], [k for k in new if k not in old]
    different = [k for k in old if k in new and not same(old[k], new[k])]
    for title, keys in (("missing", missing), ("added", added), ("different", different)):
        for key in keys[:show]:
            print(f"{title}: {key}")
            if title == "different":
                print(difference(old[key], new[key]))
        if len(keys) > show:
            print(f"{title}: and {len(keys) - show} more")
    both = len(old) - len(missing)
    print(
        f"{both} outputs compared: {both - len(different)} equal, {len(different)} different; "
        f"{len(missing)} missing, {len(added)} added"
    )
    return int(bool(missing or added or different))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.record_outputs", description=(__doc__ or "").partition("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("record", help="run the catalogue and store its outputs")
    making.add_argument("file")
    making.add_argument("--only", nargs="+", metavar="CHAPTER", help="some of the chapters")
    making.add_argument("--quiet", action="store_true")
    comparing = commands.add_parser("compare", help="compare two records; exit status 1 where they differ")
    comparing.add_argument("old")
    comparing.add_argument("new")
    comparing.add_argument("--only", nargs="+", metavar="CHAPTER", help="some of the chapters")
    comparing.add_argument("--show", type=int, default=20, metavar="N", help="keys of each kind to show (default 20)")
    args = parser.parse_args(argv)
    if args.command == "record":
        return record(args.file, args.only, args.quiet)
    return compare(args.old, args.new, args.show, args.only)


if __name__ == "__main__":
    raise SystemExit(main())
