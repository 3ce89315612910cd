# SPDX-License-Identifier: Apache-2.0
"""Many continuations of few sequences, scored or sampled, with the shared context computed once."""
