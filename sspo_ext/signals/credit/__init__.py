# SPDX-License-Identifier: Apache-2.0
"""Advantages from values and rewards: GAE over steps, and outcome baselines."""
