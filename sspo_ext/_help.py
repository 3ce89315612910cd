"""How every command line of this package shows defaults."""

from __future__ import annotations

import argparse


class DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """ArgumentDefaultsHelpFormatter, silent where there is nothing to add: a default of None, False or nothing in it,
    and a help text that names the default itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        empty = action.default is None or action.default is False or action.default in ("", [])
        return action.help if empty or "(default" in (action.help or "") else super()._get_help_string(action)
