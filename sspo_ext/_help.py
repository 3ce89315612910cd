# SPDX-License-Identifier: Apache-2.0
"""The help format of every command line of this package."""

from __future__ import annotations

import argparse


class DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each default once.

    A default of None, False, "" or [] is not shown, nor one that the help text names itself.
    """

    def _get_help_string(self, action: argparse.Action) -> str | None:
        empty = action.default is None or action.default is False or action.default in ("", [])
        return action.help if empty or "(default" in (action.help or "") else super()._get_help_string(action)
