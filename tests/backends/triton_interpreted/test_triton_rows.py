# SPDX-License-Identifier: Apache-2.0
"""Triton row kernels, interpreted, against float64.

Shown to fail by breaking the kernel: no rescale of the lane sums, the masked pass dropped, a segment that begins late
(test_any_vocabulary); no second run for rows outside the range of the first (test_extreme_rows); a `tl.multiple_of`
that does not hold (test_slices); the label read after the loop, edges written by every program (test_in_place); a gap
between shares (test_shares_of_a_row_do_not_show); counters not reset (test_programs_of_a_row_do_not_show).

Meant to fail, each to be tried when the kernels next change. Forward: LOWEST = -inf; label + 1; no mask in the masked
pass; the rounding of u_max * scale dropped from log_total. Backward: label's gradient not added; zero rows skipped;
upstream ignored.
"""

import importlib

import pytest
import torch
from helpers.truth import assert_fp64_rule, assert_rounded_once, gradient_terms

from sspo_ext.backends import triton as backend
from sspo_ext.backends.triton.token_logp_fwd import _programs_per_row

# The package's attributes of these names are the launchers.
FORWARD_FILE = importlib.import_module("sspo_ext.backends.triton.token_logp_fwd")
BACKWARD_FILE = importlib.import_module("sspo_ext.backends.triton.token_logp_bwd")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLAIN, TEMPERATURE, SOFTCAP, SMALL_CAP = (1.0, 0.0), (1 / 0.7, 0.0), (1 / 30, 30 / 0.9), (1 / 3, 3.0)
# Around a lane's 16 bytes; a tile (LANES * VEC) and a pass of the loop (four tiles) with one warp; two segments of four
# passes; where launches take four warps; their pass. Each row of a case begins elsewhere in its 16 bytes. float16 is
# loaded as float32 is, and rounded as bfloat16 is.
SIZES = [
    *[(torch.float32, V) for V in (1, 3, 4, 5, 9, 127, 129, 512, 519, 1025, 4095, 4096, 6145)],
    *[(torch.bfloat16, V) for V in (1, 7, 8, 9, 17, 255, 257, 1025, 1033, 2049, 8191, 8192, 12289)],
    *[(torch.float16, V) for V in (7, 16, 1033, 8193)],
]
EPS = torch.finfo(torch.float32).eps


class Rows:
    """Logits anywhere in memory, some rows of them scored, and the truth about them in float64."""

    def __init__(self, V, dtype, a, c, *, B=2, T=2, offset=0, spread=4.0, positions=(3, 0, 1), coef=(0.7, -1.3, 0.0)):
        self.storage = torch.full((offset + B * T * V + 8,), float("nan"), dtype=dtype)
        self.logits = self.storage[offset : offset + B * T * V].view(B, T, V)
        self.logits.copy_(torch.randn(B, T, V) * spread)
        self.a, self.c, self.V = a, c, V
        self.rows = torch.tensor(positions, dtype=torch.int64)
        self.labels = torch.randint(V, (len(positions),))
        self.coef = torch.tensor(coef)
        self.upstream = torch.tensor(1.5)
        self.row_of = torch.full((B * T,), -1, dtype=torch.int32)
        self.row_of[self.rows] = torch.arange(len(positions), dtype=torch.int32)

    def forward(self):
        return backend.token_logp_fwd(self.logits, self.rows, self.labels, self.a, self.c)

    def backward(self, lse, out=None, upstream=True):
        """Gradient into the middle of a NaN-poisoned buffer, which must stay poisoned around it."""
        if out is None:
            # where the logits' rows lie in their 16 bytes, as in a fresh gradient of a fresh tensor
            offset = self.logits.storage_offset() % 8 + 8
            storage = torch.full((offset + self.logits.numel() + 8,), float("nan"), dtype=self.logits.dtype)
            out = storage[offset : offset + self.logits.numel()].view(self.logits.shape)
        backend.token_logp_bwd(
            self.logits,
            self.row_of,
            self.labels,
            lse,
            self.coef,
            self.upstream if upstream else None,
            self.a,
            self.c,
            out,
        )
        if out.data_ptr() != self.logits.data_ptr():
            assert storage[:offset].isnan().all() and storage[-8:].isnan().all(), "wrote outside the gradient"
        return out

    def truth(self, dtype=torch.float64, upstream=True):
        """(logp, lse, gradient) by torch in `dtype`."""
        x = self.logits.detach().to(dtype).requires_grad_()
        needed = x.reshape(-1, self.V)[self.rows]
        z = self.a * needed if self.c == 0 else self.c * torch.tanh(self.a * needed)
        logp = z.log_softmax(-1).gather(-1, self.labels[:, None])[:, 0]
        (grad,) = torch.autograd.grad(logp, x, self.coef.to(dtype) * (1.5 if upstream else 1.0))
        return logp.detach(), z.detach().logsumexp(-1), grad


def check(case: Rows, in_place=False):
    logp_truth, lse_truth, grad_truth = case.truth()
    logp32, lse32, grad32 = case.truth(torch.float32)
    size = lse_truth.abs().max().item()
    before, logits = case.storage.clone(), case.logits.clone()
    logp, lse = case.forward()
    assert torch.equal(case.storage.view(torch.uint8), before.view(torch.uint8)), "forward changed its input"
    assert logp.dtype == torch.float32 and lse.dtype == torch.float64
    assert_fp64_rule(logp, logp32, logp_truth, 1, "logp", scale=max(1, abs(case.c)))
    assert_fp64_rule(lse, lse32, lse_truth, 1, "lse", scale=EPS / torch.finfo(torch.float64).eps * size)
    grad = case.backward(lse, out=case.logits if in_place else None)
    scored = torch.zeros(grad.shape[0] * grad.shape[1], dtype=torch.bool)
    scored[case.rows[case.coef != 0]] = True
    assert (grad.reshape(-1, case.V)[~scored] == 0).all(), "gradient where nothing is scored"
    weight = case.coef.abs().max().item() * 1.5 * case.a * (case.c or 1)
    # beside the rounding to its dtype, which is torch's too, float32 accuracy
    rounded = EPS / torch.finfo(grad.dtype).eps
    assert_fp64_rule(grad, grad32.to(grad.dtype), grad_truth, 1, "gradient", scale=2 * rounded * weight)
    got, exact, needed = (t.reshape(-1, case.V)[case.rows] for t in (grad, grad_truth, logits))
    terms = gradient_terms(needed, case.labels, case.coef * case.upstream, case.a, case.c)
    assert_rounded_once(got, exact, terms, "gradient")
    return logp, lse, grad


@pytest.mark.parametrize(("dtype", "V"), SIZES, ids=str)
def test_any_vocabulary(V, dtype):
    check(Rows(V, dtype, *(PLAIN if V % 3 else TEMPERATURE), offset=V % 7))


@pytest.mark.parametrize(
    ("dtype", "V"),
    [*[(torch.float32, V) for V in (5, 1500, 8193)], (torch.bfloat16, 1500), (torch.float16, 8193)],
    ids=str,
)
def test_softcap(V, dtype):
    """The small cap: of a lane that is masked and counts all the same, -30 would not show."""
    check(Rows(V, dtype, *SOFTCAP, spread=30.0))
    check(Rows(V, dtype, *SMALL_CAP, spread=0.01, offset=1))


@pytest.mark.parametrize(
    ("dtype", "offset"),
    [(torch.float32, i) for i in range(4)] + [(torch.bfloat16, i) for i in range(8)] + [(torch.float16, 3)],
    ids=str,
)
def test_any_alignment(dtype, offset):
    """Two passes and a masked one, by two programs a row in the backward."""
    check(Rows(1037 if dtype == torch.float32 else 2061, dtype, *PLAIN, offset=offset))


def test_real_vocabulary():
    check(Rows(50257, torch.bfloat16, *PLAIN, T=1, positions=(1, 0), coef=(1.0, 2.0), offset=5))


@pytest.mark.parametrize(
    ("dtype", "V"),
    [(torch.float32, 9), (torch.float32, 9001), *[(torch.bfloat16, V) for V in (9, 1029, 9001)], (torch.float16, 1029)],
    ids=str,
)
def test_in_place(V, dtype):
    """Over the logits, bit for bit what goes into a fresh tensor; labels in tail, lead and the middle of the shares."""
    case = Rows(V, dtype, *PLAIN, offset=3, coef=(0.7, -1.3, 2.0))
    case.labels = torch.tensor([V - 1, 0, V // 2])
    lanes, starts = 16 // dtype.itemsize, [(3 + V * int(row)) * dtype.itemsize % 16 for row in case.rows]
    assert starts[1] and (V + starts[0] // dtype.itemsize) % lanes, "there is a lead, and a tail"
    _, lse, grad = check(case)
    assert torch.equal(case.backward(lse, out=case.logits), grad)


def test_slices():
    """(B, T, V) views: their rows and the gradient's lie differently in their 16 bytes."""
    V = 2061
    padded = torch.randn(3, 4, V + 3).bfloat16()
    for view in (padded[1:, 1:-1, :V], padded[:2, ::2, 3:], padded.transpose(0, 1)[1:3, 1:, 1 : V + 1]):
        case = Rows(V, torch.bfloat16, *TEMPERATURE)
        case.logits = view
        case.storage = padded
        assert view.shape == (2, 2, V)
        check(case)
    same_strides = Rows(V, torch.bfloat16, *PLAIN)
    same_strides.logits = padded[1:, 1:-1, :V]
    _, lse = same_strides.forward()
    expected = same_strides.backward(lse)
    outside = padded.clone()
    outside[1:, 1:-1, :V] = 0
    got = same_strides.backward(lse, out=same_strides.logits)
    assert torch.equal(got, expected)
    padded[1:, 1:-1, :V] = 0
    assert torch.equal(padded, outside), "in place, wrote outside the slice"


SMALL_AND_LARGE = [(torch.float32, 1100), (torch.bfloat16, 64), (torch.bfloat16, 1100), (torch.float16, 1100)]


@pytest.mark.parametrize(("dtype", "V"), SMALL_AND_LARGE, ids=str)
def test_masked_vocabulary(V, dtype):
    """-inf, or the lowest finite number, over most of a row: probability 0, gradient 0, no NaN; whole lanes see
    nothing else.
    """
    for mask in (float("-inf"), torch.finfo(dtype).min):
        case = Rows(V, dtype, *PLAIN)
        keep = torch.tensor([V // 3, V - 1])
        masked = torch.full_like(case.logits, mask)
        masked[..., keep] = case.logits[..., keep]
        case.logits.copy_(masked)
        case.labels = keep[torch.tensor([0, 1, 1])]
        logp_truth, lse_truth, grad_truth = case.truth()
        logp, lse = case.forward()
        assert (logp - logp_truth).abs().max() <= 4 * EPS and (lse - lse_truth).abs().max() <= 10 * EPS
        grad = case.backward(lse)
        off = torch.ones(V, dtype=torch.bool)
        off[keep] = False
        assert (grad[..., off] == 0).all()
        # the kept probabilities are exact in float32: one rounding to dtype
        assert (grad.double() - grad_truth).abs().max() <= torch.finfo(dtype).eps * 2 + 10 * EPS


def test_masked_label():
    case = Rows(100, torch.float32, *PLAIN)
    case.logits.view(-1, 100)[3, 7] = float("-inf")
    case.labels[0] = 7
    logp, lse = case.forward()
    assert logp[0] == float("-inf") and torch.isfinite(logp[1:]).all() and torch.isfinite(lse).all()


@pytest.mark.parametrize("V", [7, 1100])
def test_nonfinite_propagates(V):
    columns = (0, V // 2, V - 1)
    for column, other in zip(columns, (*columns[1:], columns[0]), strict=True):
        case = Rows(V, torch.bfloat16, *PLAIN, coef=(0.7, -1.3, 2.0))
        case.logits.view(-1, V)[3, column] = float("nan")
        case.logits.view(-1, V)[0, other] = float("inf")
        logp, lse = case.forward()
        assert logp[:2].isnan().all() and torch.isfinite(logp[2]), column
        grad = case.backward(lse).view(-1, V)
        assert grad[[3, 0]].isnan().all() and torch.isfinite(grad[1]).all()
    case = Rows(V, torch.bfloat16, *PLAIN)
    case.logits.view(-1, V)[3] = float("-inf")
    logp, lse = case.forward()
    assert logp[0].isnan() and torch.isfinite(logp[1:]).all()
    assert lse[0] == float("-inf")  # of a vocabulary shard that is all padding the other ranks need this
    assert case.backward(lse).view(-1, V)[3].isnan().all()


@pytest.mark.parametrize(("dtype", "V"), SMALL_AND_LARGE, ids=str)
def test_extreme_rows(V, dtype):
    """+-1e4, a large constant on a whole row, and a row that is nothing but the lowest number: uniform."""
    check(Rows(V, dtype, *PLAIN, spread=1e4))
    case = Rows(V, dtype, *PLAIN)
    case.logits += 3e4
    check(case)
    case.logits[:] = torch.finfo(dtype).min
    logp, _ = case.forward()
    assert (logp + torch.tensor(float(V)).log()).abs().max() < 1e-5
    case.logits[:] = torch.finfo(dtype).max
    logp, _ = case.forward()
    assert (logp + torch.tensor(float(V)).log()).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("dtype", "V", "a"), [(torch.float32, 9, 0.7), (torch.float32, 530, 1.0), (torch.bfloat16, 530, 0.7)], ids=str
)
def test_rows_of_huge_numbers(V, dtype, a):
    """Where scale * x has no digits behind its point: equal logits have equal shares. From about 1e14 on lse does not
    hold log V, and the gradient is only finite."""
    for size in (1e8, 5e9, -1e12, -1e30, torch.finfo(dtype).min, torch.finfo(dtype).max):
        for lower in (False, True):  # some of the row a number of the dtype lower: probability 0
            case = Rows(V, dtype, a, 0.0, coef=(0.7, -1.3, 2.0))
            case.logits[:] = size
            if lower:
                below = torch.nextafter(case.logits, torch.full_like(case.logits, float("-inf")))
                case.logits[..., 2::3] = below[..., 2::3].clamp(min=torch.finfo(dtype).min)
            case.labels[:] = 3
            differences = case.logits.double() - case.logits.double().amax(-1, keepdim=True)
            logs = (a * differences).log_softmax(-1).view(-1, V)[case.rows]
            logp, lse = case.forward()
            torch.testing.assert_close(logp.double(), logs[:, 3], rtol=1e-6, atol=1e-6, msg=f"{size} {logp}")
            out = case.backward(lse)
            assert out.isfinite().all(), size
            case.backward(lse, out=case.logits)
            assert torch.equal(case.logits, out), size
            if abs(size) > 1e13:
                continue
            want = -logs.exp()
            want[:, 3] += 1
            want *= case.coef[:, None] * 1.5 * a
            got = out.view(-1, V)[case.rows].double()
            rtol = torch.finfo(dtype).eps + (1e-2 if abs(size) > 1e10 else 1e-4)
            torch.testing.assert_close(got, want, rtol=rtol, atol=1e-7, msg=lambda m, s=size: f"{s}: {m}")


def test_constant_shift_costs_no_digits():
    """A row and the same row + 2^13 (exact in float32 here): the same log-probs to float32 accuracy."""
    case = Rows(5000, torch.float32, *PLAIN)
    case.logits.copy_((case.logits * 1024).round() / 1024)
    logp, _ = case.forward()
    case.logits += 8192
    shifted, _ = case.forward()
    assert (logp - shifted).abs().max() <= 8 * EPS


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_unscored_rows_do_not_matter(dtype):
    """Whatever is in them, NaN too, log-probs and gradient are the same; a row with coefficient 0 counts as unscored
    backward.
    """
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
    torch.testing.assert_close(case.backward(lse, upstream=False) * 1.5, case.backward(lse))
    case.upstream = torch.tensor(0.0)
    assert (case.backward(lse) == 0).all()
    case.upstream = torch.tensor(float("nan"))
    assert case.backward(lse).view(-1, 1300)[3].isnan().all()


def test_label_outside_the_vocabulary():
    """-1 is a label of another vocabulary shard: logp = -lse, gradient without a onehot. Others: NaN, in the whole row
    of the gradient too, and no wild access.
    """
    case = Rows(100, torch.float32, *PLAIN)
    case.labels = torch.tensor([-1, 100, 2**40])
    logp, lse = case.forward()
    assert torch.equal(logp[0], -lse[0].float())
    assert logp[1:].isnan().all() and torch.isfinite(lse).all()
    case.coef = torch.ones(3)
    grad = case.backward(lse).view(-1, 100)[case.rows]  # minus softmax, and nothing written outside (backward checks)
    torch.testing.assert_close(grad[0].sum(), torch.tensor(-1.5))
    assert grad[1:].isnan().all()


def test_nothing():
    case = Rows(100, torch.float32, *PLAIN, positions=(), coef=())
    case.labels = torch.empty(0, dtype=torch.int64)
    logp, lse = case.forward()
    assert logp.shape == lse.shape == (0,)
    assert (case.backward(lse) == 0).all()
    backend.token_logp_bwd(
        *[case.logits[:0], case.row_of[:0], case.labels, lse, case.coef, None, 1.0, 0.0, case.logits[:0]]
    )


def test_same_bits_every_run():
    case = Rows(9001, torch.bfloat16, *PLAIN)
    first, second = case.forward(), case.forward()
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert torch.equal(case.backward(first[1]), case.backward(first[1]))


@pytest.mark.parametrize(("V", "programs"), [(8191, 2), (40009, 2)])
def test_programs_of_a_row_do_not_show(V, programs, monkeypatch):
    """Few rows are shared by several programs, with the bits of one; the counters are left at zero. Two programs have
    two segments, and three.
    """
    case = Rows(V, torch.bfloat16, *PLAIN, B=1, T=3, positions=(2, 0), coef=(1.0, 0.5), offset=5)
    case.logits.view(3, V)[2, : V // 2] = float("-inf")
    case.labels = torch.tensor([V - 1, 0])
    counters = torch.zeros(2, dtype=torch.int32)
    monkeypatch.setattr(FORWARD_FILE, "arrival_counters", lambda device: counters)
    monkeypatch.setattr(FORWARD_FILE, "_programs_per_row", lambda *args: 1)
    expected = case.forward()
    monkeypatch.setattr(FORWARD_FILE, "_programs_per_row", lambda *args: programs)
    assert all(torch.equal(x, y) for x, y in zip(case.forward(), expected, strict=True))
    assert (counters == 0).all()
    logp, lse, _ = case.truth()
    assert (expected[0] - logp).abs().max() < 1e-5 and (expected[1] - lse).abs().max() < 1e-5


def test_programs_per_row():
    assert _programs_per_row(1, 8) == 8
    assert _programs_per_row(264, 8) == 2
    assert _programs_per_row(528, 8) == _programs_per_row(5, 0) == 1


@pytest.mark.parametrize(("V", "shares"), [(1, 2), (1023, 3), (8200, 20), (17001, 2), (17001, 3)])
def test_shares_of_a_row_do_not_show(V, shares, monkeypatch):
    case = Rows(V, torch.bfloat16, *PLAIN, B=1, T=2, positions=(1,), coef=(1.0,), offset=1)
    _, lse = case.forward()
    monkeypatch.setattr(BACKWARD_FILE, "column_shares", lambda *args: 1)
    expected = case.backward(lse)
    monkeypatch.setattr(BACKWARD_FILE, "column_shares", lambda *args: shares)
    assert torch.equal(case.backward(lse), expected)


def test_why_not():
    cpu = torch.device("cpu")
    assert all(backend.why_not(cpu, dtype) is None for dtype in DTYPES)
    assert "float64" in backend.why_not(cpu, torch.float64)
    assert "meta" in backend.why_not(torch.device("meta"), torch.float32)
