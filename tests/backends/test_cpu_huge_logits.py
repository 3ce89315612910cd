# SPDX-License-Identifier: Apache-2.0
"""csrc/cpu on rows whose logits are huge finite numbers: a row masked throughout with its dtype's lowest number, say.

Every instruction set this machine has, against a softmax of exact differences in float64.
"""

import math

import pytest
import torch
from helpers.cpu_rows import NOT_BUILT

from sspo_ext.backends import cpu
from sspo_ext.routes.shared import gradient_coefs

pytestmark = pytest.mark.skipif(bool(NOT_BUILT), reason=str(NOT_BUILT))

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ROWS, ROW_OF = torch.tensor([0]), torch.tensor([0, -1], dtype=torch.int32)


def sizes(dtype):
    kind = torch.finfo(dtype)
    return [kind.min, kind.max, *(s for s in (-1e30, 1e16, -1e12, 5e9, -3e8, 1e7) if abs(s) < kind.max)]


def rows_of(size, dtype, V, spread):
    """(1, 2, V) logits near `size`: all equal, or some of them neighbouring numbers of the dtype."""
    x = torch.full((1, 2, V), size, dtype=dtype)
    if spread:
        x[0, 0, 2::3] = torch.nextafter(x[0, 0, 2::3], torch.zeros((), dtype=dtype))
    return x


def log_softmax_of_differences(x, a):
    """(V,) float64, of x (V,): no product is larger than a difference."""
    differences = x.double() - x.double().max()
    return (a * differences).log_softmax(-1)


@pytest.mark.parametrize("V", [17, 9001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_huge_numbers(isa, dtype, V):
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    coef, labels = torch.full((1,), 0.5, dtype=acc), torch.tensor([3])
    for size in sizes(dtype):
        # 0.3 z is exact in no binary format; of float64's largest numbers it is still finite
        for a, spread in ((1.0, False), (0.3, False), (1.0, True)):
            x = rows_of(size, dtype, V, spread)
            logs, name = log_softmax_of_differences(x[0, 0], a), f"{size} a {a} {spread}"
            logp, lse = cpu.token_logp_fwd(x, ROWS, labels, a, 0.0)
            out = torch.full_like(x, math.nan)
            cpu.token_logp_bwd(x, ROW_OF, labels, lse, coef, None, a, 0.0, out)
            want = -0.5 * a * logs.exp()
            want[3] += 0.5 * a
            assert abs(logp.item() - logs[3].item()) <= 1e-6 * (1 + abs(logs[3].item())), name
            tolerance = 2 * torch.finfo(dtype).eps + 2e-6
            torch.testing.assert_close(
                out[0, 0].double(), want, rtol=tolerance, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
            )
            assert (out[0, 1] == 0).all()
            cpu.token_logp_bwd(x, ROW_OF, labels, lse, coef, None, a, 0.0, x)
            assert torch.equal(x, out), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reductions_of_huge_numbers(isa, dtype):
    V, labels = 300, torch.tensor([3])
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    for size in sizes(dtype):
        for ref_size in (size, 1.0, -size):
            x, y = rows_of(size, dtype, V, False), rows_of(ref_size, dtype, V, False)
            logp, lse, entropy, sum_p2, kl, ref_lse = cpu.row_reductions_fwd(x, ROWS, labels, y, 1.0, 0.0, True, True)
            for value, want in ((logp, -math.log(V)), (entropy, math.log(V)), (sum_p2, 1 / V), (kl, 0.0)):
                assert abs(value.item() - want) <= 2e-6 * (1 + abs(want)), f"{size} {ref_size}"
            # of uniform rows entropy, squares and KL are at their extreme, and only the log-prob has a gradient
            coefs = gradient_coefs(entropy, sum_p2, *(torch.ones(1, dtype=acc) for _ in range(4)))
            out = torch.full_like(x, math.nan)
            cpu.row_reductions_bwd(x, ROW_OF, labels, lse, y, ref_lse, coefs, 1.0, 0.0, out)
            want = torch.full((V,), -1 / V, dtype=torch.float64)
            want[3] += 1
            rtol = 2 * torch.finfo(dtype).eps
            torch.testing.assert_close(
                out[0, 0].double(), want, rtol=rtol, atol=2e-6, msg=lambda m, s=size: f"{s}: {m}"
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_shard_of_a_huge_row(isa, dtype):
    """The lse of the whole vocabulary, of which these columns are a quarter: their softmax sums to a quarter."""
    x, none = torch.full((1, 2, 16), 1e9, dtype=dtype), torch.tensor([-1])
    _, lse = cpu.token_logp_fwd(x, ROWS, none, 1.0, 0.0)
    out = torch.empty_like(x)
    cpu.token_logp_bwd(x, ROW_OF, none, lse + math.log(4), torch.ones(1), None, 1.0, 0.0, out)
    torch.testing.assert_close(out[0, 0].double(), torch.full((16,), -1 / 64, dtype=torch.float64), rtol=1e-6, atol=0)
    x[0, 0] = -math.inf  # all of it padding
    cpu.token_logp_bwd(x, ROW_OF, none, lse, torch.ones(1), None, 1.0, 0.0, out)
    assert (out[0, 0] == 0).all()
