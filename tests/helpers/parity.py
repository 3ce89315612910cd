# SPDX-License-Identifier: Apache-2.0
"""Independent implementations called on our batches: the unbound loss code of TRL's trainers, and Liger's losses.

Each peer gives a loss as a function of logits (or hidden states and head), to be differentiated by autograd.
"""

from __future__ import annotations

import json
import math
import os
import types
from collections import defaultdict

import pytest
import torch
from torch import Tensor

from helpers.paths import DOCS
from sspo_ext.layout.steps import StepLayout

F64 = torch.float64
TRL, LIGER = "TRL 1.16", "Liger 0.8"
PARITY = DOCS / "parity.json"


def sequences(seed=0, B=6, T=15, V=23, dtype=torch.float32):
    """One step per sequence: prompt tokens, then a completion; no empty one."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, T, V, generator=g, dtype=F64).mul(3).to(dtype)
    input_ids = torch.randint(0, V, (B, T), generator=g)
    mask = torch.zeros(B, T, dtype=torch.bool)
    for b in range(B):
        start = int(torch.randint(1, 5, (), generator=g))
        mask[b, start : int(torch.randint(start + 1, T + 1, (), generator=g))] = True
    layout = StepLayout.from_step_ids(input_ids.masked_fill(~mask, -100), torch.where(mask, 0, -1))
    return logits, input_ids, mask, layout, torch.randn(B, generator=g, dtype=F64).to(dtype) * 4


def trl_module(name: str):
    """A module of the TRL whose private code these tests are pinned to."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    if not trl.__version__.startswith("1.16."):
        pytest.skip(f"trl {trl.__version__}: the private oracle is pinned to 1.16")
    return pytest.importorskip(name)


def token_logps(logits: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
    """(B, T - 1): as TRL's fused head gives them, zeros where nothing is scored."""
    return trl_module("trl.trainer.utils").selective_log_softmax(logits[:, :-1], input_ids[:, 1:]) * mask[:, 1:]


def _fused_output(per_token: Tensor, log_sum_sq: Tensor | None = None):
    zero = torch.zeros((), dtype=per_token.dtype).expand(per_token.shape)
    return types.SimpleNamespace(
        log_probs=per_token, entropy=zero, mean_logits=zero, is_top1=zero.bool(), log_sum_sq_probs=log_sum_sq
    )


def _accelerator(device):
    return types.SimpleNamespace(device=device, gather=lambda x: x, gather_for_metrics=lambda x: x)


def trl_dpo(
    loss_type, per_token, mask, input_ids, ref, beta, *, log_sum_sq=None, loss_weights=None, tau=0.05, **settings
):
    """TRL 1.16's own DPOTrainer._compute_loss, unbound, with a model that hands it these per-token log-probs."""
    trainer = trl_module("trl.trainer.dpo_trainer").DPOTrainer
    names = [loss_type] if isinstance(loss_type, str) else loss_type

    def model(**kw):
        return _fused_output(per_token, log_sum_sq)

    model.training = True
    fake = types.SimpleNamespace(
        **{
            "ld_alpha": None, "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 1.0, "label_smoothing": 0.0,
            "use_weighting": False, **settings,
        },
        model=types.SimpleNamespace(training=True), accelerator=_accelerator(per_token.device), aux_loss_enabled=False,
        precompute_ref_logps=True, loss_types=names, loss_weights=loss_weights or [1.0] * len(names), beta=beta,
        _total_train_tokens=0, _tp_size=1, args=types.SimpleNamespace(discopop_tau=tau),
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    half = len(ref) // 2
    inputs = {
        "input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "completion_mask": mask.long(),
        "ref_chosen_logps": ref[:half], "ref_rejected_logps": ref[half:],
    }  # fmt: skip
    loss = trainer._compute_loss(fake, model, inputs, False)
    return loss, {k: v[0] for k, v in fake._metrics["train"].items() if k.startswith(("rewards", "logps"))}


def trl_kto(loss_type, per_token, kl_per_token, mask, input_ids, desirable, ref, kl_ref, beta, weights=(1.0, 1.0)):
    """TRL 1.16's own KTOTrainer._compute_loss, unbound. The mismatched completions have log-probs of their own."""
    trainer = trl_module("trl.trainer.kto_trainer").KTOTrainer

    def model(input_ids, **kw):
        return _fused_output(kl_per_token if input_ids is kl_ids else per_token)

    kl_ids = input_ids.clone()
    fake = types.SimpleNamespace(
        model=types.SimpleNamespace(training=True), accelerator=_accelerator(per_token.device), aux_loss_enabled=False,
        precompute_ref_logps=True, calculate_KL=loss_type == "kto", loss_type=loss_type, beta=beta,
        desirable_weight=weights[0], undesirable_weight=weights[1], _total_train_tokens=0, _tp_size=1,
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    fake._compute_kl_logps = types.MethodType(trainer._compute_kl_logps, fake)
    ones = torch.ones_like(input_ids)
    batch = {
        "input_ids": input_ids, "attention_mask": ones, "completion_mask": mask.long(), "KL_input_ids": kl_ids,
        "KL_attention_mask": ones, "KL_completion_mask": mask.long(), "label": desirable, "ref_logps": ref,
        "ref_KL_logps": kl_ref,
    }  # fmt: skip

    return trainer._compute_loss(fake, model, batch, False)


def trl_reference_free(which, logits, input_ids, mask, **settings):
    """TRL's CPOTrainer or ORPOTrainer .get_batch_loss_metrics, unbound, with a model that returns these logits."""
    name = which.lower()
    trainer = getattr(trl_module(f"trl.experimental.{name}.{name}_trainer"), f"{which}Trainer")
    fake = types.SimpleNamespace(
        is_encoder_decoder=False, pad_token_id=0, padding_value=0, accelerator=_accelerator(logits.device),
        aux_loss_enabled=False, concatenated_inputs=trainer.concatenated_inputs,
        get_batch_logps=trainer.get_batch_logps, **settings,
    )  # fmt: skip
    for method in ("concatenated_forward", "cpo_loss", "odds_ratio_loss"):
        if hasattr(trainer, method):
            setattr(fake, method, types.MethodType(getattr(trainer, method), fake))
    labels, half = input_ids.masked_fill(~mask, -100), len(input_ids) // 2
    batch = {}
    for side, rows in (("chosen", slice(0, half)), ("rejected", slice(half, None))):
        batch |= {
            f"{side}_input_ids": input_ids[rows], f"{side}_attention_mask": torch.ones_like(input_ids[rows]),
            f"{side}_labels": labels[rows],
        }  # fmt: skip
    return trainer.get_batch_loss_metrics(fake, lambda *a, **kw: types.SimpleNamespace(logits=logits), batch)


def trl_tpo(loss_type, logits, input_ids, mask, beta, gamma, alpha, label_smoothing=0.0):
    """TRL's TPOTrainer._compute_loss, unbound; rows [chosen.., rejected.., gold..]."""
    trainer = trl_module("trl.experimental.tpo.tpo_trainer").TPOTrainer
    fake = types.SimpleNamespace(
        model=types.SimpleNamespace(training=True), accelerator=_accelerator(logits.device), tpo_alpha=alpha,
        loss_type=loss_type, beta=beta, tpo_l_gamma=gamma, label_smoothing=label_smoothing, _total_train_tokens=0,
        _tp_size=1, _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "completion_mask": mask.long()}
    return trainer._compute_loss(fake, lambda **kw: types.SimpleNamespace(logits=logits), inputs, False)


def liger_linear(which, hidden, weight, input_ids, mask, ref_hidden=None, **settings):
    """Liger's chunked losses on hidden states (B, T, H) and a head, uncompiled; it works in float32."""
    module = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    target = input_ids.masked_fill(~mask, -100)[:, 1:]
    loss = getattr(module, f"LigerFusedLinear{which}Loss")(compiled=False, **settings)
    more = {} if ref_hidden is None else {"ref_input": ref_hidden[:, :-1].contiguous(), "ref_weight": weight.detach()}
    out = loss(weight, hidden[:, :-1].contiguous(), target, **more)
    return out[0] if isinstance(out, tuple) else out


# ---- what was measured


def gap(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference, in float64."""
    return (a.detach().double() - b.detach().double()).abs().max().item()


def _power_of_ten(value: float) -> float:
    return 0.0 if value == 0 else float(f"1e{math.ceil(math.log10(value))}")


def record(name: str, peer: str, loss: float, gradient: float, limit: float, note: str = "") -> None:
    """Holds a measured pair of differences against `limit` and against docs/parity.json, which the catalogue's page
    shows. SSPO_WRITE_PARITY=1 writes it there instead of comparing."""
    assert loss <= limit and gradient <= limit, f"{name} against {peer}: loss {loss:.2e}, gradient {gradient:.2e}"
    table = json.loads(PARITY.read_text()) if PARITY.exists() else {}
    mine = {"peer": peer, "loss": _power_of_ten(loss), "gradient": _power_of_ten(gradient), "note": note}
    others = [m for m in table.get(name, []) if (m["peer"], m["note"]) != (peer, note)]
    if os.environ.get("SSPO_WRITE_PARITY") == "1":
        table[name] = sorted([*others, mine], key=lambda m: (m["peer"], m["note"]))
        PARITY.write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n")
        return
    written = [m for m in table.get(name, []) if (m["peer"], m["note"]) == (peer, note)]
    assert written, f"{name} against {peer} is not in docs/parity.json: run once with SSPO_WRITE_PARITY=1"
    # rounding differs between machines; a power of ten or two is no disagreement
    for key in ("loss", "gradient"):
        assert mine[key] <= max(100 * written[0][key], 1e-12), f"{name} against {peer}: {key} {mine[key]:.0e}"
