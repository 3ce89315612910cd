# SPDX-License-Identifier: Apache-2.0
"""`python -m sspo_ext.cli`, the same as `sspo-ext`, for launchers such as torchrun."""

import sys

from .main import main

sys.exit(main())
