# SPDX-License-Identifier: Apache-2.0
"""Compares the linear route with the logits route on many real model classes. Writes docs/families.md.

    python -m benchmarks.models.families             # the table (seconds)
    python -m benchmarks.models.families --sweep     # also every causal LM class that builds from a small config

Every model is tiny. Its random weights are large enough that softcaps and scales show. No weights are downloaded.
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sspo_ext.hf.check import check_head
from sspo_ext.hf.forward import forward_hidden
from sspo_ext.hf.head import model_head
from sspo_ext.hf.wrappers import UnsupportedHead
from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses.pref import linear_step_pref_loss, step_pref_loss

_SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)

_GROUPED = _SIZES | dict(num_key_value_heads=2)

_EXPERTS = dict(num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.1)

# name: (model class, config class, config options)
FAMILIES: dict[str, tuple[str, str, dict]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED | dict(tie_word_embeddings=False)),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", _GROUPED | dict(tie_word_embeddings=True)),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _GROUPED | dict(head_dim=8)),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _GROUPED | dict(head_dim=8, final_logit_softcapping=2.0)),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _GROUPED | dict(head_dim=8, final_logit_softcapping=2.0)),
    "mistral": ("MistralForCausalLM", "MistralConfig", _GROUPED | dict(sliding_window=8)),
    "phi": ("PhiForCausalLM", "PhiConfig", _SIZES),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _GROUPED),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2),
    ),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _SIZES),
    "opt": ("OPTForCausalLM", "OPTConfig", _SIZES | dict(ffn_dim=48, word_embed_proj_dim=16)),
    "cohere": ("CohereForCausalLM", "CohereConfig", _GROUPED | dict(logit_scale=0.25)),
    "granite": ("GraniteForCausalLM", "GraniteConfig", _GROUPED | dict(logits_scaling=3.0)),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", _GROUPED | _EXPERTS | dict(num_local_experts=4)),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        _GROUPED
        | _EXPERTS
        | dict(num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16, decoder_sparse_step=1),
    ),
}

_LORA = "llama-lora"


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> nn.Module:
    """A tiny random causal LM of one family, in eval mode. `changes` are other options of its config."""
    import transformers

    model_class, config_class, options = FAMILIES["llama" if name == _LORA else name]
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**options | changes))
    if name == _LORA:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped matrix products do not support float64
    return enlarge(model).to(dtype).eval()


def enlarge(model: nn.Module, factor: float = 3.0) -> nn.Module:
    """Enlarges the weights. Initial ones give logits near 0, where neither a softcap nor an adapter (B = 0) shows."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * 0.1 if "lora_B" in name or name.endswith("bias") else p * factor)
    return model


def batch(seed: int = 0) -> tuple[Tensor, StepLayout]:
    """(4, 12) token ids and their layout: two pairs of sequences, with two or three steps. Prompts are not scored."""
    ids = torch.randint(3, 97, (4, 12), generator=torch.Generator().manual_seed(seed))
    steps = torch.tensor([-1] * 3 + [0] * 3 + [1] * 4 + [2] * 2).repeat(4, 1)
    steps[1, 8:] = -1
    return ids, StepLayout.from_step_ids(ids, steps)


def logits_route(model: nn.Module, ids: Tensor, layout: StepLayout) -> Tensor:
    outputs = model(input_ids=ids, use_cache=False)
    return step_pref_loss(outputs.logits, layout, beta=1.0).loss + _router_loss(model, outputs)


def linear_route(model: nn.Module, ids: Tensor, layout: StepLayout) -> Tensor:
    hidden, outputs = forward_hidden(model, input_ids=ids)
    head = model_head(model)
    loss = linear_step_pref_loss(hidden, head.weight, layout, beta=1.0, **head.options).loss
    return loss + _router_loss(model, outputs)


def _router_loss(model: nn.Module, outputs) -> Tensor | float:
    aux, config = getattr(outputs, "aux_loss", None), cast(Any, model.config)
    return 0.0 if aux is None else config.router_aux_loss_coef * aux


def gradients(model: nn.Module, route: Callable, ids: Tensor, layout: StepLayout) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = route(model, ids, layout)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@dataclass
class Row:
    """How far the linear route is from the logits route, for one family and one dtype."""

    model_class: str
    head: str
    d_logits: float  # max |our logits - the model's|
    loss: float
    d_loss: float
    d_grad: float  # max over all elements of all trained parameters
    max_grad: float


def compare(name: str, dtype: torch.dtype) -> Row:
    model, (ids, layout) = build(name, dtype), batch()
    head = check_head(model, {"input_ids": ids})
    with torch.no_grad():
        hidden, _ = forward_hidden(model, input_ids=ids)
        d_logits = (head.logits(hidden) - model(input_ids=ids, use_cache=False).logits).abs().max().item()
    expected, expected_grads = gradients(model, logits_route, ids, layout)
    loss, grads = gradients(model, linear_route, ids, layout)
    if grads.keys() != expected_grads.keys():
        raise AssertionError(f"{name}: other parameters got a gradient: {grads.keys() ^ expected_grads.keys()}")
    config, parts = cast(Any, model.config), []
    if config.tie_word_embeddings:
        parts.append("tied")
    if head.bias is not None:
        parts.append("bias")
    if head.logit_scale != 1.0:
        parts.append(f"scale {head.logit_scale:.4g}")
    if head.logit_softcap is not None:
        parts.append(f"softcap {head.logit_softcap:g}")
    if head.weight.shape[1] != config.hidden_size:
        parts.append(f"width {head.weight.shape[1]} of {config.hidden_size}")
    if getattr(config, "output_router_logits", False):
        parts.append("router loss")
    inner = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    return Row(
        model_class=type(inner).__name__ + (" + LoRA" if inner is not model else ""),
        head=", ".join(parts) or "plain",
        d_logits=d_logits,
        loss=expected.item(),
        d_loss=abs(loss - expected).item(),
        d_grad=max((grads[k] - g).abs().max().item() for k, g in expected_grads.items()),
        max_grad=max(g.abs().max().item() for g in expected_grads.values()),
    )


def table() -> list[str]:
    lines = [
        "| class | head | logits, fp32 | loss | Δ loss, fp32 | Δ grad, fp32 | Δ loss, fp64 | Δ grad, fp64 | max grad |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in [*FAMILIES, _LORA]:
        r, r64 = compare(name, torch.float32), compare(name, torch.float64)
        lines.append(
            f"| {r.model_class} | {r.head} | {r.d_logits:.1e} | {r.loss:.4f} | {r.d_loss:.1e} | {r.d_grad:.1e} "
            f"| {r64.d_loss:.1e} | {r64.d_grad:.1e} | {r.max_grad:.2g} |"
        )
    return lines


# Config fields of the sweep, under every name that classes use: small sizes, scales other than 1, softcaps.
_SWEEP = _GROUPED | dict(
    n_embd=32, d_model=32, embedding_size=32, n_layer=2, num_layers=2, n_layers=2, decoder_layers=2, encoder_layers=2,
    n_head=4, n_heads=4, num_heads=4, decoder_attention_heads=4, encoder_attention_heads=4, head_dim=8, rotary_dim=4,
    n_inner=64, ffn_dim=64, decoder_ffn_dim=64, encoder_ffn_dim=64, n_positions=64, is_decoder=True,
    num_local_experts=4, num_experts=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
    shared_expert_intermediate_size=16, final_logit_softcapping=2.0, logits_soft_cap=2.0, output_logit_soft_cap=2.0,
    logit_scale=0.25, logits_scaling=3.0, output_multiplier=0.3, lm_head_multiplier=0.4,
    logits_mup_width_multiplier=3.0, unpadded_vocab_size=90,
)  # fmt: skip


def sweep_model(kind: str) -> nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class: Any = CONFIG_MAPPING[kind]
    default = config_class()
    config = config_class(**{k: v for k, v in _SWEEP.items() if hasattr(default, k)})
    for field in ("layer_types", "layers_block_type"):
        if len(getattr(config, field, None) or ()) > 2:
            setattr(config, field, getattr(config, field)[:2])
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > 30_000_000:
        raise ValueError(f"{size} parameters")
    torch.manual_seed(0)
    return enlarge(AutoModelForCausalLM.from_config(config)).eval()


def sweep() -> list[str]:
    """Markdown lines: the number of classes that pass, a line for each refused one, the number of untested ones."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    ids, _ = batch()
    passed, mapped, refused, unbuilt, worst = [], [], [], [], 0.0
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            model = sweep_model(kind)
            with torch.no_grad():
                expected = model(input_ids=ids, use_cache=False).logits
        except Exception:  # noqa: BLE001  small sizes are not valid for every class
            unbuilt.append(kind)
            continue
        try:
            head = check_head(model, {"input_ids": ids})
            with torch.no_grad():
                hidden, _ = forward_hidden(model, input_ids=ids)
        except UnsupportedHead as error:
            refused.append(f"* {kind}: {error}")
            continue
        worst = max(worst, (head.logits(hidden) - expected).abs().max().item())
        passed.append(kind)
        if head.logit_scale != 1.0 or head.logit_softcap is not None:
            mapped.append(kind)
    return [
        f"Of {len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)} entries of the causal LM mapping, {len(unbuilt)} do not build or",
        "run from a default config with small sizes, or stay above 30M parameters: not tested.",
        f"{len(passed)} pass the self-check, with logits within {worst:.1e} of the model's. {len(mapped)} of them have",
        f"a scale or a softcap: {', '.join(mapped)}.",
        f"{len(refused)} are refused{':' if refused else '.'}",
        *refused,
    ]


_TEXT = """# Model families

Written by `python -m benchmarks.models.families{sweep_flag}`; change that file, not this one.
torch {torch}, transformers {transformers}, peft {peft}, CPU.

Tiny random models, one batch of two pairs of sequences ({rows} scored tokens, V = 97). The linear route (`forward_hidden`,
`model_head`, `linear_step_pref_loss`) against the logits route (the model's own logits, `step_pref_loss`): the largest
absolute difference of the loss, and of the gradient over every element of every trained parameter. Router losses are part
of both losses. "logits" is the largest difference of softcap(scale * (hidden @ weight.T + bias)) to the model's logits.

{table}

float64 shows that the two are the same function (below their heads, many of these models round to float32 in their norms,
which can hide the last difference). float32 shows rounding, to be held against the largest gradient in the last column.
Granite divides its logits by 3; we multiply them by 1/3, which may differ in the last bit.

## What is refused

Each by `UnsupportedHead`, a ValueError with the model class, the reason and the way out: at the start by `check_head`, or
by the call itself. The logits route (`route='logits'`) works for all of them.

| what | why | other ways out |
| --- | --- | --- |
| an adapter on the head (LoRA and others) | the head's weight alone leaves the adapter out, silently | merge it; `modules_to_save` |
| prompt tuning, p-tuning (prefix tuning is fine) | virtual tokens come before the text in the logits | |
| a scale or softcap that the config does not tell, or that the class does not apply (`Gemma3ForConditionalGeneration` with a text softcap) | the self-check differs | |
| a quantised or offloaded head | there is no float weight to multiply with | |
| FSDP2 that has sharded the head again after forward; ZeRO-3 | the weight is not whole | `reshard_after_forward=False` at the head (accelerate's layout); `model.unshard()` after the forward |
| FSDP1 | whether the weight is whole depends on its options; gradients are not tested | FSDP2 |
| DDP with `static_graph=True` | it reduces only what flows through its own outputs: ranks drift apart, silently | unset it |
| `nn.DataParallel` | replicas run in threads | DDP |
| a model compiled as a whole | a graph compiled earlier ignores a new hook, silently | compile `model.model` or its layers |
| a head called several times, or on something else than one (B, T, H) tensor (ProphetNet) | there is no one hidden state | |

Tensor parallelism (`tp_plan="auto"`) leaves a DTensor weight; `head.options` then names its group for the linear functions.
{sweep}"""  # noqa: E501


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="also every class of transformers' causal LM mapping")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "docs" / "families.md")
    args = parser.parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore")
    import peft
    import transformers

    transformers.logging.set_verbosity_error()
    rows = table()
    print("\n".join(rows))
    swept = ["", "## Sweep", "", *sweep(), ""] if args.sweep else []
    print("\n".join(swept))
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(
        _TEXT.format(
            sweep_flag=" --sweep" if args.sweep else "",
            torch=torch.__version__.split("+")[0],
            transformers=transformers.__version__,
            peft=peft.__version__,
            rows=batch()[1].num_rows,
            table="\n".join(rows),
            sweep="\n".join(swept),
        )
    )


if __name__ == "__main__":
    main()
