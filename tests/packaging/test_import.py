# SPDX-License-Identifier: Apache-2.0
"""What `import sspo_ext` does not load, and the mark that saves it.

Mutations, each caught: `torch.compiler.assume_constant_result` on `select`; another name for the mark.
"""

import subprocess
import sys

import torch

from sspo_ext.backends import constant_when_compiled


def test_the_import_leaves_the_compiler_alone():
    """torch._dynamo brings sympy and triton, and takes as long as torch itself."""
    code = "import sys, sspo_ext; print([m for m in ('torch._dynamo', 'triton', 'sympy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_mark_is_torchs():
    def ours():
        return 1

    def torchs():
        return 1

    assert vars(constant_when_compiled(ours)) == vars(torch.compiler.assume_constant_result(torchs)) != {}
