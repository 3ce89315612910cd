# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels, run by the emulation in tests/cuda_emulation through the package's own binding and wrapper, against
float64. Sanitizers and planted faults: test_sanitizers.py. None of these passes what `check` holds a gradient to: one
rounded from the truth with all elements but the label's times 0, 0.5, 0.9, 1.1, 1.5, 2, 3 or -1 (bfloat16 and float16,
V up to 50257, softcap).
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from helpers import cuda_emulation as build
from helpers.batch import oracle_steps, random_batch, random_pairs
from helpers.cuda_rows import Rows, check
from helpers.truth import assert_fp64_rule

from sspo_ext import backends
from sspo_ext.backends import cuda
from sspo_ext.backends.arguments import StepLossArguments
from sspo_ext.formulas.registry import PAIR_FORMULAS
from sspo_ext.losses.logps import step_logps
from sspo_ext.losses.pref import step_pref_loss

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLAIN, TEMPERATURE, SOFTCAP = (1.0, 0.0), (1 / 0.7, 0.0), (1 / 30, 30 / 0.9)
EPS = torch.finfo(torch.float32).eps
# around a thread's 16 bytes, a block's pass without unrolling and with it, and a row of two passes and more
SIZES_32 = [1, 2, 3, 4, 5, 7, 13, 127, 511, 513, 2047, 2048, 2053, 4099]
SIZES_16 = [1, 3, 7, 8, 9, 17, 127, 1023, 1025, 4095, 4096, 4105, 8201]
SIZES = [(torch.float32, V) for V in SIZES_32] + [(dtype, V) for dtype in DTYPES[1:] for V in SIZES_16]


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    pytest.importorskip("pybind11")
    if build.why_not("none") is not None:
        pytest.skip(build.why_not("none"))
    return build.build_module(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(autouse=True)
def emulated(module, monkeypatch):
    """sspo_ext.backends.cuda over the emulation, tensors on the CPU."""
    monkeypatch.setattr(cuda, "_C_cuda", module)
    monkeypatch.setattr(cuda, "_DEVICE_TYPE", "cpu")
    monkeypatch.setattr(cuda, "_stream", lambda device: (0, 0))
    monkeypatch.setattr(backends, "BACKENDS", tuple(dict.fromkeys((*backends.BACKENDS, "cuda"))))
    torch.manual_seed(0)
    yield
    assert all((counter == 0).all() for counter in cuda._counters.values()), "a launch left its counters behind"


@pytest.mark.parametrize(("dtype", "V"), SIZES, ids=str)
def test_any_vocabulary(V, dtype):
    check(Rows(V, dtype, *(PLAIN if V % 3 else TEMPERATURE), offset=V % 7), out_offset=V % 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [5, 1500, 4097])
def test_softcap(V, dtype):
    check(Rows(V, dtype, *SOFTCAP, spread=30.0))
    check(Rows(V, dtype, *SOFTCAP, spread=0.01, offset=1))
    for low, high in ((1.0, 3.0), (4.0, 7.0), (6.0, 9.0)):  # a x, where tanh is close to 1
        case = Rows(V, dtype, *SOFTCAP)
        case.logits.copy_(30 * (low + (high - low) * torch.rand(case.logits.shape)))
        check(case)


@pytest.mark.parametrize("out_offset", range(8))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_alignment(dtype, out_offset):
    """The gradient's bits do not depend on where it or the logits lie in their 16 bytes."""
    case = Rows(1061, dtype, *PLAIN)
    _, lse, expected = check(case)
    for offset in range(8):
        moved = Rows(1061, dtype, *PLAIN, offset=offset)
        moved.logits.copy_(case.logits)
        moved.labels = case.labels
        assert torch.equal(moved.backward(lse, out_offset=out_offset), expected), (offset, out_offset)


@pytest.mark.parametrize("V", [32000, 50257])
def test_real_vocabularies(V):
    check(Rows(V, torch.bfloat16, *PLAIN, B=1, positions=(1, 0), coef=(1.0, 2.0), offset=5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [9, 1029, 9001])
def test_in_place(V, dtype):
    """Over the logits, bit for bit what goes into a fresh tensor; labels in head, tail and splits."""
    for label in sorted({0, V // 2, V - 1}):
        case = Rows(V, dtype, *PLAIN, offset=3)
        case.labels[:] = label
        _, lse, grad = check(case)
        assert torch.equal(case.backward(lse, out=case.logits), grad)


def test_slices():
    """(B, T, V) views of a larger tensor, and in place in one, without a touch of what lies between."""
    V = 1029
    padded = torch.randn(3, 4, V + 3).bfloat16()
    for view in (padded[1:, 1:-1, :V], padded[:2, ::2, 3:], padded.transpose(0, 1)[1:3, 1:, 1 : V + 1]):
        case = Rows(V, torch.bfloat16, *TEMPERATURE)
        case.logits = case.storage = view
        case.storage = padded
        _, lse, grad = check(case)
        copy = padded.clone()
        inside = copy.as_strided(view.shape, view.stride(), view.storage_offset())
        case.logits = inside
        assert torch.equal(case.backward(lse, out=inside), grad)
        inside.copy_(view)
        assert torch.equal(copy, padded), "in place, wrote outside the slice"


@pytest.mark.parametrize("V", [4096, 9001, 20011])
@pytest.mark.parametrize("splits", [2, 3, 7])
def test_splits_do_not_show(V, splits, module, monkeypatch):
    """Rows shared by any number of blocks: the gradient bit for bit, the log-probs to rounding; the same every run."""
    case = Rows(V, torch.bfloat16, *PLAIN, B=1, positions=(1, 0), coef=(1.0, -2.0), offset=1)
    assert module.row_splits(2, V, 1) == V // 4096  # what the launchers choose is more than one for the larger ones
    _, lse, grad = check(case)
    assert torch.equal(case.backward(lse, out_offset=1), grad)

    class Split:
        def __getattr__(self, name):
            return getattr(module, name)

        def row_splits(self, *sizes):
            return splits

    monkeypatch.setattr(cuda, "_C_cuda", Split())
    first, second = case.forward(), case.forward()
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    truth, by_torch = case.truth(), case.truth(torch.float32)
    assert_fp64_rule(first[0], by_torch[0], truth[0], V, "logp")
    assert_fp64_rule(first[1].float(), by_torch[1], truth[1], V, "lse")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [64, 1100])
def test_masked_vocabulary(V, dtype):
    """-inf, or the lowest finite number, over most of a row: probability 0, gradient 0, no NaN."""
    for mask in (float("-inf"), torch.finfo(dtype).min):
        case = Rows(V, dtype, *PLAIN)
        keep = torch.tensor([V // 3, V - 1])
        masked = torch.full_like(case.logits, mask)
        masked[..., keep] = case.logits[..., keep]
        case.logits.copy_(masked)
        case.labels = keep[torch.tensor([0, 1, 1])]
        _, _, grad = check(case)
        off = torch.ones(V, dtype=torch.bool)
        off[keep] = False
        assert (grad[..., off] == 0).all()
    case.logits.fill_(0)
    case.logits.view(-1, V)[3, 7] = float("-inf")
    case.labels[0] = 7
    logp, lse = case.forward()
    assert logp[0] == float("-inf") and torch.isfinite(logp[1:]).all() and torch.isfinite(lse).all()


@pytest.mark.parametrize("V", [7, 1100, 9001])
def test_nonfinite_propagates(V):
    for value in (float("nan"), float("inf")):
        for column in (0, V // 2, V - 1):
            case = Rows(V, torch.bfloat16, *PLAIN)
            case.logits.view(-1, V)[3, column] = value
            logp, lse = case.forward()
            assert logp[0].isnan() and torch.isfinite(logp[1:]).all(), (value, column)
            grad = case.backward(lse).view(-1, V)
            assert grad[3].isnan().all() and torch.isfinite(grad[0]).all()
    case = Rows(V, torch.bfloat16, *PLAIN)
    case.logits.view(-1, V)[3] = float("-inf")
    logp, lse = case.forward()
    assert logp[0].isnan() and torch.isfinite(logp[1:]).all()
    assert lse[0] == float("-inf")
    assert case.backward(lse).view(-1, V)[3].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [20, 1100])
def test_extreme_rows(V, dtype):
    """+-1e4, a large constant on a whole row, and rows of nothing but the lowest or the largest number: uniform."""
    check(Rows(V, dtype, *PLAIN, spread=1e4))
    case = Rows(V, dtype, *PLAIN)
    case.logits += 3e4
    check(case)
    kind = torch.finfo(dtype)
    for value in (kind.min, kind.max, *(v for v in (1e8, 5e9, -1e12, 1e16, -1e30) if abs(v) < kind.max)):
        case.logits[:] = value
        logp, lse = case.forward()
        assert (logp + torch.tensor(float(V)).log()).abs().max() < 1e-5, value
        grad = case.backward(lse)
        # a float64 lse of 1e38 does not resolve log V: the gradient is off, but no NaN or infinity
        assert torch.isfinite(grad).all(), value
        if abs(value) < 1e13:
            want = torch.full((len(case.rows), V), -1 / V, dtype=torch.float64)
            want[torch.arange(len(want)), case.labels] += 1
            want *= (case.coef * case.upstream)[:, None].double()
            got = grad.view(-1, V)[case.rows].double()
            torch.testing.assert_close(got, want, rtol=kind.eps + 2e-3, atol=1e-7, msg=lambda m, v=value: f"{v}: {m}")


def test_constant_shift_costs_no_digits():
    """A row and the same row + 2^13 (exact in float32 here): the same log-probs to float32 accuracy."""
    case = Rows(5000, torch.float32, *PLAIN)
    case.logits.copy_((case.logits * 1024).round() / 1024)
    logp, _ = case.forward()
    case.logits += 8192
    shifted, _ = case.forward()
    assert (logp - shifted).abs().max() <= 8 * EPS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unscored_rows_do_not_matter(dtype):
    """Whatever is in them, NaN too; a row with coefficient 0 counts as unscored backward."""
    case = Rows(1300, dtype, *PLAIN)
    logp, lse = case.forward()
    grad = case.backward(lse)
    case.logits.view(-1, 1300)[2] = float("nan")
    again, lse = case.forward()
    assert torch.equal(logp, again)
    case.logits.view(-1, 1300)[1] = float("nan")  # scored, coefficient 0
    assert torch.equal(case.backward(lse), grad)


def test_upstream():
    case = Rows(1300, torch.float32, *PLAIN)
    _, lse = case.forward()
    with_upstream = case.backward(lse)
    case.upstream = None
    torch.testing.assert_close(case.backward(lse) * 1.5, with_upstream)
    case.upstream = torch.tensor(0.0)
    assert (case.backward(lse) == 0).all()
    case.upstream = torch.tensor(float("nan"))
    grad = case.backward(lse).view(-1, 1300)
    assert grad[3].isnan().all() and (grad[1] == 0).all()  # a coefficient of 0 is no gradient at all


def test_labels_and_rows_out_of_range():
    """-1 is a label of another vocabulary shard: logp = -lse, no onehot. Everything else is NaN, and no wild access."""
    case = Rows(100, torch.float32, *PLAIN)
    case.labels = torch.tensor([-1, 100, 2**40])
    logp, lse = case.forward()
    assert torch.equal(logp[0], -lse[0].float())
    assert logp[1:].isnan().all() and torch.isfinite(lse).all()
    case.coef = torch.ones(3)
    grad = case.backward(lse).view(-1, 100)
    torch.testing.assert_close(grad[3].sum(), torch.tensor(-1.5))
    assert grad[[0, 1]].isnan().all() and (grad[2] == 0).all()
    case.rows = torch.tensor([3, -1, 2**40])
    logp, lse = case.forward()
    assert torch.isfinite(logp[0]) and logp[1:].isnan().all() and lse[1:].isnan().all()
    case.row_of[:] = torch.tensor([3, -5, 2**30, 0])  # three rows: 3 and up are none
    assert (case.backward(lse).view(-1, 100)[:3] == 0).all()


def test_nothing():
    case = Rows(100, torch.float32, *PLAIN, positions=(), coef=())
    case.labels = torch.empty(0, dtype=torch.int64)
    logp, lse = case.forward()
    assert logp.shape == lse.shape == (0,)
    assert (case.backward(lse) == 0).all()
    cuda.token_logp_bwd(case.logits[:0], case.row_of[:0], case.labels, lse, case.coef, None, 1.0, 0.0, case.logits[:0])


@pytest.mark.parametrize("head", PAIR_FORMULAS)
@pytest.mark.parametrize("weighted", [False, True])
def test_public_loss(head, weighted):
    """Three launches through autograd on a ragged batch, against the reference in float64, upstream gradient not 1."""
    batch = random_batch(seed=len(head), B=5, V=37, weighted=weighted)
    has, S = PAIR_FORMULAS[head], batch.layout.num_steps
    options = dict(loss_type=head, beta=0.3, temperature=0.8, logit_softcap=20.0 if weighted else None)
    if has.reference != "forbidden":
        options["ref"] = -torch.rand(S) * 20
    if has.smoothing == "required":
        options["label_smoothing"] = 0.1
    per_pair = {"margins": torch.rand(2 * S)} if has.margins else {}
    pairs = random_pairs(batch.layout, seed=1, weights=torch.rand(2 * S), **per_pair)

    def run(dtype, backend, inplace=False):
        x = batch.logits.to(dtype).requires_grad_()
        out = step_pref_loss(x * 1, batch.layout, pairs, backend=backend, inplace_backward=inplace, **options)
        (1.7 * out.loss).backward()
        return out.loss.detach(), out.step_logps.detach(), out.pair_losses.detach(), x.grad

    truth, by_torch = run(torch.float64, "reference"), run(torch.float32, "reference")
    for inplace in (False, True):
        got = run(torch.float32, "cuda", inplace)
        for name, g, t, e in zip(("loss", "sums", "pair losses", "gradient"), got, by_torch, truth, strict=True):
            assert_fp64_rule(g, t, e, 37, name)
    again = run(torch.float32, "cuda")
    assert all(torch.equal(x, y) for x, y in zip(got, again, strict=True)), "not the same bits, in place or not"


def test_step_logps():
    batch = random_batch(seed=3, V=37)
    sums, counts, tokens = oracle_steps(batch)
    got, by_torch = (step_logps(batch.logits, batch.layout, backend=name) for name in ("cuda", "reference"))
    assert_fp64_rule(got.tokens, by_torch.tokens, tokens, 37, "tokens")
    assert_fp64_rule(got.sums, by_torch.sums, sums, 37, "sums")
    assert got.counts.tolist() == counts


@pytest.mark.parametrize("counts", [[], [0, 0], [3, 0, 2], [300, 1, 129]], ids=str)
def test_steps_without_pairs_and_long_ones(counts):
    S, N = len(counts), sum(counts)
    offsets = torch.tensor([0, *counts]).cumsum(0, dtype=torch.int32)
    logp, none = -torch.rand(N), torch.zeros(0, dtype=torch.int32)
    loss, sums, pair_loss, coef = cuda.step_loss_fwd(StepLossArguments(
        logp, None, offsets, None, none.view(0, 2), torch.zeros(S + 1, dtype=torch.int32), none, None, None, None,
        torch.ones(()), "sigmoid", [0.1], 1.0,
    ))  # fmt: skip
    assert loss == 0 and pair_loss.shape == (0,) and (coef == 0).all() and coef.shape == (N,)
    exact = torch.stack([part.double().sum() for part in logp.split(counts)]) if counts else torch.zeros(0).double()
    assert (sums - exact).abs().max() <= EPS * exact.abs().max() if S else sums.shape == (0,)


def test_launch_errors_are_raised(module):
    fail_next = ctypes.CDLL(module.__file__).emulation_fail_next
    case = Rows(20, torch.float32, *PLAIN)
    _, lse = case.forward()
    for call in (case.forward, lambda: case.backward(lse)):
        fail_next(9)
        with pytest.raises(RuntimeError, match="token_logp_.wd: invalid configuration argument"):
            call()
    case.forward()  # nothing sticks


def test_wrong_tensors_are_refused():
    case = Rows(20, torch.float32, *PLAIN)
    _, lse = case.forward()
    with pytest.raises(TypeError, match="expected a contiguous tensor of 3 torch.int64"):
        cuda.token_logp_fwd(case.logits, case.rows, case.labels.int(), 1.0, 0.0)
    with pytest.raises(TypeError, match="last dimension"):
        cuda.token_logp_fwd(case.logits.transpose(1, 2), case.rows, case.labels, 1.0, 0.0)
    with pytest.raises(TypeError, match="out"):
        case.backward(lse, out=case.logits.half())
    with pytest.raises(ValueError, match="splits"):
        cuda._C_cuda.token_logp_fwd(0, 0, (1, 1, 1), (1, 1), 0, 0, 1, 1.0, 0.0, 0, 0, 33, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="B \\* T"):
        cuda._C_cuda.token_logp_fwd(0, 0, (2**20, 2**20, 1), (1, 1), 0, 0, 1, 1.0, 0.0, 0, 0, 1, 0, 0, 0, 0)


def test_why_not(monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert all(cuda.why_not(cpu, dtype) is None for dtype in DTYPES)
    assert "float32" in cuda.why_not(cpu, torch.float64)
    monkeypatch.setattr(cuda, "_DEVICE_TYPE", "cuda")
    assert "GPU" in cuda.why_not(cpu, torch.float32)
    monkeypatch.setattr(cuda, "_C_cuda", None)
    assert "SSPO_BUILD_CUDA=1" in cuda.why_not(gpu, torch.float32)


@pytest.mark.parametrize(
    ("built", "runs", "does_not"),
    [
        ("sm_80;sm_90;compute_90", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)], [(7, 5)]),
        ("sm_86", [(8, 9)], [(8, 0), (9, 0)]),
    ],
)
def test_architectures(built, runs, does_not, monkeypatch):
    class Built:
        architectures = built

    monkeypatch.setattr(cuda, "_C_cuda", Built)
    assert all(cuda._runs_on(*capability) for capability in runs)
    assert not any(cuda._runs_on(*capability) for capability in does_not)
