# SPDX-License-Identifier: Apache-2.0
"""A loss that takes a reference and gets none says so once, unless reference_free=True says that none is meant."""

import warnings

import pytest
import torch

from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses.criterion import StepPrefLoss
from sspo_ext.losses.lists import listwise_loss, plackett_luce_loss
from sspo_ext.losses.logps import step_logps
from sspo_ext.losses.pref import linear_step_pref_loss, pref_loss, step_pref_loss
from sspo_ext.losses.targets import direct_advantage_loss
from sspo_ext.objective.pair_arguments import _warn_reference_free

LABELS = torch.tensor([[-100, 3, 4, 5], [-100, 6, 7, 2]])
LAYOUT = StepLayout.from_step_ids(LABELS, torch.tensor([[-1, 0, 0, 1], [-1, 0, 1, 1]]))
PAIRS = LAYOUT.pair_by_index()
LOGITS = torch.randn(2, 4, 11, generator=torch.Generator().manual_seed(0))
HIDDEN = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))
HEAD = torch.randn(11, 8, generator=torch.Generator().manual_seed(2))
LISTS, SCORES = torch.tensor([[0, 2], [3, 1]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
REF = torch.full((LAYOUT.num_steps,), -2.0)

CALLS = {
    "step_pref_loss": lambda **options: step_pref_loss(LOGITS, LAYOUT, PAIRS, **options),
    "linear_step_pref_loss": lambda **options: linear_step_pref_loss(HIDDEN, HEAD, LAYOUT, PAIRS, **options),
    "plackett_luce_loss": lambda **options: plackett_luce_loss(step_logps(LOGITS, LAYOUT), LAYOUT, LISTS, **options),
    "listwise_loss": lambda **options: listwise_loss(step_logps(LOGITS, LAYOUT), LAYOUT, LISTS, SCORES, **options),
    "direct_advantage_loss": lambda **options: direct_advantage_loss(
        step_logps(LOGITS, LAYOUT), LAYOUT, REF, **options
    ),
    "pref_loss": lambda **options: pref_loss(step_logps(LOGITS, LAYOUT), LAYOUT, PAIRS, **options),
}


PAIR_LOSSES = ("step_pref_loss", "linear_step_pref_loss", "pref_loss")
NAMES = dict.fromkeys(PAIR_LOSSES, "loss_type 'sigmoid'")


@pytest.fixture(autouse=True)
def unsaid():
    _warn_reference_free.cache_clear()
    yield
    _warn_reference_free.cache_clear()


@pytest.mark.parametrize("call", CALLS)
def test_a_forgotten_reference_is_said_once(call):
    with pytest.warns(UserWarning, match=f"^ref: {NAMES.get(call, call)} takes a reference and got None") as said:
        silent = CALLS[call]().loss
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(CALLS[call]().loss, silent)
        assert torch.equal(CALLS[call](reference_free=True).loss, silent)


@pytest.mark.parametrize("call", PAIR_LOSSES)
@pytest.mark.parametrize(
    "options", [{"reference_free": True}, {"ref": REF}, {"loss_type": "simpo"}, {"loss_type": "sft"}], ids=str
)
def test_nothing_is_said_where_nothing_is_forgotten(call, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CALLS[call](**options)


@pytest.mark.parametrize("call", [name for name in CALLS if name not in PAIR_LOSSES])
def test_nothing_is_said_beside_a_reference(call):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not torch.equal(CALLS[call](ref=REF).rewards, CALLS[call](reference_free=True).rewards)


def test_a_mixture_is_asked_for_each_of_its_losses():
    with pytest.warns(UserWarning, match="'ipo' takes a reference"):
        step_pref_loss(LOGITS, LAYOUT, PAIRS, loss_type=["sft", "ipo"])


def test_the_module_takes_the_option():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StepPrefLoss(reference_free=True)(LOGITS, LAYOUT, PAIRS)


@pytest.mark.parametrize("call", CALLS)
def test_contradictions_are_errors(call):
    with pytest.raises(ValueError, match="reference_free: expected False beside a ref"):
        CALLS[call](reference_free=True, ref=REF)
    if call in PAIR_LOSSES:
        with pytest.raises(ValueError, match="loss_type 'nca_pair' needs a reference"):
            CALLS[call](reference_free=True, loss_type="nca_pair")
    with pytest.raises(TypeError, match="reference_free: expected True or False"):
        CALLS[call](reference_free=None)


def test_compiled_without_a_graph_break():
    @torch.compile(backend="aot_eager", fullgraph=True)
    def loss(logits):
        return step_pref_loss(logits, LAYOUT, PAIRS).loss

    torch.testing.assert_close(loss(LOGITS), step_pref_loss(LOGITS, LAYOUT, PAIRS, reference_free=True).loss)
