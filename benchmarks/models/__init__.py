# SPDX-License-Identifier: Apache-2.0
"""Benchmarks on real language models and their families."""
