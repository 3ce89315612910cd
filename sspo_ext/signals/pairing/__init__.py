# SPDX-License-Identifier: Apache-2.0
"""Candidates for the next step, and the step pairs made from them."""
