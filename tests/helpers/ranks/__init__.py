# SPDX-License-Identifier: Apache-2.0
"""What each process runs in tests of several processes, which import it by name."""

import sys

from helpers.paths import ROOT

sys.path.append(str(ROOT))  # for benchmarks/; last: not for sspo_ext/
