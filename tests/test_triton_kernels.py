"""Triton kernels in Triton's interpreter. Its switch is read when kernels are defined, so they run in a process of
their own.
"""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
CHECKS = sorted(path.stem for path in (HERE / "triton_interpreted").glob("check_*.py"))


@pytest.mark.parametrize("name", CHECKS)
def test_interpreted(name, tmp_path):
    report = tmp_path / "report.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        f"{HERE}/triton_interpreted/{name}.py",
        "-q",
        "-p",
        "no:cacheprovider",
        "--junitxml",
        str(report),
    ]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    env.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(command, cwd=HERE.parent, env=env, capture_output=True, text=True, timeout=600)
    assert report.exists(), f"pytest did not start:\n{done.stdout}\n{done.stderr}"
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = [
        f"{case.get('name')}: {bad.get('message')}"
        for case in cases
        for bad in (*case.iter("failure"), *case.iter("error"))
    ]
    assert not failed and done.returncode == 0, "\n".join(
        [f"{len(failed)} of {len(cases)} failed", *failed, done.stdout[-4000:]]
    )
    assert cases and not any(list(case.iter("skipped")) for case in cases), "every interpreted check runs"
