# SPDX-License-Identifier: Apache-2.0
"""SSPO on a real language model, next to outcome-only RL, length penalties and controls."""
