# SPDX-License-Identifier: Apache-2.0
"""What each process runs in tests of several processes, which import it by name."""

import sys

from helpers.paths import ROOT

sys.path.append(str(ROOT))  # for benchmarks/; last: not for sspo_ext/

import gc

import torch.distributed as dist


def leave() -> None:
    """Ends the processes' group and what holds it; a thread that outlives the interpreter aborts the process."""
    gc.collect()  # a trainer is in cycles, and its DDP model holds the group
    dist.destroy_process_group()
