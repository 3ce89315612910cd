# SPDX-License-Identifier: Apache-2.0
"""What one call minimises: its checked arguments, the sums over steps, and the loss of those sums."""
