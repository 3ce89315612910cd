# SPDX-License-Identifier: Apache-2.0
"""Tools that need the repository: generators and records. Not installed."""
