"""What the Triton kernels read and write, against the least that the work needs. benchmarks/traffic.py counts it.

Meant to fail here: unscored rows read in the backward; the masked pass of a row loading all its lanes; a row read again
for the label's gradient; a fourth launch.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    report = tmp_path_factory.mktemp("traffic") / "traffic.json"
    command = [sys.executable, "-m", "benchmarks.traffic", "--vocab", "2507", "--dtype", "bfloat16", "float32"]
    command += ["--method", "sspo_ext", "liger cross_entropy, upstream 1", "--json", str(report)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(report.read_text())


def test_ours_is_the_minimum(rows):
    ours = [row for row in rows if row["method"].startswith("sspo_ext")]
    assert len(ours) == 4
    for row in ours:
        assert row["launches"] == 3, row
        assert 1 <= row["read_forward"] <= 1.02 and row["written_forward"] <= 0.02, row
        assert 1 <= row["read_backward"] <= 1.02 and 1 <= row["written_backward"] <= 1.02, row
        assert 1 <= row["of_minimum"] <= 1.02, row


def test_the_counter_sees_a_second_read(rows):
    """Liger's cross-entropy reads its rows twice and writes the gradient, in one launch."""
    peers = [row for row in rows if row["method"].startswith("liger")]
    if not peers:
        pytest.skip("liger-kernel is not installed")
    for row in peers:
        assert row["launches"] == 1 and 2 <= row["read_forward"] <= 2.01 and 1 <= row["written_forward"] <= 1.01, row
