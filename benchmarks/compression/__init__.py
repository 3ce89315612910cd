# SPDX-License-Identifier: Apache-2.0
"""Does SSPO make reasoning short and keep it right, and which part of it does that?"""

from __future__ import annotations
