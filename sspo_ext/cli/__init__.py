# SPDX-License-Identifier: Apache-2.0
"""The command line: `sspo-ext train`, `rl`, `trace`, `demo`, `info`."""
