# SPDX-License-Identifier: Apache-2.0
"""The logits route: one read of the scored rows forward, one read and one write backward."""
