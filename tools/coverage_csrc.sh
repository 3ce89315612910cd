#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Line coverage of csrc/cpu under the given pytest arguments, as a table of gcovr:
#   tools/coverage_csrc.sh tests/test_cpu_kernels.py tests/test_transpose.py
# Builds in a temporary folder. Lines of instruction sets that this machine lacks count as not covered.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
git ls-files -co --exclude-standard csrc sspo_ext tests setup.py build_cuda.py pyproject.toml README.md LICENSE |
    xargs cp --parents -t "$work"
cd "$work"
sed -i 's/"-O[23]"/"-O1"/' setup.py # at -O3 lines merge
flags="--coverage -fprofile-update=atomic"
SSPO_BUILD_CUDA=0 CFLAGS=$flags CXXFLAGS=$flags LDFLAGS=$flags python setup.py -q build_ext --inplace
PYTHONPATH=. python -m pytest -q "$@"
gcovr --root . --object-directory build --filter csrc/ --merge-lines
