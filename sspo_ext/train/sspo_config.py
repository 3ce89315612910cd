# SPDX-License-Identifier: Apache-2.0
"""The options of SSPOTrainer."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, cast

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from .._checks import check_choice, check_count, check_not_negative, check_positive
from ..data.special import SPECIAL_TOKENS
from ..formulas.policy import KL_ESTIMATORS, LEVELS, get_policy_formula
from ..losses.correction import check_correction
from ..objective.policy_arguments import AGGREGATIONS
from ..signals.credit.baselines import BASELINES, UNGROUPED
from ..signals.credit.objectives import AGGREGATIONS as OBJECTIVES
from ..signals.probing.options import ProbeOptions
from ..signals.probing.texts import Probe, as_probe
from ..signals.split import split_text
from .options import check_dictionary, check_reporting, check_sampling_order, dictionary, documented
from .rollout import ENGINES

COMBINE = ("add", "replace", "outcome")
PROBE_ENGINES = ("policy", "rollout")

_DICTIONARIES = ("rollout_options", "chat_template_kwargs", "probe_options", "loss_options")


@documented
@dataclass
class SSPOConfig(TrainingArguments):
    """TrainingArguments and the options of SSPO.

    Options have TRL's GRPO names where TRL has them. `per_device_train_batch_size` counts completions. An update has
    per_device_train_batch_size x gradient_accumulation_steps x processes of them, a multiple of `num_generations`.

    Attributes:
        remove_unused_columns: False: the grader needs columns that the model does not.
        logging_nan_inf_filter: False: a NaN loss is logged as NaN.
        logging_steps: Updates between two log lines.
        learning_rate: The peak learning rate.
        num_generations: Completions of each prompt, which form the group of the baseline.
        max_completion_length: The most tokens of a completion. One that is cut off here is not graded: its reward is
            0, or the lowest of the update if that is below 0.
        temperature: Divides the logits, in sampling and in the loss. Above 0.
        top_p: Nucleus sampling, in (0, 1]. The loss has the log-probs of the tokens that were kept, normalised again,
            if the engine reports them, as all of this package do.
        top_k: Sample only from the `top_k` most probable tokens; 0 means all. The loss follows it as it does `top_p`.
        vllm_importance_sampling_correction: Whether importance weights correct the loss for completions that the engine
            drew with other probabilities than the trainer's. None: with vLLM and engines of your own, as far as they
            report log-probs. "compact" and "generate" draw with the trainer's own, up to rounding. The names are TRL's;
            see `sspo_ext.losses.rollout_correction`.
        vllm_importance_sampling_mode: "token_truncate", "token_mask", "step_truncate", "step_mask", "sequence_truncate"
            or "sequence_mask": whose ratio it is, and what happens to one out of bounds.
        vllm_importance_sampling_clip_max: The upper bound of the ratio; None means none.
        vllm_importance_sampling_clip_min: The lower bound of the ratio; None means none.
        vllm_importance_sampling_length_normalize: Whether the ratio of a step or sequence is the geometric mean of its
            tokens' ratios.
        rollout_engine: "auto", "compact", "generate", "vllm" or "vllm_server", see
            `sspo_ext.train.rollout.make_engine`.
        rollout_batch_size: The most rows completed at once on a device; None means all of the update. Not for vLLM.
        rollout_options: Arguments of `vllm.LLM` for "vllm", of `sspo_ext.train.vllm_server.VLLMServer` for
            "vllm_server".
        chat_template_kwargs: Arguments of the chat template, such as `{"enable_thinking": False}`.
        special_tokens: What happens to a row with a text that spells a special token, such as "<|im_end|>": "error", or
            "allow", and the text becomes the token.
        split_by: What ends a step: "newline", "blank_line" or a regular expression, see `sspo_ext.signals.split`.
        probe: What asks the model for its answer: a language of `sspo_ext.signals.PROBES`, a text, or a Probe.
        probe_end: A text that must follow the answer for it to count, such as the end of sequence, or several, any of
            which may. Empty: an answer counts however the text goes on.
        probe_turn: Ask in a new turn of the user, by the chat template.
        probe_options: Other arguments of `sspo_ext.signals.probe_step_values`: mode, reduce, engine, ...
        probe_engine: What is asked for values: "policy", the model itself, or "rollout", the rollout engine, which has
            its weights. vLLM can be asked, and an engine of your own with `logprobs`.
        gamma: The discount for each step, in [0, 1]. Below 1 every step has a cost, which makes reasoning short.
        lam: Lambda of GAE over steps, in [0, 1]. With 0 a step's advantage is the progress of that step alone.
        baseline: What the reward is compared with: "rloo", "grpo", "dr_grpo", "reinforce", "reinforce++" or
            "reinforce++_baseline", see `sspo_ext.signals.outcome_advantages`.
        reward_weights: With several reward functions a weight for each; None means 1 each.
        multi_objective_aggregation: With several reward functions, how they become one advantage of the outcome:
            "sum_then_normalize" compares their weighted sum; with "normalize_then_sum" each is compared, and divided by
            its standard deviation, by itself, so that a loud one does not drown the rest. The names are TRL's; see
            `sspo_ext.signals.rewards_advantages`.
        mask_truncated_completions: Whether completions that were cut off are left out of the loss. Their groups are
            compared with them all the same, as in TRL.
        combine: "add" adds the step advantages to the outcome's, "replace" uses the step advantages alone, "outcome"
            the outcome's alone, without probing.
        step_scale: The weight of the step advantages beside the outcome's.
        scale_advantages: Whether to divide the outcome's advantages and the step advantages each by their standard
            deviation over the update. With False they stay as the baseline and GAE define them, as in plain RLOO or
            Dr. GRPO.
        min_signal: The step advantages of an update are 0 if their standard deviation and half their absolute mean are
            below this, on the scale of rewards and values. The default is a hundredth of the range from 0 to 1: a model
            that is never right, and knows it, then learns nothing. 0 lets every difference count. With
            log-probabilities (`reduce="logprob"`) the range is |floor| nats, so the default is a tenth of a nat.
        loss_type: "reinforce", "ppo" or "cispo".
        loss_options: Other options of the loss type and of `sspo_ext.step_policy_loss`, such as
            `{"importance_sampling_level": "sequence"}`.
        epsilon: How far the ratio may fall below 1 before it is clipped; None means the loss type's own default.
        epsilon_high: How far the ratio may rise above 1; None means the loss type's own default.
        beta: The weight of the KL divergence from the model as given (a PeftModel: with its adapter); 0 means none.
        kl_estimator: "k1", "k2" or "k3".
        entropy_coef: The weight of the entropy bonus.
        aggregation: The mean that the loss is: over "token", "step" or "sequence", or "sum", which divides by a
            constant (Dr. GRPO). See `sspo_ext.step_policy_loss`.
        disable_dropout: Whether dropout is turned off in the model as given and in its adapter, in place, as in TRL.
            With False the policy is trained with dropout, and the reference has none.
        num_iterations: Updates on each batch of rollouts. Above 1 the loss type needs a ratio.
        prefix_sharing: Whether probes and the update compute the tokens that rollouts have in common once: the prompt
            of a group, and common beginnings of its completions. "auto" does so where it pays, by a count of FLOPs, and
            where the model's own attention can. True does so always, on GPUs with FlexAttention, and raises
            UnsupportedTree for a model that cannot.
        route: "linear" computes log-probs from hidden states and never stores the logits. It raises UnsupportedHead
            for a model whose LM head it cannot use. "logits" reads the model's own logits. "auto" is "linear" where
            the model allows it, else "logits" with a warning.
        backend: Who computes the loss: "auto", "cpu", "triton", "cuda" or "reference".
        chunk_bytes: The size of the linear route's logits buffer in bytes; None: see `linear_step_pref_loss`.

    Raises:
        ValueError: For an option out of its range, or one that has no effect beside the others.
        TypeError: For an option of the wrong type.

    Examples:
        >>> from sspo_ext.train import SSPOConfig
        >>> args = SSPOConfig("out", num_generations=4, gamma=0.95, probe_options={"reduce": "mean"})
        >>> args.gamma
        0.95
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, *_DICTIONARIES]

    remove_unused_columns: bool = False
    logging_nan_inf_filter: bool = False
    logging_steps: float = 1
    learning_rate: float = 1e-6

    num_generations: int = 8
    max_completion_length: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    vllm_importance_sampling_correction: bool | None = None
    vllm_importance_sampling_mode: str = "sequence_mask"
    vllm_importance_sampling_clip_max: float | None = 3.0
    vllm_importance_sampling_clip_min: float | None = None
    vllm_importance_sampling_length_normalize: bool = False
    rollout_engine: str = "auto"
    rollout_batch_size: int | None = None
    rollout_options: dict | str | None = None
    chat_template_kwargs: dict | str | None = None
    special_tokens: str = "error"

    split_by: str = "newline"
    probe: str = "en"
    probe_end: str | list[str] = ""
    probe_turn: bool = False
    probe_options: dict | str | None = None
    probe_engine: str = "policy"
    gamma: float = 0.9
    lam: float = 0.9
    baseline: str = "rloo"
    reward_weights: list[float] | None = None
    multi_objective_aggregation: str = "sum_then_normalize"
    mask_truncated_completions: bool = False
    combine: str = "add"

    step_scale: float = 1.0
    scale_advantages: bool = True
    min_signal: float = 0.01

    loss_type: str = "reinforce"
    loss_options: dict | str | None = None
    epsilon: float | None = None
    epsilon_high: float | None = None
    beta: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    aggregation: str = "token"
    disable_dropout: bool = True
    num_iterations: int = 1
    prefix_sharing: Literal["auto", True, False] = "auto"
    route: str = "linear"
    backend: str = "auto"
    chunk_bytes: int | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in _DICTIONARIES:
            check_dictionary(name, getattr(self, name))
        self._check_signals()
        if self.label_smoothing_factor:
            raise ValueError(f"label_smoothing_factor: expected 0, got {self.label_smoothing_factor}; it has no effect")
        # TrainingArguments has made an AcceleratorConfig of it
        if self.auto_find_batch_size or cast(AcceleratorConfig, self.accelerator_config).split_batches:
            raise ValueError(
                "auto_find_batch_size, split_batches: expected False, since they change how many completions an update "
                "has and so the groups"
            )
        check_reporting(self)
        check_sampling_order(self, ("random",), "the order of the prompts is the trainer's own")
        self._check_rollouts()
        self._check_advantages()
        self._check_loss()

    def _check_signals(self) -> None:
        split_text("", self.split_by)
        if self.split_by == "numbered":
            raise ValueError("split_by: 'numbered' shows in no single token; expected newline, blank_line or a regex")
        as_probe(self.probe)
        given = dictionary(self.probe_options)
        known = [field.name for field in fields(ProbeOptions) if field.name != "grader"]
        for name in given:
            if name in ("grader", "tokenizer"):
                raise ValueError(f"probe_options: expected no {name!r}, which is the trainer's own")
            if name not in known:
                raise ValueError(f"probe_options: expected some of {', '.join(known)}, got {name!r}")
        try:
            ProbeOptions(**given)
        except (TypeError, ValueError) as error:
            raise type(error)(f"probe_options: {error}") from None
        check_choice("probe_engine", self.probe_engine, PROBE_ENGINES)
        if self.probe_engine == "rollout":
            for name in given:
                if name not in ("mode", "reduce", "floor"):
                    raise ValueError(f"probe_options: {name} has no effect with probe_engine='rollout', got {given}")
            if given.get("mode", "likelihood") != "likelihood":
                raise ValueError("probe_engine: expected 'policy' with probe_options mode 'graded', got 'rollout'")

    def _check_rollouts(self) -> None:
        check_positive("temperature", self.temperature)  # at 0 there are no log-probs
        check_positive("top_p", self.top_p)
        if self.top_p > 1:
            raise ValueError(f"top_p: expected a number in (0, 1], got {self.top_p}")
        check_count("top_k", self.top_k, 0)
        check_correction(*self.correction_arguments.values(), names="vllm_importance_sampling_")
        check_count("max_completion_length", self.max_completion_length)
        check_choice("special_tokens", self.special_tokens, SPECIAL_TOKENS)
        check_choice("rollout_engine", self.rollout_engine, ENGINES)
        for name in ("num_generations", "num_iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.rollout_batch_size is not None and self.rollout_batch_size < 1:
            raise ValueError(f"rollout_batch_size: expected at least 1, or None, got {self.rollout_batch_size}")

    def _check_advantages(self) -> None:
        check_choice("combine", self.combine, COMBINE)
        check_choice("baseline", self.baseline, tuple(BASELINES))
        check_choice("multi_objective_aggregation", self.multi_objective_aggregation, OBJECTIVES)
        for name in ("gamma", "lam"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a number in [0, 1], got {value!r}")
        check_not_negative("step_scale", self.step_scale)
        check_not_negative("min_signal", self.min_signal)
        if self.step_scale != 1 and self.combine == "outcome":
            raise ValueError(
                f"step_scale: expected 1 with combine='outcome', which has no steps, got {self.step_scale}"
            )
        if self.num_generations == 1 and self.combine == "outcome" and self.baseline not in UNGROUPED:
            raise ValueError(
                f"num_generations: expected at least 2, since baseline {self.baseline!r} compares the completions of a "
                "prompt and combine='outcome' leaves nothing else, got 1"
            )

    def _check_loss(self) -> None:
        check_choice("kl_estimator", self.kl_estimator, tuple(KL_ESTIMATORS))
        check_choice("aggregation", self.aggregation, AGGREGATIONS)
        check_not_negative("beta", self.beta)
        formula = get_policy_formula(self.loss_type)
        formula.check_options(self.formula_options)
        level = dictionary(self.loss_options).get("importance_sampling_level", "token")
        check_choice("importance_sampling_level", level, LEVELS)
        if level != "token" and not formula.has_ratio:
            raise ValueError(f"importance_sampling_level: loss_type {self.loss_type!r} has no ratio, got {level!r}")
        if self.num_iterations > 1 and not formula.has_ratio:
            raise ValueError(
                f"num_iterations: expected 1 with loss_type {self.loss_type!r}, which has no ratio to correct for the "
                f"updates since the rollouts, got {self.num_iterations}"
            )
        if self.num_iterations > 1 and self.save_strategy == "steps" and self.save_steps % self.num_iterations:
            raise ValueError(
                f"save_steps: expected a multiple of num_iterations={self.num_iterations}, since rollouts are not "
                f"saved, got {self.save_steps}"
            )

    @property
    def asked(self) -> Probe:
        """The probe, with `probe_end`, `probe_turn` and `chat_template_kwargs` if they are given."""
        ends = (self.probe_end,) if isinstance(self.probe_end, str) else tuple(self.probe_end)
        given = {"ends": ends} if any(ends) else {}
        given |= {"turn": True} if self.probe_turn else {}
        given |= {"chat_template_kwargs": self.chat_template_kwargs} if self.chat_template_kwargs else {}
        return replace(as_probe(self.probe), **given)

    @property
    def loss_arguments(self) -> dict[str, Any]:
        """The arguments of `step_policy_loss` that are settings: the same for every batch."""
        return {
            "loss_type": self.loss_type, "kl_coef": self.beta, "kl_estimator": self.kl_estimator,
            "entropy_coef": self.entropy_coef, "aggregation": self.aggregation, "temperature": self.temperature,
            "backend": self.backend, **dictionary(self.loss_options), **self.formula_options,
        }  # fmt: skip

    @property
    def correction_arguments(self) -> dict[str, Any]:
        """The settings of `rollout_correction`."""
        names = ("mode", "clip_max", "clip_min", "length_normalize")
        return {name: getattr(self, f"vllm_importance_sampling_{name}") for name in names}

    @property
    def formula_options(self) -> dict[str, float]:
        """The options given to the loss type itself, without those of `step_policy_loss`."""
        given = {"epsilon": self.epsilon, "epsilon_high": self.epsilon_high, **dictionary(self.loss_options)}
        common = ("importance_sampling_level", "length_normalize", "prob_threshold")
        return {name: value for name, value in given.items() if value is not None and name not in common}
