# SPDX-License-Identifier: Apache-2.0
"""What to import from a source folder whose compiled module was never built.

`pip install .` puts the compiled module into the installed package. Python started in the clone finds the source folder
first, and would silently run without compiled kernels.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import MutableSequence
from pathlib import Path


def prefer_installed(package_path: MutableSequence[str]) -> None:
    """Points a package's `__path__` to the installed copy, where the source folder has no compiled module.

    Warns with what to type where there is no installed copy either. Anywhere else it does nothing.

    Args:
        package_path: the package's `__path__`, changed in place.
    """
    here = Path(package_path[0])
    if _is_built(here) or not (here.parent / "setup.py").exists():
        return
    for entry in sys.path:
        installed = Path(entry or ".").resolve() / here.name
        if installed != here.resolve() and _is_built(installed):
            package_path[:] = [str(installed)]
            return
    warnings.warn(
        f"{here} is a source folder without its compiled module, and no installed copy has one: the package runs on "
        "torch alone, several times slower on CPUs. Type `pip install -e .` in the folder above it",
        stacklevel=2,
    )


def _is_built(package: Path) -> bool:
    return any(package.glob("_C.*.so")) or (package / "_C.so").exists()
