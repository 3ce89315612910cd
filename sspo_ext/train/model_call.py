"""What the trainers share: which route a model takes to its log-probs, and what of a batch the model reads."""

from __future__ import annotations

import logging
import os

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from .._checks import check_choice
from ..hf.check import check_head
from ..hf.forward import forward_hidden
from ..hf.head import model_head
from ..hf.wrappers import UnsupportedHead
from ..layout.steps import StepLayout
from ..losses.logps import linear_step_logps, step_logps
from ..objective.sums import StepLogps

logger = logging.getLogger(__name__)

ROUTES = ("linear", "logits", "auto")

ROUTE_HELP = (
    "linear: from hidden states, the logits are never stored; raises for a model whose head it cannot take. "
    "logits: from the model's own logits. auto: linear, or logits with a warning."
)


def choose_route(model: nn.Module, route: str, device: torch.device) -> str:
    """ "linear" or "logits", after the linear route's self-check on the model itself, where it is. `device` is what the
    hooks of a model with a device map read their inputs from. Every process has the first one's answer."""
    check_choice("route", route, ROUTES)
    if route == "logits":
        return route
    # Under FSDP the first process alone may have the weights, and the others memory that nobody has written to.
    (refusal,) = broadcast_object_list([_refusal(model, device)])
    if refusal is None:
        logger.info("linear route: the logits are never stored")
        return "linear"
    if route == "linear":
        raise refusal
    logger.warning("logits route, since the linear one cannot take this model: %s", refusal)
    return "logits"


def _refusal(model: nn.Module, device: torch.device) -> UnsupportedHead | None:
    weight = model.get_input_embeddings().weight
    if getattr(model, "hf_device_map", None) is None:
        # Trainer has moved the model where it is to move it; what FSDP or DeepSpeed will split is whole here.
        device = weight.device
    if device.type == "meta":
        logger.warning("linear route: not checked, since the weights are on the meta device")
        return None
    vocab = weight.shape[0]
    # from the middle, where no padding row of zeros is
    ids = (vocab // 2 + torch.arange(8, device=device)[None]) % vocab
    try:
        check_head(model, {"input_ids": ids})
    except UnsupportedHead as error:
        return error
    return None


def check_processes(args) -> None:
    """One GPU for each process: of several, Trainer would make DataParallel, which neither route runs in. And one job
    of all processes: accelerate joins them on CPUs only if told so, and else each would train by itself, unnoticed."""
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started > 1 and args.world_size != started:
        raise ValueError(
            f"use_cpu: expected {started} processes in one job (WORLD_SIZE), got {args.world_size} on "
            f"{args.device.type!r}; give use_cpu=True to train on CPUs"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"n_gpu: expected one GPU for each process, got {args.n_gpu}; start one process for each with torchrun or "
            "accelerate launch, or show this one a single GPU (CUDA_VISIBLE_DEVICES=0)"
        )


def batch_logps(model: nn.Module, batch: dict, route: str, *, chunk_bytes: int | None = None, **options) -> StepLogps:
    """The model's forward and the log-probs of the batch's layout, as the loss of the same route sees them."""
    if route == "linear":
        hidden, _ = forward_hidden(model, **model_inputs(batch))
        head = model_head(model)
        return linear_step_logps(
            hidden, head.weight, batch["layout"], **options, **head.options, chunk_bytes=chunk_bytes
        )
    outputs, layout = model(**model_inputs(batch), use_cache=False), batch["layout"]
    return step_logps(text_logits(outputs, layout), layout, **options)


def text_logits(outputs, layout: StepLayout) -> Tensor:
    """(B, T, V): the logits without those of virtual tokens, which PEFT's prompts put before the text."""
    logits, length = outputs.logits, layout.shape[1]
    # a slice of the whole would cost its backward a copy
    return logits if logits.shape[1] == length else logits[:, -length:]


_MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")

_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def model_inputs(batch: dict) -> dict[str, Tensor | int]:
    """No labels, and no mask for packed sequences: with a mask of ones, or a cache, they would see each other."""
    return {k: batch[k] for k in (*_MODEL_INPUTS, *_BOUNDARIES) if k in batch}


def uses_flash_attention(model: nn.Module) -> bool:
    """FlashAttention's package or one of its kernels from the hub."""
    return "flash" in str(getattr(model.config, "_attn_implementation", None))


def router_loss(model: nn.Module, outputs) -> Tensor | None:
    """A mixture of experts' balance loss with its coefficient, which models add only to a loss of their own."""
    aux = getattr(outputs, "aux_loss", None)
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    coefficient = getattr(config, "router_aux_loss_coef", None)
    return None if aux is None or not coefficient else coefficient * aux
