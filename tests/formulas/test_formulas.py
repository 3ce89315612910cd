# SPDX-License-Identifier: Apache-2.0
"""The loss definitions: golden values worked out by hand, closed forms, gradcheck; generated forms against definitions.

Mutations of sspo_ext/heads/ and backends/generate.py, each caught by the test named (on a copy of the package):
  sigmoid: margin added                        test_golden
  label smoothing the wrong way round          test_golden
  hinge: squared                               test_golden
  ipo: 1 / beta                                test_golden
  ipo: sums, not means                         test_golden
  simpo: gamma times beta                      test_golden
  unknown options ignored                      test_options
  naive log sigmoid                            test_finite_far_out
  generate --check never fails                 test_check_notices_a_stale_file
  generate: relu passes gradient at negatives  test_generated_files_are_up_to_date
"""

import math

import pytest
import torch
from helpers.batch import fused_backends
from helpers.paths import ROOT

from sspo_ext.backends.arguments import StepLossArguments
from sspo_ext.formulas.registry import MAX_OPTIONS, PAIR_FORMULAS, PairScores, formula_id, get_pair_formula
from tools import generate_formulas as generate

F64 = torch.float64
NAMES = list(PAIR_FORMULAS)
# every head with options away from their defaults too
OPTIONS = [(n, {}) for n in NAMES] + [
    ("sigmoid", {"beta": 0.7}),
    ("hinge", {"beta": 1.3}),
    ("ipo", {"beta": 0.05}),
    ("simpo", {"beta": 2.5, "simpo_gamma": 1.4}),
    ("simpo", {"simpo_gamma": 0.0}),
    ("discopop", {"beta": 0.3, "discopop_tau": 0.5}),
    ("sigmoid_alpha_divergence", {"f_alpha_divergence_coef": 0.2}),
    ("sigmoid_alpha_divergence", {"f_alpha_divergence_coef": 1.7}),
    ("flex_dpo", {"beta": 0.02, "beta_rejected": 0.3}),
    ("slic", {"beta": 0.4, "slic_delta": 3.0}),
    ("cpo", {"cpo_alpha": 0.3}),
    ("orpo", {"beta": 1.5}),
    ("sppo", {"beta": 0.4}),
    ("exo_pair", {"beta": 0.4}),
    ("bco_pair", {"beta": 0.4}),
]
# heads that exponentiate a score: kept where float64 has digits for a finite difference
EXPONENTIAL = {"sigmoid_forward_kl", "sigmoid_alpha_divergence", "discopop"}
LIKELIHOOD = {"orpo", "asft"}  # of log-probs, which are negative


def scores(u_w, u_l, n_w=1.0, n_l=1.0, margin=0.0, label=1.0):
    return PairScores(*(torch.as_tensor(v, dtype=F64) for v in (u_w, u_l, n_w, n_l, margin, label)))


def call(name, s, options=None):
    head = get_pair_formula(name)
    values = head.check_options(
        (options or {}).get("beta", head.options["beta"]), {k: v for k, v in (options or {}).items() if k != "beta"}
    )
    return head.fn(s, **dict(zip(head.options, values, strict=True)))


@pytest.mark.parametrize(
    ("name", "s", "options", "want"),
    [
        # equal steps: -log sigmoid(0) = ln 2
        ("sigmoid", scores(-3.0, -3.0), {}, math.log(2)),
        # z = .1 (5 - 1) = .4 ; log(1 + e^-.4) = log(1.670320046) = .513015
        ("sigmoid", scores(5.0, 1.0), {}, 0.5130152523999526),
        # label .9: .9 * .5130152524 + .1 * log(1 + e^.4) (= .9130152524) = .5530152524
        ("sigmoid", scores(5.0, 1.0, label=0.9), {}, 0.5530152523999526),
        # margin .4 brings z back to 0
        ("sigmoid", scores(5.0, 1.0, margin=0.4), {}, math.log(2)),
        # torchtune's DPO test: log-ratios of policy - reference; z = .1 (-.5 - (-.1 - .4)) = 0
        ("sigmoid", scores(-0.5, -0.5), {}, 0.6931471805599453),
        # 1 - .1 * (5 - 1) = .6 ; with margin .2: .8 ; far right: 0 ; wrong order: 1 + .1 * 30 = 4
        ("hinge", scores(5.0, 1.0), {}, 0.6),
        ("hinge", scores(5.0, 1.0, margin=0.2), {}, 0.8),
        ("hinge", scores(30.0, 1.0), {}, 0.0),
        ("hinge", scores(-10.0, 20.0), {}, 4.0),
        # means -6/3 = -2 and -8/2 = -4: (2 - 1/(2 * .1))^2 = 9 ; margin .1 / beta .1 = 1: (2 - 1 - 5)^2 = 16
        ("ipo", scores(-6.0, -8.0, 3, 2), {}, 9.0),
        ("ipo", scores(-6.0, -8.0, 3, 2, margin=0.1), {}, 16.0),
        # the minimum: a margin of means of 1 / (2 beta) = 1
        ("ipo", scores(-3.0, -8.0, 1, 2), {"beta": 0.5}, 0.0),
        # beta 2, gamma .5: z = 2 (-2 + 4) - .5 = 3.5 ; log(1 + e^-3.5) = log(1.0301973834) = .0297504
        ("simpo", scores(-6.0, -8.0, 3, 2), {}, 0.029750418272620567),
        # margin comes off as well: z = 3.5 - 3.5 = 0
        ("simpo", scores(-6.0, -8.0, 3, 2, margin=3.5), {}, math.log(2)),
        # gamma 4 = 2 (-2 + 4): z = 0
        ("simpo", scores(-6.0, -8.0, 3, 2), {"simpo_gamma": 4.0}, math.log(2)),
        # label 0 turns the pair round: log(1 + e^3.5) = 3.5 + .0297504
        ("simpo", scores(-6.0, -8.0, 3, 2, label=0.0), {}, 3.529750418272620567),
        # sums: (4 - 1/(2 * .1))^2 = 1 ; margin .1 / beta .1 = 1: (4 - 1 - 5)^2 = 4
        ("ipo_sum", scores(5.0, 1.0, 3, 2), {}, 1.0),
        ("ipo_sum", scores(5.0, 1.0, 3, 2, margin=0.1), {}, 4.0),
        # 2 (5/5 - 1/2) = 1: log(1 + e^-1)
        ("sigmoid_norm", scores(5.0, 1.0, 5, 2), {"beta": 2.0}, 0.31326168751822286),
        # e = .1, a = -ls(.4): (.9 a - .1 (a + .4)) / .8 = a - .05
        ("robust", scores(5.0, 1.0, label=0.9), {}, 0.5130152523999526 - 0.05),
        ("robust", scores(5.0, 1.0), {}, 0.5130152523999526),
        # z = 0: (-ln 2 - ln .9) / 2 + (-ln 2 - ln .1) / 2 = -ln 2 - ln .3 = -ln .6 ; q = sig(z): no divergence
        ("exo_pair", scores(3.0, 3.0, label=0.9), {}, -math.log(0.6)),
        ("exo_pair", scores(math.log(3), 0.0, label=0.75), {"beta": 1.0}, 0.0),
        # z = 0: ln 2 / 2 + 1 / 2
        ("discopop", scores(3.0, 3.0), {}, 0.5 + math.log(2) / 2),
        # tau 1, z = ln 3: sig = 3/4: ln(4/3) / 4 + 3/4 * 1/3
        ("discopop", scores(math.log(3), 0.0), {"beta": 1.0, "discopop_tau": 1.0}, math.log(4 / 3) / 4 + 0.25),
        # e^-u: 1/2 and 2: z = .1 * 1.5
        ("sigmoid_forward_kl", scores(math.log(2), -math.log(2)), {}, math.log1p(math.exp(-0.15))),
        # ls(ln 3) - ls(0) = ln(3/4) - ln(1/2) = ln 1.5: sig(ln 1.5) = .6
        ("sigmoid_js_divergence", scores(math.log(3), 0.0), {"beta": 1.0}, -math.log(0.6)),
        # a = 1/2: (1 - 2) / (-1/2) = 2, beta 1/2: z = 1
        ("sigmoid_alpha_divergence", scores(0.0, -2 * math.log(2)), {"beta": 0.5}, 0.31326168751822286),
        # a = 2: (3 - 2) / 1 = 1
        (
            "sigmoid_alpha_divergence",
            scores(math.log(3), math.log(2)),
            {"beta": 1.0, "f_alpha_divergence_coef": 2.0},
            0.31326168751822286,
        ),
        # .1 * 5 - .05 * 1 = .45
        ("flex_dpo", scores(5.0, 1.0), {}, math.log1p(math.exp(-0.45))),
        # 1 - (1 - .5) = .5 ; margin .2: .7 ; apart by more than 1: 0 ; delta 3, beta 2: 3 - 1 = 2
        ("slic", scores(1.0, 0.5), {}, 0.5),
        ("slic", scores(1.0, 0.5, margin=0.2), {}, 0.7),
        ("slic", scores(5.0, 1.0), {}, 0.0),
        ("slic", scores(1.0, 0.5), {"beta": 2.0, "slic_delta": 3.0}, 2.0),
        # rewards .5 and .1: softplus(-.5) + softplus(.5) / 2 + softplus(.1) / 2
        ("nca_pair", scores(5.0, 1.0), {}, 0.4740769841801067 + 0.48703849209005335 + 0.37219833003678545),
        # softplus(-.5) + softplus(.1) ; shifted by .5: softplus(0) + softplus(-.4)
        ("bco_pair", scores(5.0, 1.0), {}, 0.4740769841801067 + 0.7443966600735709),
        ("bco_pair", scores(5.0, 1.0, margin=0.5), {}, math.log(2) + 0.5130152523999526),
        # (5 - 5)^2 + (1 + 5)^2 ; q = .75: target 2.5: 2.5^2 + 3.5^2 ; q = 1 is sppo_hard
        ("sppo_hard", scores(5.0, 1.0), {}, 36.0),
        ("sppo", scores(5.0, 1.0, label=0.75), {}, 18.5),
        ("sppo", scores(5.0, 1.0), {}, 36.0),
        # sig(-.5) + sig(.1) ; sig(.5) + sig(-.4)
        ("apo_zero", scores(5.0, 1.0), {}, 0.3775406687981454 + 0.52497918747894),
        ("apo_down", scores(5.0, 1.0), {}, 0.6224593312018546 + 0.401312339887548),
        # -(-6 / 3) ; -(-8 / 2)
        ("sft", scores(-6.0, -8.0, 3, 2), {}, 2.0),
        ("nll", scores(-6.0, -8.0, 3, 2), {}, 2.0),
        ("nll_rejected", scores(-6.0, -8.0, 3, 2), {}, 4.0),
        # z = .1 * 2: softplus(-.2) = .5981388694, and 2 or half of it
        ("cpo", scores(-6.0, -8.0, 3, 2), {}, 2.5981388693815918),
        ("cpo", scores(-6.0, -8.0, 3, 2), {"cpo_alpha": 0.5}, 1.5981388693815918),
        # token means ln 1/2 and ln 1/4: odds 1 and 1/3, -ls(ln 3) = ln(4/3)
        ("orpo", scores(2 * math.log(0.5), 3 * math.log(0.25), 2, 3), {}, math.log(2) + 0.1 * math.log(4 / 3)),
        # ln 2 + .1 (ln 2 - ln(1 - 1/4))
        ("asft", scores(2 * math.log(0.5), 3 * math.log(0.25), 2, 3), {}, math.log(2) + 0.1 * math.log(8 / 3)),
    ],
)  # fmt: skip
def test_golden(name, s, options, want):
    assert call(name, s, options).item() == pytest.approx(want, rel=1e-12, abs=1e-15)


def test_every_formula_has_a_golden_value():
    golden = next(m for m in test_golden.pytestmark if m.name == "parametrize").args[1]
    assert {case[0] for case in golden} == set(NAMES)


def test_asft_is_its_printed_form():
    """NLL_w + beta [-ls(log-odds of p_w) - ls(-log-odds of p_l)], as the paper prints it."""
    p_w, p_l = torch.tensor([0.3, 0.9, 1e-4], dtype=F64), torch.tensor([0.6, 0.05, 0.999], dtype=F64)
    odds_w, odds_l = (torch.log(p) - torch.log1p(-p) for p in (p_w, p_l))
    ls = torch.nn.functional.logsigmoid
    got = call("asft", PairScores(3 * p_w.log(), 2 * p_l.log(), torch.tensor(3.0), torch.tensor(2.0), None, None))
    torch.testing.assert_close(got, -p_w.log() - 0.1 * (ls(odds_w) + ls(-odds_l)), rtol=1e-13, atol=0)


def test_closed_form_derivatives():
    # d/du_w: sigmoid -beta sig(-z), hinge -beta while z < 1, ipo 2 (m - 1/(2 beta)) / n, simpo -beta sig(-z) / n
    s = scores(-6.0, -8.0, 3, 2)
    u_w, u_l = s.u_w.clone().requires_grad_(), s.u_l.clone().requires_grad_()

    def gradients(name):
        return [g.item() for g in torch.autograd.grad(call(name, s._replace(u_w=u_w, u_l=u_l)), (u_w, u_l))]

    sig = 1 / (1 + math.exp(0.2))
    assert gradients("sigmoid") == pytest.approx([-0.1 * sig, 0.1 * sig], rel=1e-12)
    assert gradients("hinge") == pytest.approx([-0.1, 0.1], rel=1e-12)
    assert gradients("ipo") == pytest.approx([2 * (2 - 5) / 3, -2 * (2 - 5) / 2], rel=1e-12)
    sig = 1 / (1 + math.exp(3.5))
    assert gradients("simpo") == pytest.approx([-2 * sig / 3, 2 * sig / 2], rel=1e-12)


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_gradcheck(name, options):
    g = torch.Generator().manual_seed(0)
    size = 2 if name in EXPONENTIAL else 8
    u_w, u_l = (torch.randn(16, generator=g, dtype=F64).mul(size) for _ in range(2))
    if name in LIKELIHOOD:
        u_w, u_l = -u_w.abs(), -u_l.abs()
    u_w, u_l = u_w.requires_grad_(), u_l.requires_grad_()
    n_w, n_l = (torch.randint(1, 9, (16,), generator=g).to(F64) for _ in range(2))
    margin, label = torch.rand(16, generator=g, dtype=F64), torch.rand(16, generator=g, dtype=F64) * 0.4
    assert torch.autograd.gradcheck(
        lambda a, b: call(name, PairScores(a, b, n_w, n_l, margin, label), options), (u_w, u_l)
    )


@pytest.mark.parametrize(("name", "options"), OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("label", [0.9, 1.0])
def test_finite_far_out(name, options, dtype, label):
    """Every pair of scores from a wide grid, both signs: loss and both derivatives are finite."""
    if name == "exo_pair" and label == 1.0:
        label = 0.999
    z = torch.tensor([0, 1e-7, 1e-3, 0.5, 1, 80, 89, 100, 1e3, 1e4], dtype=dtype)
    u = torch.cat([-z, z]) / options.get("beta", 0.1)
    u_w, u_l = (v.reshape(-1).requires_grad_() for v in torch.meshgrid(u, u, indexing="ij"))
    ones = torch.ones_like(u_w)
    loss = call(name, PairScores(u_w, u_l, ones, ones, 0 * ones, label * ones), options)
    grads = torch.autograd.grad(loss.sum(), (u_w, u_l), allow_unused=True)
    assert loss.isfinite().all() and all(g.isfinite().all() for g in grads if g is not None)


def test_options():
    head = get_pair_formula("simpo")
    assert head.check_options(3.0, {"simpo_gamma": 1}) == [3.0, 1.0]
    assert head.check_options(3.0, {}) == [3.0, 0.5]
    with pytest.raises(TypeError, match="simpo_gamma: .*loss_type 'sigmoid'"):
        get_pair_formula("sigmoid").check_options(0.1, {"simpo_gamma": 1.0})
    with pytest.raises(TypeError, match="simpo_gamma: expected a number, got '1'"):
        head.check_options(0.1, {"simpo_gamma": "1"})
    with pytest.raises(TypeError, match="beta: expected a number"):
        head.check_options(torch.tensor(0.1), {})
    with pytest.raises(ValueError, match="simpo_gamma: expected a finite number, got nan"):
        head.check_options(0.1, {"simpo_gamma": float("nan")})
    for beta in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="beta: expected a"):
            head.check_options(beta, {})
    with pytest.raises(ValueError, match=r"discopop_tau: .*expects a number in \(0, 1\], got 1.5"):
        get_pair_formula("discopop").check_options(0.1, {"discopop_tau": 1.5})
    with pytest.raises(ValueError, match="f_alpha_divergence_coef: .*other than 1 .*'sigmoid'"):
        get_pair_formula("sigmoid_alpha_divergence").check_options(0.1, {"f_alpha_divergence_coef": 1})
    with pytest.raises(ValueError, match="beta_rejected: .*above 0, got 0"):
        get_pair_formula("flex_dpo").check_options(0.1, {"beta_rejected": 0})
    with pytest.raises(ValueError, match="loss_type: 'aot' needs more than a pair at a time; call .*aot_loss"):
        get_pair_formula("aot")
    with pytest.raises(ValueError, match="loss_type: expected one of 'sigmoid', 'hinge', 'ipo'.*, got 'sigma'"):
        get_pair_formula("sigma")


def test_table():
    assert [formula_id(n) for n in NAMES] == list(range(len(NAMES)))
    for name, head in PAIR_FORMULAS.items():
        assert head.name == name and head.formula and head.source and head.use
        assert set(head.limits) <= set(head.options)
        assert next(iter(head.options)) == "beta" and len(head.options) <= MAX_OPTIONS


# ---- the generated forms


@pytest.fixture(autouse=True)
def source_tree(monkeypatch):
    """The files of this checkout, whichever copy of the package is imported."""
    for name in ("CPP_FILE", "TRITON_FILE", "HASH_FILE"):
        monkeypatch.setattr(generate, name, ROOT / getattr(generate, name).relative_to(generate.ROOT))
    monkeypatch.setattr(generate, "ROOT", ROOT)


def test_generated_files_are_up_to_date():
    assert generate.main(["--check"]) == 0, "run python -m tools.generate_formulas"


def test_check_notices_a_stale_file(tmp_path, monkeypatch, capsys):
    copy = tmp_path / "formulas_generated.h"
    copy.write_text(generate.CPP_FILE.read_text() + "\n")
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    monkeypatch.setattr(generate, "CPP_FILE", copy)
    monkeypatch.setattr(generate, "TRITON_FILE", tmp_path / "new" / "formulas_generated.py")
    monkeypatch.setattr(generate, "HASH_FILE", tmp_path / "new" / "generated_hash.py")
    # that these are what it writes: the test above
    cpp, triton = generate.CPP_FILE.read_text()[:-1], "fused = True\n"
    monkeypatch.setattr(generate, "cpp_source", lambda: cpp)
    monkeypatch.setattr(generate, "triton_source", lambda: triton)
    before = copy.read_text()
    assert generate.main(["--check"]) == 1 and "stale: formulas_generated.h" in capsys.readouterr().out
    assert copy.read_text() == before
    assert generate.main([]) == 0 and generate.main(["--check"]) == 0
    assert copy.read_text() == before[:-1] and (tmp_path / "new" / "formulas_generated.py").read_text() == triton


def pairs_of_one_row_steps(backend, dtype, name, options, s: PairScores, labelled: bool):
    """The fused head of a backend on P pairs: step 2p against step 2p + 1. Returns losses and d/du of both sides.

    Steps have n rows each, so that the counts are the head's; all of a step's log-prob is in its first row.
    """
    from sspo_ext import backends

    P = len(s.u_w)
    counts = torch.stack([s.n_w, s.n_l], 1).reshape(-1).to(torch.int64)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    logp = torch.zeros(int(offsets[-1]), dtype=dtype)
    logp[offsets[:-1]] = torch.stack([s.u_w, s.u_l], 1).reshape(-1).to(dtype)
    codes = torch.arange(2 * P, dtype=torch.int32)
    head = get_pair_formula(name)
    values = head.check_options(
        options.get("beta", head.options["beta"]), {k: v for k, v in options.items() if k != "beta"}
    )
    _, sums, losses, coef = backends.load(backend).step_loss_fwd(StepLossArguments(
        logp, None, offsets.to(torch.int32), None, codes.reshape(P, 2), torch.arange(2 * P + 1, dtype=torch.int32),
        codes, None, s.margin.to(dtype), s.label.to(dtype) if labelled else None, torch.ones((), dtype=dtype), name,
        values, float(s.label[0]),
    ))  # fmt: skip
    return losses, coef[offsets[:-1]].reshape(P, 2)


def grid(dtype, few, name):
    """Scores of ordinary and of extreme sizes; for a likelihood also near 0, where odds are lost."""
    g = torch.Generator().manual_seed(1)
    scale = 3 if name in EXPONENTIAL else 20
    far = [-20.0, -15, -1, 0, 0, 1, 15, 20] if name in EXPONENTIAL else [-3000.0, -40, -1, 0, 0, 1, 40, 3000]
    u = torch.cat([torch.randn(40, generator=g, dtype=F64) * scale, torch.tensor(far, dtype=F64)])
    u_l = torch.cat(
        [torch.randn(40, generator=g, dtype=F64) * scale, torch.tensor([0.0, 0, 0, 0, 1e-3, 0, 0, 0], dtype=F64)]
    )
    if name in LIKELIHOOD:
        u, u_l = -u.abs() - 0.1, -u_l.abs() - 0.1
    n_w, n_l = (torch.randint(1, 6, (48,), generator=g).to(F64) for _ in range(2))
    margin, label = torch.rand(48, generator=g, dtype=F64), torch.rand(48, generator=g, dtype=F64) * 0.4
    keep = slice(34, 48) if few else slice(None)
    return PairScores(*(v[keep].to(dtype).to(F64) for v in (u, u_l, n_w, n_l, margin, label)))


@pytest.mark.interpreted
@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_generated_equals_the_definition(backend, name, options):
    """Loss and both derivatives, pair by pair, against autograd of the one definition in float64."""
    labelled = bool(options)  # a label for each pair in some cases, one for all in the others
    for dtype in (torch.float32, F64):
        if backend not in fused_backends(dtype):
            continue
        s = grid(dtype, few=backend == "triton", name=name)
        if not labelled:
            s = s._replace(label=torch.full_like(s.label, 0.75))
        u_w, u_l = s.u_w.clone().requires_grad_(), s.u_l.clone().requires_grad_()
        want = call(name, s._replace(u_w=u_w, u_l=u_l), options)
        grads = torch.stack(torch.autograd.grad(want.sum(), (u_w, u_l), allow_unused=True, materialize_grads=True), 1)
        losses, du = pairs_of_one_row_steps(backend, dtype, name, options, s, labelled)
        # every term a head adds up may be rounded: the bound is some eps of the largest of them
        size = 1 + s.u_w.abs() + s.u_l.abs() + (1 / options.get("beta", 0.1)) ** 2
        eps = 16 * torch.finfo(dtype).eps
        assert ((losses.to(F64) - want).abs() <= eps * (want.abs() + size * want.abs().sqrt() + 1)).all()
        assert ((du.to(F64) - grads).abs() <= eps * (grads.abs() + size[:, None])).all()
