# SPDX-License-Identifier: Apache-2.0
"""What would surprise the first run on a GPU, seen here: memory of a CUDA graph, a second compilation, stale modules.

Shown to fail before: counters made in a graph's pool were kept (test_counters_in_a_graphs_pool_are_not_kept); one
program a row was handed float32 counters (test_one_binary_however_many_rows); a module with other formulas gave
another loss's numbers (test_a_stale_module_is_not_used); a CPU num_items was copied to the GPU
(test_num_items_on_the_cpu_is_not_copied); XPU was listed and refused (test_every_listed_backend_takes_its_device).
"""

import types

import pytest
import torch

from benchmarks.kernels import ledger
from sspo_ext import backends, linear_step_pref_loss, step_pref_loss
from sspo_ext.backends import addresses, cpu, cuda
from sspo_ext.losses.policy import step_policy_loss

pytest.importorskip("triton")
from sspo_ext.backends.triton import rows as triton_rows

SEGMENTS = [
    {"address": 4096, "total_size": 4096, "segment_pool_id": (0, 0)},
    {"address": 8192, "total_size": 4096, "segment_pool_id": (0, 7)},
]


class Counters:
    """A stand-in for a tensor on a GPU."""

    def __init__(self, address):
        self.address = address

    def data_ptr(self):
        return self.address


@pytest.fixture
def gpu(monkeypatch):
    """What the counters ask of torch.cuda; `.address`: where the next tensor lies, `.capturing`: whether a graph is."""
    state = types.SimpleNamespace(address=4100, capturing=False, made=0)

    def zeros(*args, **kwargs):
        state.made += 1
        return Counters(state.address)

    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: SEGMENTS)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=3))
    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(triton_rows, "_counters", {})
    monkeypatch.setattr(cuda, "_counters", {})
    monkeypatch.setattr(cuda, "_C_cuda", types.SimpleNamespace(max_split_rows=64))
    return state


@pytest.mark.parametrize("counters", [triton_rows.arrival_counters, cuda._arrival_counters])
def test_counters_in_a_graphs_pool_are_not_kept(gpu, counters):
    device = torch.device("cuda", 0)
    gpu.address = 8200  # as in the run before the capture, under torch.compile(mode="reduce-overhead")
    counters(device), counters(device)
    assert gpu.made == 2
    gpu.address, gpu.capturing = 4100, True
    counters(device)
    assert gpu.made == 3
    gpu.capturing = False
    kept = counters(device)
    assert counters(device) is kept and gpu.made == 4


def test_an_unknown_allocator_keeps_nothing(gpu, monkeypatch):
    def refuse():
        raise RuntimeError("no snapshot")

    monkeypatch.setattr(torch.cuda, "memory_snapshot", refuse)
    assert addresses.in_private_pool(Counters(4100))
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: SEGMENTS)
    assert addresses.in_private_pool(Counters(99)), "memory of nobody's that is known"


def test_one_binary_however_many_rows(monkeypatch):
    """The types of a launch's arguments decide which binary runs: they are the same for few rows and for many."""
    from sspo_ext.backends import triton as backend

    seen = []

    def kinds(name, arguments):
        if name == "_token_logp_fwd_kernel":
            seen.append({n: v.dtype for n, v in arguments.items() if isinstance(v, torch.Tensor)})
        return 0, 0

    monkeypatch.setattr(ledger, "_kernel_bytes", kinds)
    with ledger.record():
        for positions in (1, 1000):
            logits = torch.empty(1, positions, 151936, dtype=torch.bfloat16, device="meta")
            index = torch.empty(positions, dtype=torch.int64, device="meta")
            backend.token_logp_fwd(logits, index, index, 1.0, 0.0)
    assert len(seen) == 2 and seen[0] == seen[1], seen


@pytest.mark.parametrize("name", ["_C", "_C_cuda"])
def test_a_stale_module_is_not_used(name):
    module = types.ModuleType(f"sspo_ext.{name}")
    module.formulas = "of another day"
    with pytest.warns(UserWarning, match=f"sspo_ext.{name} was built from other formulas .* build it again"):
        assert "other formulas" in addresses.stale_module(module)
    del module.formulas  # as before there was a hash
    with pytest.warns(UserWarning, match="build it again"):
        assert addresses.stale_module(module)


@pytest.mark.skipif(cpu._C is None, reason="sspo_ext._C is not built")
def test_the_module_here_is_not_stale():
    assert addresses.stale_module(cpu._C) is None


@pytest.mark.parametrize("loss", ["pref", "linear", "policy"])
def test_num_items_on_the_cpu_is_not_copied(loss):
    """Such a copy would make the host wait for the device: the number is written there by a launch."""
    shape = ledger.Shape(1024, 4096, 64)
    hidden, weight, _ = shape.tensors()
    layout = shape.layout()
    logits = torch.empty(*hidden.shape[:2], 4096, dtype=torch.bfloat16, device="meta")
    copies = []
    for items in (2.0, 2.0, torch.tensor(2.0)):  # the first makes the layout's plan
        with ledger.record() as found:
            if loss == "pref":
                step_pref_loss(logits, layout, num_items=items, reference_free=True, backend="triton")
            elif loss == "linear":
                linear_step_pref_loss(hidden, weight, layout, num_items=items, reference_free=True, backend="triton")
            else:
                step_policy_loss(logits, layout, torch.ones(2, device="meta"), num_items=items, backend="triton")
        copies.append(len(found.of("to device")))
    assert copies[1] == copies[2]


def test_every_listed_backend_takes_its_device():
    """A device that is listed has more than the reference; the others run on the reference."""
    for device_type, names in backends._TABLE.items():
        reasons = [backends.why_not(name, device_type, torch.float32) or "" for name in names[:-1]]
        assert not any("not tried on" in reason for reason in reasons), (device_type, reasons)
    assert backends.select("auto", "xpu", torch.float32) == "reference"
