# SPDX-License-Identifier: Apache-2.0
"""The kernels: bytes they move and machine code, counted without a GPU; times, measured on one."""
