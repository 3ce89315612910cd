# SPDX-License-Identifier: Apache-2.0
"""From rows of text to batches: reading, checking, tokenising, collating, grading."""
