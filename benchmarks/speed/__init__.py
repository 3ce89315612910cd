# SPDX-License-Identifier: Apache-2.0
"""Time and memory of the losses beside their peers."""
