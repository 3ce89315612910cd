# SPDX-License-Identifier: Apache-2.0
"""State of the whole batch: BCO's running mean by hand and saved, and what two ranks agree on.

Mutations of sspo_ext/losses/{state,unpaired,transport,lists}.py, each caught by the test named (on a copy of the
package). Of 34 tried of RewardMean, 10 survived at first; tests were written for 6 of them, marked +:
  no reduction over ranks                 test_two_ranks_agree_with_one_process
  other ranks' values with no gradient of our own   test_two_ranks_agree_with_one_process
  all_reduce in place of the caller's values        test_two_ranks_agree_with_one_process
  margins: -mean; float64; one for each step        test_running_mean_by_hand
  chosen or rejected rewards alone; counted once    test_running_mean_by_hand
  count not kept, of this batch alone, or seen without the past   test_running_mean_by_hand
  mean: step of the past, replaced, added up        test_running_mean_by_hand
  momentum: from 0, of the past, not heeded         test_running_mean_by_hand
  all steps; empty pairs summed, or counted; an empty batch counted   test_empty_pairs_and_batches_do_not_count
  mean or count not saved; mean a parameter; momentum above 1         test_saved_with_the_model
+ an empty batch moves an average with momentum     test_empty_pairs_and_batches_do_not_count
+ momentum of 1 refused                             test_momentum_of_one_is_the_last_batch
+ momentum of 0 allowed                             test_saved_with_the_model
+ margins a view of one number                      test_running_mean_by_hand
+ mean kept, or summed, in float32                  test_summed_in_float64
Of the others three change nothing (either division by an empty batch's count is masked, and what comes in is detached);
sums left on the loss's device only a GPU would show. Two-rank mutations beside the first three were not run.
"""

import pytest
import torch
from helpers.batch import random_batch, random_pairs
from helpers.ranks.batch_state import F64, batch, results, worker

from sspo_ext.layout.pairs import StepPairs
from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses.pref import pref_loss, step_pref_loss
from sspo_ext.losses.state import RewardMean
from sspo_ext.objective.sums import StepLogps


def test_running_mean_by_hand():
    """Two pairs, beta .5: rewards (-1, -2) and (-3, -4), mean -2.5; then the same of twice the beta."""
    layout = StepLayout.from_step_ids(torch.zeros(4, 2).long(), torch.tensor([[-1, 0]] * 4))
    tokens = torch.tensor([-2.0, -6.0, -4.0, -8.0])
    logps, pairs = StepLogps(tokens, layout.counts, tokens), torch.tensor([[0, 2], [1, 3]])
    ref = torch.zeros(4)
    shift, moving = RewardMean(), RewardMean(momentum=0.1)
    for beta, mean, average in ((0.5, -2.5, -2.5), (1.0, -3.75, -2.5 + 0.1 * -2.5)):
        out = pref_loss(logps, layout, pairs, ref=ref, beta=beta, loss_type="bco_pair")
        shift.update(out)
        moving.update(out)
        assert shift.mean.item() == pytest.approx(mean) and moving.mean.item() == pytest.approx(average)
    assert shift.count.item() == 8
    index = StepPairs.from_index(layout, pairs)
    assert shift.margins(index).tolist() == [-3.75, -3.75] and shift.margins(index).dtype == torch.float32
    assert shift.margins(index).is_contiguous()  # kernels read it
    # BCO with the shift: softplus(-(r - d))
    out = pref_loss(logps, layout, pairs, ref=ref, beta=1.0, loss_type="bco_pair", margins=shift.margins(index))
    soft = torch.nn.functional.softplus
    want = soft(torch.tensor([2.0, 6.0]) - 3.75) + soft(3.75 - torch.tensor([4.0, 8.0]))
    torch.testing.assert_close(out.pair_losses, want)


def test_empty_pairs_and_batches_do_not_count():
    batch = random_batch(1)
    layout = batch.layout
    pairs = random_pairs(layout, 1, 9)
    assert pairs.num_valid < 9
    out = step_pref_loss(batch.logits, layout, pairs, ref=torch.zeros(layout.num_steps), loss_type="bco_pair")
    rewards = out.rewards[pairs.index[pairs.valid].long()]
    nothing = StepLayout.from_step_ids(torch.full((2, 4), -100), torch.tensor([[-1, 0, 0, 1]] * 2))
    empty = step_pref_loss(torch.zeros(2, 4, 5), nothing, ref=torch.zeros(4), loss_type="bco_pair")
    for shift in (RewardMean(), RewardMean(momentum=0.1)):
        shift.update(empty)  # the first batch that has something is still the first
        assert shift.mean.item() == 0 and shift.count.item() == 0
        shift.update(out)
        assert shift.mean.item() == pytest.approx(rewards.mean().item()) and shift.count.item() == 2 * pairs.num_valid
        before = shift.mean.clone()
        shift.update(empty)
        assert torch.equal(shift.mean, before)


def test_momentum_of_one_is_the_last_batch():
    layout = StepLayout.from_step_ids(torch.zeros(2, 2).long(), torch.tensor([[-1, 0]] * 2))
    shift = RewardMean(momentum=1.0)
    for value in (-2.0, -6.0):
        tokens = torch.full((2,), value)
        logps = StepLogps(tokens, layout.counts, tokens)
        shift.update(pref_loss(logps, layout, ref=torch.zeros(2), beta=0.5, loss_type="bco_pair"))
        assert shift.mean.item() == value / 2
    assert "momentum=1.0" in repr(shift)


def test_summed_in_float64():
    layout = StepLayout.from_step_ids(torch.zeros(2, 2).long(), torch.tensor([[-1, 0]] * 2))
    tokens = torch.tensor([-1e8, -1.0])
    shift = RewardMean()
    logps = StepLogps(tokens, layout.counts, tokens)
    shift.update(pref_loss(logps, layout, ref=torch.zeros(2), beta=1.0, loss_type="bco_pair"))
    assert shift.mean.item() == -50000000.5  # which float32 has not


def test_follows_the_pairs_device_and_its_own():
    layout = StepLayout.from_step_ids(torch.zeros(2, 2).long(), torch.tensor([[-1, 0]] * 2))
    assert RewardMean().margins(layout.pair_by_index().to("meta")).device.type == "meta"
    tokens = torch.tensor([-1.0, -2.0])
    logps = StepLogps(tokens, layout.counts, tokens)
    shift = RewardMean().to("meta")
    shift.update(pref_loss(logps, layout, ref=torch.zeros(2), loss_type="bco_pair"))
    assert shift.mean.device.type == shift.count.device.type == "meta"


def test_saved_with_the_model():
    model = torch.nn.ModuleDict({"shift": RewardMean()})
    model["shift"].mean.fill_(0.7)
    model["shift"].count.fill_(3)
    other = torch.nn.ModuleDict({"shift": RewardMean()})
    other.load_state_dict(model.state_dict())
    assert other["shift"].mean.item() == pytest.approx(0.7) and other["shift"].count.item() == 3
    assert not list(model.parameters())
    for momentum in (1.5, 0, -0.1):
        with pytest.raises(ValueError, match="momentum: expected"):
            RewardMean(momentum=momentum)
    with pytest.raises(TypeError, match="momentum: expected a number"):
        RewardMean(momentum="0.1")


def test_two_ranks_agree_with_one_process(tmp_path):
    """Reference point, sorted losses and running mean over two ranks are those of one process with both batches; AOT's
    gradients, averaged as data parallel does, too."""
    torch.multiprocessing.spawn(worker, (2, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{r}.pt") for r in range(2)]
    logps, layout, _, ref = batch(0, 16)
    index = torch.stack([torch.arange(4), torch.arange(4) + 4], 1)
    whole = results(logps, layout, StepPairs.from_index(layout, torch.cat([index, index + 8])), ref)
    for key in ("z0", "shift", "count"):
        for rank in ranks:
            torch.testing.assert_close(rank[key], whole[key].to(F64), rtol=1e-12, atol=0)
    assert whole["z0"] > 0
    for key in ("aot", "aot_unpaired"):
        assert torch.equal(ranks[0][key][0], ranks[1][key][0])
        torch.testing.assert_close(ranks[0][key][0], whole[key][0], rtol=1e-12, atol=0)
        # each rank's own tokens, over the two that data parallel averages
        averaged = torch.cat([rank[key][1] for rank in ranks]) / 2
        torch.testing.assert_close(averaged, whole[key][1], rtol=1e-12, atol=1e-15)
        alone = results(*batch(0, 8))[key]
        assert not torch.allclose(alone[0], whole[key][0])
