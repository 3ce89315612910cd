# SPDX-License-Identifier: Apache-2.0
"""Programs of several processes."""

import os
import subprocess
import sys

from helpers.paths import TESTS


def torchrun(module: str, *arguments, processes: int = 2) -> str:
    """What `module` prints, run by so many processes of one thread each."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m", module]
    paths = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, *launcher, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-20000:]
    return done.stdout
