# SPDX-License-Identifier: Apache-2.0
"""The table of losses and its page."""

import json

import pytest
from helpers.paths import ROOT

from sspo_ext.formulas.policy import POLICY_FORMULAS
from sspo_ext.formulas.registry import PAIR_FORMULAS
from sspo_ext.losses.catalogue import catalogue
from sspo_ext.losses.common import LOSS_FUNCTIONS
from tools import write_losses_page
from tools.write_losses_page import PAGE, PARITY, main


@pytest.fixture(autouse=True)
def source_tree(monkeypatch):
    """The files of this checkout, whichever copy of the package is imported."""
    for name in ("PAGE", "PARITY"):
        monkeypatch.setattr(write_losses_page, name, ROOT / getattr(write_losses_page, name).relative_to(ROOT))


def test_page_is_up_to_date():
    assert main(["--check"]) == 0, "run python -m tools.write_losses_page"


def test_check_notices_a_stale_page(tmp_path, monkeypatch, capsys):
    copy = tmp_path / "losses.md"
    copy.write_text("old\n")
    monkeypatch.setattr(write_losses_page, "PAGE", copy)
    assert main(["--check"]) == 1 and "stale" in capsys.readouterr().out and copy.read_text() == "old\n"
    assert main([]) == 0 and main(["--check"]) == 0


def test_every_loss_is_in_it():
    entries = catalogue()
    names = [e.name for e in entries]
    assert set(names) >= {*PAIR_FORMULAS, *LOSS_FUNCTIONS, *POLICY_FORMULAS}
    assert len(set(names)) == len(names)
    for entry in entries:
        assert entry.source and entry.call and entry.needs, entry.name
        assert entry.kind == "recipe" or (entry.formula and entry.use), entry.name
    kto = next(e for e in entries if e.name == "kto")
    assert kto.options == {"reference_point": 0.0, "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}


def test_the_methods_that_were_asked_for_are_present_or_explained():
    page = PAGE.read_text()
    for method in (
        "Step-DPO", "Step-Controlled DPO", "SVPO", "Segment-supervised", "Full-Step-DPO", "TDPO1", "TDPO2", "TGDPO",
        "LD-DPO", "OREO", "Direct Advantage", "DVO", "RTO", "SPO-chain", "PRIME", "From r to Q*", "TRPA", "TARS",
        "cDPO", "Robust DPO", "SLiC", "IPO", "EXO", "NCA", "BCO", "KTO", "APO-zero", "APO-down", "SPPO", "DiscoPOP",
        "AOT", "f-DPO", "SimPO", "CPO", "ORPO", "ASFT", "TPO", "SRPO", "WPO", "Flex-DPO", "DAPO",
    ):  # fmt: skip
        assert method in page, method


def test_parity_names_are_losses():
    known = {e.name for e in catalogue()} | {"mixtures", "end to end"}
    assert set(json.loads(PARITY.read_text())) <= known
