# SPDX-License-Identifier: Apache-2.0
"""What verl loads by the entry point group "verl.plugins". verl notes a failure at DEBUG only, so it is said here."""

import warnings

try:
    from . import verl  # noqa: F401
except ImportError as error:
    warnings.warn(f"sspo_ext: its plugin for verl is not loaded: {error}", RuntimeWarning, stacklevel=2)
    raise
