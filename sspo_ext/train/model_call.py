# SPDX-License-Identifier: Apache-2.0
"""How the trainers call a model: the route to its log-probs, and the part of a batch that the model reads."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from .._checks import check_choice
from ..data.sharing import PREFIX_SHARING, PrefixSharing
from ..hf.check import compare_head
from ..hf.forward import forward_hidden
from ..hf.head import head_map
from ..hf.whole_head import with_head
from ..hf.wrappers import UnsupportedHead, base_model, model_device, text_config, unsupported
from ..layout.steps import StepLayout
from ..losses.logps import linear_step_logps, step_logps
from ..objective.sums import StepLogps
from ..tree.inputs import tree_attention, using_attention
from ..tree.masks import EAGER, FLEX, SDPA, attention_of, tree_mask, window_of
from ..tree.support import UnsupportedTree, take_answer, why_not
from ..tree.tiles import TILED

logger = logging.getLogger(__name__)

ROUTES = ("linear", "logits", "auto")


def choose_route(model: nn.Module, route: str, device: torch.device, *, narrowed: bool = False) -> str:
    """Decides the route by the linear route's self-check, which runs the model itself on the device where it is.

    Args:
        model: A causal LM.
        route: One of `ROUTES`.
        device: The device of the batches. A model with a device map takes its inputs there.
        narrowed: Whether log-probs are taken among the tokens that top-p or top-k kept, which the linear route does not
            for a model that caps its logits.

    Returns:
        "linear" or "logits": the answer of the first process, on every process.

    Raises:
        UnsupportedHead: With route "linear", for a model whose LM head it cannot use.
        ValueError: For an unknown route.
    """
    check_choice("route", route, ROUTES)
    if route == "logits":
        return route
    # Under FSDP only the first process may hold the weights; the memory of the others is not initialised.
    (refusal,) = broadcast_object_list([_refusal(model, device, narrowed)])
    if refusal is None:
        logger.info("linear route: the logits are never stored")
        return "linear"
    if route == "linear":
        raise refusal
    logger.warning("logits route, since the linear one cannot take this model: %s", refusal)
    return "logits"


def _refusal(model: nn.Module, device: torch.device, narrowed: bool) -> UnsupportedHead | None:
    if narrowed and head_map(hf_model(model))[1] is not None:
        return unsupported(hf_model(model), "caps its logits, which the linear route does not beside top_p or top_k")
    weight: Tensor = hf_model(model).get_input_embeddings().weight
    if getattr(model, "hf_device_map", None) is None:
        # Trainer has already moved the model, or leaves it where it is; FSDP and DeepSpeed have not split it yet.
        device = weight.device
    if device.type == "meta":
        logger.warning("linear route: not checked, since the weights are on the meta device")
        return None
    vocab = getattr(weight, "ds_shape", weight.shape)[0]  # ZeRO-3 leaves no weight here
    # Ids from the middle of the vocabulary: a padding token's embedding may be zero.
    ids = (vocab // 2 + torch.arange(8, device=device)[None]) % vocab
    try:
        compare_head(model, {"input_ids": ids})
    except UnsupportedHead as error:
        return error
    return None


def check_processes(args) -> None:
    """Raises ValueError unless all started processes are one job and each has at most one GPU.

    With several GPUs in a process, Trainer wraps the model in DataParallel, which neither route supports. On CPUs
    accelerate joins the processes only if told to; otherwise each would train by itself, unnoticed.
    """
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


def choose_sharing(model: nn.Module, prefix_sharing: str | bool, *, packing: bool = False) -> PrefixSharing | None:
    """How the sequences of a batch share their prefixes; None if they do not.

    Args:
        model: A causal LM, where it will be trained.
        prefix_sharing: One of `PREFIX_SHARING`.
        packing: Whether a batch is one row.

    Returns:
        PrefixSharing: the answer of the first process, on every process. With "auto" None for a model that cannot.

    Raises:
        UnsupportedTree: With True, for a model that cannot run sequences that share prefixes.
        ValueError: For an unknown choice.
    """
    check_choice("prefix_sharing", prefix_sharing, PREFIX_SHARING)
    if prefix_sharing is False:
        return None
    ((attention, refusal),) = broadcast_object_list([_tree_attention(model, prefix_sharing is True)])
    if attention is not None:
        # this process may have no weights yet, and its own check may have failed
        window = window_of(text_config(model))
        with using_attention(model, attention):
            for longest in (0,) if window is None else (0, window + 1):
                take_answer(model, longest, None)
        return PrefixSharing(prefix_sharing is True, _token_cost(model), attention, one_row=packing)
    if prefix_sharing is True:
        raise UnsupportedTree(f"prefix_sharing: {refusal}; use prefix_sharing=False")
    logger.info("prefixes are not shared: %s", refusal)
    return None


def _tree_attention(model: nn.Module, any_attention: bool) -> tuple[str | None, str | None]:
    """The attention with which the model runs trees; or None, and why it runs none.

    It is the model's own, or on a CPU what stands in for SDPA. Others, such as FlexAttention, which compiles for each
    shape of a batch, are tried only for `any_attention`.
    """
    config: Any = text_config(model)
    window, own = window_of(config), attention_of(config)
    if getattr(config, "output_router_logits", False):
        return None, "the balance loss of its routers would count a shared token once, and takes no 4-D mask"
    names = [TILED, own] if own == SDPA and model_device(model).type == "cpu" else [own]
    refusal = f"its attention {own!r} takes no trees"
    for name in ["auto"] if any_attention else [name for name in names if name in (FLEX, TILED, SDPA, EAGER)]:
        try:
            with tree_attention(model, name) as attention:
                refusal = why_not(model, 0 if window is None else window + 1)
                if refusal is None:
                    return attention, None
        except UnsupportedTree as error:
            refusal = str(error)
    return None, refusal


def _token_cost(model: nn.Module) -> float:
    """The products of a token in the layers without their attention, in units of those of one query and one key."""
    config, inner = hf_model(text_config(model)), hf_model(base_model(model))
    layers, width = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    if not layers or not width:
        return PrefixSharing.token_cost
    ends = (inner.get_input_embeddings(), inner.get_output_embeddings())
    words = {id(p) for module in ends if module is not None for p in module.parameters()}
    weights = sum(getattr(p, "ds_numel", p.numel()) for p in inner.parameters() if id(p) not in words)
    return weights / (2 * layers * width)


class ModelCall(NamedTuple):
    """A model's forward, ready for a loss function of its route.

    Attributes:
        found: Hidden states on the linear route, logits on the other.
        outputs: What the model returned.
        model: The model.
        chunk_bytes: The linear route's; None on the other.
        linear: Whether it is the linear route.
    """

    found: Tensor
    outputs: Any
    model: nn.Module
    chunk_bytes: int | None
    linear: bool

    def run(self, loss: Callable[..., Any], *args, **options) -> Any:
        """`loss(hidden, weight, *args, **options)` or `loss(logits, ...)`, with the options that the head needs."""
        if not self.linear:
            return loss(self.found, *args, **options)
        options["chunk_bytes"] = self.chunk_bytes
        return with_head(
            self.model, self.found, lambda hidden, head: loss(hidden, head.weight, *args, **options, **head.options)
        )


def call_model(model: nn.Module, batch: dict, route: str, chunk_bytes: int | None) -> ModelCall:
    """Runs the model on a batch, up to its hidden states or its logits."""
    inputs = model_inputs(model, batch)
    if route == "linear":
        return ModelCall(*forward_hidden(model, **inputs), model, chunk_bytes, True)
    outputs = model(**inputs, use_cache=False)
    return ModelCall(text_logits(outputs, batch["layout"]), outputs, model, None, False)


def batch_logps(model: nn.Module, batch: dict, route: str, *, chunk_bytes: int | None = None, **options) -> StepLogps:
    """Runs the model and returns the log-probs of the batch's layout, as the loss of the same route sees them."""
    call = call_model(model, batch, route, chunk_bytes)
    return call.run(linear_step_logps if call.linear else step_logps, batch["layout"], **options)


def text_logits(outputs, layout: StepLayout) -> Tensor:
    """The logits of the text, (B, T, V): those of the virtual tokens that PEFT's prompts put before it are cut off."""
    logits, length = outputs.logits, layout.shape[1]
    # The backward of a slice copies the gradient, even if the slice is the whole.
    return logits if logits.shape[1] == length else logits[:, -length:]


_MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")

_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def model_inputs(model: nn.Module, batch: dict) -> dict[str, Any]:
    """The part of the batch that the model reads.

    The labels are left out. Packed sequences have no mask in the batch: with a mask of ones they would see each other.
    A tree's mask has the form that the model takes, and is made on its device.
    """
    if "tree" in batch:
        tree = batch["tree"]
        return {
            "input_ids": tree.input_ids, "position_ids": tree.position_ids, "attention_mask": tree_mask(model, tree)
        }  # fmt: skip
    return {k: batch[k] for k in (*_MODEL_INPUTS, *_BOUNDARIES) if k in batch}


def uses_flash_attention(model: nn.Module) -> bool:
    """Whether the model runs FlashAttention: its package, or one of its kernels from the hub."""
    return "flash" in str(getattr(hf_model(model).config, "_attn_implementation", None))


def router_loss(model: nn.Module, outputs) -> Tensor | None:
    """The balance loss of a mixture of experts, times its coefficient; None for other models.

    Models add it only to a loss that they compute themselves.
    """
    aux = getattr(outputs, "aux_loss", None)
    config = hf_model(model).config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    coefficient = getattr(config, "router_aux_loss_coef", None)
    return None if aux is None or not coefficient else coefficient * aux


def hf_model(model: nn.Module) -> Any:
    """The same model without a static type: torch's stubs call every attribute that they do not know a Tensor."""
    return model
