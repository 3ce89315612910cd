# SPDX-License-Identifier: Apache-2.0
"""Adapters of other packages work with what they were tested with, and say so otherwise."""

from __future__ import annotations

from importlib import metadata


def check_version(package: str, tested: str) -> None:
    """Raise unless the installed version of a package is one that its adapter was tested with.

    Args:
        package: The distribution's name.
        tested: Its version up to major and minor number, such as "1.16"; any patch of it will do.

    Raises:
        ImportError: The package is not installed, or in another version. The message names both.

    Examples:
        >>> from sspo_ext._versions import check_version
        >>> try:
        ...     check_version("torch", "0.1")
        ... except ImportError as error:
        ...     print(str(error)[:36])
        torch: sspo_ext was tested with 0.1,
    """
    command = f"pip install '{package}=={tested}.*'"
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            f"{package}: sspo_ext needs {tested}, and none is installed; {command}", name=package
        ) from None
    if found.split(".")[:2] != tested.split("."):
        raise ImportError(f"{package}: sspo_ext was tested with {tested}, and {found} is installed; {command}")
