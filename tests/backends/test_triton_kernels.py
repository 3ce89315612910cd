# SPDX-License-Identifier: Apache-2.0
"""The files of triton_interpreted/ on a machine with a GPU.

Triton reads its switch when kernels are defined, so the interpreted ones need a process of their own beside a GPU's.
Without a GPU every test process interprets (tests/conftest.py), and pytest collects the files themselves.
"""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from helpers.paths import ROOT

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="pytest collects the files themselves"
)

HERE = Path(__file__).parent
CHECKS = sorted((HERE / "triton_interpreted").glob("test_*.py"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(cases of all files, the finished process)"""
    report = tmp_path_factory.mktemp("interpreted") / "report.xml"
    command = [sys.executable, "-m", "pytest", *map(str, CHECKS), "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    env.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(
        [*command, "--junitxml", str(report)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=1800
    )
    assert report.exists(), f"pytest did not start:\n{done.stdout}\n{done.stderr}"
    # 1: some failed, which the tests of their files say; anything else is not a run
    assert done.returncode in (0, 1), f"{done.stdout[-4000:]}\n{done.stderr}"
    return list(ElementTree.parse(report).getroot().iter("testcase")), done


@pytest.mark.parametrize("name", [path.stem for path in CHECKS])
def test_interpreted(name, run):
    every, done = run
    cases = [case for case in every if case.get("classname", "").rpartition(".")[2] == name]
    failed = [
        f"{case.get('name')}: {bad.get('message')}"
        for case in cases
        for bad in (*case.iter("failure"), *case.iter("error"))
    ]
    assert not failed, "\n".join([f"{len(failed)} of {len(cases)} failed", *failed, done.stdout[-4000:]])
    assert cases and not any(list(case.iter("skipped")) for case in cases), "every interpreted check runs"


def test_no_other_failure(run):
    """Of a case that no test above looks at."""
    every, done = run
    red = [case for case in every if list(case.iter("failure")) or list(case.iter("error"))]
    assert (done.returncode == 0) == (not red)
    names = {path.stem for path in CHECKS}
    assert all(case.get("classname", "").rpartition(".")[2] in names for case in every)
