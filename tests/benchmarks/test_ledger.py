# SPDX-License-Identifier: Apache-2.0
"""What the linear route launches on a GPU, counted on `meta` tensors: bounds that need no GPU to be seen broken.

Shown to fail: the weight's gradient in blocks, or rounded to 16 bits and added (test_three_products_and_little_else,
test_one_launch_each); a kept gradient scaled in blocks (test_one_launch_each); `.item()` on the loss
(test_nothing_is_read_back).
"""

import pytest
import torch

pytest.importorskip("triton")
from benchmarks.kernels.ledger import Shape, bare, ours, plain_torch, record, trl_chunked
from benchmarks.kernels.record import MACHINES
from sspo_ext.routes.linear import head as head_module
from sspo_ext.routes.linear import products

needs_float32_sums = pytest.mark.skipif(
    not products.gpu_sums_in_float32(), reason="before torch 2.10 a product cannot be added to a float32 sum"
)
H100 = next(machine for machine in MACHINES if machine.name == "H100")
# Of the bare GEMMs: trained, frozen. With V = 32000 the passes over hidden states show: 1.125 frozen.
MOST = {True: 1.15, False: 1.12}
SMALL_V = 1.13


@needs_float32_sums
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("vocab", [32000, 128256, 151936, 256000])
@pytest.mark.parametrize("rows", [8192, 32768])
def test_three_products_and_little_else(rows, vocab, trained):
    """PREDICTED time on an H100, against the products alone."""
    shape = Shape(rows, vocab, trained=trained)
    ledger, floor = ours(shape), bare(shape)
    assert ledger.flops == floor.flops
    most = max(MOST[trained], SMALL_V if vocab == 32000 else 0)
    assert ledger.ms(H100) <= most * floor.ms(H100), (ledger.ms(H100), floor.ms(H100))
    assert not ledger.of("read back") and len(ledger.of("to device")) <= 8


def chunks(ledger, trained):
    return len(ledger.of("gemm")) // (3 if trained else 2)


@needs_float32_sums
@pytest.mark.parametrize("trained", [True, False])
def test_one_launch_each(trained):
    """A chunk has one product each for logits, hidden states and weight, one launch for the bias, and little else."""
    short, long = (ours(Shape(rows, 151936, trained=trained, bias=trained)) for rows in (8192, 32768))
    for ledger in (short, long):
        count = chunks(ledger, trained)
        assert ledger.names("rows")["_scale_rows_kernel"] == 1 + trained, "hidden states and weight, once each"
        assert ledger.names("torch").get("sum", 0) == count * trained, "one reduction a chunk for the bias"
        assert ledger.names("rows")["_token_logp_fwd_kernel"] == count
        assert ledger.names("rows")["_token_logp_bwd_kernel"] == count
    more = (long.launches - short.launches) / (chunks(long, trained) - chunks(short, trained))
    assert more <= (20 if trained else 10), more


@needs_float32_sums
def test_only_the_first_product_of_the_weight_does_not_add():
    ledger = ours(Shape(32768, 151936))
    count, names = chunks(ledger, True), ledger.names("gemm")
    assert count > 2 and names == {"mm": 2 * count + 1, "addmm": count - 1}


def test_a_batch_that_fits_beside_no_sum_is_one_chunk():
    """8192 rows of logits are smaller than the budget and the float32 sum that two chunks would need."""
    ledger = ours(Shape(8192, 151936))
    assert len(ledger.of("gemm")) == 3 and ledger.launches <= 32


@needs_float32_sums
def test_without_a_float32_result_the_bound_breaks(monkeypatch):
    """Below torch 2.8 the products are right and slow; the test above would see it."""
    monkeypatch.setattr(products, "gpu_sums_in_float32", lambda: False)
    shape = Shape(32768, 151936)
    assert ours(shape).ms(H100) > MOST[True] * bare(shape).ms(H100)


def test_nothing_is_read_back():
    """The recorder sees a read from the device."""
    with record() as ledger, pytest.raises(RuntimeError, match="meta"):
        torch.ones((), device="meta").item()
    assert len(ledger.of("read back")) == 1
    with record() as ledger:
        torch.ones(3, device="meta") + torch.arange(3).to("meta")
    assert [entry.kind for entry in ledger.entries] == ["torch", "host", "to device", "torch"]


def test_plain_torch_costs_more():
    shape = Shape(8192, 151936)
    assert plain_torch(shape).flops == ours(shape).flops
    assert plain_torch(shape).ms(H100) > 1.2 * ours(shape).ms(H100)


def test_trl_computes_the_logits_twice():
    pytest.importorskip("trl.kernels.chunked_logprob")
    shape = Shape(2048, 151936)
    assert trl_chunked(shape).flops == 4 / 3 * ours(shape).flops


@needs_float32_sums
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("rows, most", [(130, 1.08), (2048, 1.02), (8192, 1.02)])
def test_the_same_bits_in_every_batch_cost_little(rows, most, trained):
    """Logits in products of 256 rows: PREDICTED time on an H100 over that without, and what fills the last tile."""
    shape = Shape(rows, 151936, trained=trained, length=65 if rows == 130 else 512)
    ledger, without = ours(shape, batch_invariant=True), ours(shape)
    assert ledger.ms(H100) <= most * without.ms(H100), (ledger.ms(H100), without.ms(H100))
    tiles = -(-rows // 256)
    assert ledger.flops - without.flops == 2 * shape.hidden * shape.vocab * (256 * tiles - rows)
    assert not ledger.of("read back")


@pytest.mark.parametrize("vocab", [151936, 50257, 3])
def test_rows_of_the_buffer_begin_on_a_line(vocab):
    """128 bytes: an odd vocabulary's rows would lie anywhere."""
    import sspo_ext

    weight = torch.empty(vocab, 8, dtype=torch.bfloat16, device="meta")
    head = head_module.Head(weight, None, 1.0, 0.0, "triton", None, False)
    layout = Shape(1024, vocab).layout()
    head.allocate(sspo_ext.losses.pref_plan(layout, vocab=vocab, hidden=8, dtype=torch.bfloat16))
    assert head.buffer.shape[1] == vocab and head.buffer.stride(0) * 2 % 128 == 0
