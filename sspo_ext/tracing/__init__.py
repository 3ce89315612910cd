# SPDX-License-Identifier: Apache-2.0
"""What `sspo-ext trace` does: chains of steps, their values and pairs, and the page that shows them."""
