# SPDX-License-Identifier: Apache-2.0
"""Generated from sspo_ext/formulas/ by `python -m tools.generate_formulas`. Do not edit."""

FORMULAS_HASH = "d2c29a72dc670a2a"
