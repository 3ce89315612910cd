# SPDX-License-Identifier: Apache-2.0
"""A ray job of verl's single controller: two CPU workers train a tiny model; one process gets the same weights.

The plugin is loaded in each worker by verl itself, by its entry point. Model engine and rollout are not verl's, which
need a GPU. Mutation: dp_size left out of the loss's normaliser moves the weights by half as much.
"""

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

import ray  # noqa: E402
from helpers.rl import make_model, parameters  # noqa: E402
from helpers.verl_learner import Learner, batch, update  # noqa: E402
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup  # noqa: E402

ROOT = Path(__file__).parents[2]


def test_two_workers():
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    ray.init(
        num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}}
    )
    try:
        pool = RayResourcePool([2], use_gpu=False, max_colocate_count=1)
        workers = RayWorkerGroup(pool, RayClassWithInitArgs(Learner), device_name="cpu")
        model, start = make_model(), parameters(make_model())
        for _ in range(3):
            data = batch(model)
            found = workers.learn(data).batch["weights"]
            alone = update(model, data, 1)
        assert torch.equal(found[0], found[1])
        apart, moved = (found[0] - alone).abs().max().item(), (alone - start).abs().max().item()
        print(f"three updates: moved {moved:.3g}, two workers and one process apart by {apart:.3g}")
        assert moved > 1e-2 and apart < 1e-5 * moved
    finally:
        ray.shutdown()
