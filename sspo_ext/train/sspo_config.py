"""SSPOConfig: what SSPOTrainer can be told."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, replace

from transformers import TrainingArguments

from .._checks import check_choice, check_count, check_not_negative, check_positive
from ..formulas.policy import KL_ESTIMATORS, LEVELS, get_policy_formula
from ..objective.policy_arguments import AGGREGATIONS
from ..signals.credit.baselines import BASELINES, UNGROUPED
from ..signals.probing.options import ProbeOptions
from ..signals.probing.texts import Probe, as_probe
from ..signals.split import split_text
from .model_call import ROUTE_HELP
from .rollout import ENGINES

COMBINE = ("add", "replace", "outcome")

_DICTIONARIES = ("rollout_options", "chat_template_kwargs", "probe_options", "loss_options")


def _option(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class SSPOConfig(TrainingArguments):
    """TrainingArguments and what SSPO adds; names are TRL's GRPO names where it has them.

    `per_device_train_batch_size` counts completions, and an update has per_device_train_batch_size x
    gradient_accumulation_steps x processes of them: a multiple of `num_generations`.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, *_DICTIONARIES]

    remove_unused_columns: bool = _option(False, "Rows are the grader's, not the model's.")
    logging_nan_inf_filter: bool = _option(False, "True hides a NaN loss from the log.")
    logging_steps: float = _option(1, "Log every so many updates.")
    learning_rate: float = _option(1e-6, "Peak learning rate.")

    num_generations: int = _option(8, "Completions of every prompt: the group of the baseline.")
    max_completion_length: int = _option(
        256, "Tokens; a completion that reaches it earns 0, or the update's lowest reward below."
    )
    temperature: float = _option(1.0, "Of sampling, and of the log-probs in the loss.")
    top_p: float = _option(1.0, "Nucleus sampling; below 1 the loss is no longer that of the sampled distribution.")
    top_k: int = _option(0, "Sampling from the k most probable tokens; 0: from all. The same caution.")
    rollout_engine: str = _option("generate", "generate, compact or vllm (sspo_ext.train.rollout).")
    rollout_batch_size: int | None = _option(None, "Rows completed at once on a device; None: all. Not for vllm.")
    rollout_options: dict | str | None = _option(None, "vLLM's own options.")
    chat_template_kwargs: dict | str | None = _option(None, "Of the chat template: {'enable_thinking': false}.")

    split_by: str = _option("newline", "newline, blank_line or a regular expression (sspo_ext.signals.split).")
    probe: str = _option("en", "A language of sspo_ext.signals.PROBES, or the text that asks for the answer.")
    probe_end: str | list[str] = _option(
        "", "What must follow the answer for it to count, such as the end of sequence; any of several."
    )
    probe_turn: bool = _option(False, "Ask in a turn of the user's, by the chat template.")
    probe_options: dict | str | None = _option(None, "Of sspo_ext.signals.probe_step_values: mode, reduce, engine, ...")
    gamma: float = _option(0.9, "Discount per step: what a step costs. It makes reasoning short; 1 does not.")
    lam: float = _option(0.9, "GAE's lambda over steps. 0: a step's own progress.")
    baseline: str = _option("rloo", "Of the outcome: rloo, grpo, dr_grpo, reinforce or reinforce++.")
    combine: str = _option(
        "add", "add to the outcome's advantage the step's, or replace it; outcome: the outcome's alone, no probe."
    )

    step_scale: float = _option(1.0, "Weight of the steps' advantages beside the outcome's.")
    scale_advantages: bool = _option(
        True, "Divide the outcome's and the steps' each by their standard deviation over the update; False: as the "
        "baseline and GAE define them (plain RLOO, or Dr. GRPO)."
    )  # fmt: skip

    loss_type: str = _option("reinforce", "See sspo_ext.formulas.policy.POLICY_FORMULAS.")
    loss_options: dict | str | None = _option(
        None, "Other options of the loss type and of step_policy_loss: {'importance_sampling_level': 'sequence'}."
    )
    epsilon: float | None = _option(None, "Clipping below, for a loss that clips; None: its own default.")
    epsilon_high: float | None = _option(None, "Clipping above; None: the loss's own default.")
    beta: float = _option(0.0, "Weight of the KL to the model as given (a PeftModel: with its adapter); 0: none.")
    kl_estimator: str = _option("k3", "k1, k2 or k3.")
    entropy_coef: float = _option(0.0, "Weight of the entropy bonus.")
    aggregation: str = _option("token", "How tokens are averaged, see step_policy_loss.")
    num_iterations: int = _option(1, "Updates on every batch of rollouts.")
    route: str = _option("linear", ROUTE_HELP)
    backend: str = _option("auto", "auto, cpu, triton, cuda or reference.")
    chunk_bytes: int | None = _option(None, "Budget of the linear route's logits buffer.")

    def __post_init__(self):
        super().__post_init__()
        for name in _DICTIONARIES:
            if not isinstance(getattr(self, name), dict | None):
                raise TypeError(f"{name}: expected a dictionary, or its JSON, got {getattr(self, name)!r}")
        self._check_signals()
        if self.label_smoothing_factor:
            raise ValueError(f"label_smoothing_factor: expected 0, got {self.label_smoothing_factor}; it has no effect")
        if self.auto_find_batch_size or self.accelerator_config.split_batches:
            raise ValueError(
                "auto_find_batch_size, split_batches: expected False, since they change how many completions an update "
                "has and so the groups"
            )
        # what sampling narrows is the rollouts' own; a temperature of 0 has no log-probs
        check_positive("temperature", self.temperature)
        check_positive("top_p", self.top_p)
        if self.top_p > 1:
            raise ValueError(f"top_p: expected a number in (0, 1], got {self.top_p}")
        check_count("top_k", self.top_k, 0)
        check_count("max_completion_length", self.max_completion_length)
        check_choice("rollout_engine", self.rollout_engine, ENGINES)
        check_choice("kl_estimator", self.kl_estimator, tuple(KL_ESTIMATORS))
        check_choice("combine", self.combine, COMBINE)
        check_choice("baseline", self.baseline, tuple(BASELINES))
        check_choice("aggregation", self.aggregation, AGGREGATIONS)
        for name in ("gamma", "lam"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a number in [0, 1], got {value!r}")
        check_not_negative("step_scale", self.step_scale)
        if self.step_scale != 1 and self.combine == "outcome":
            raise ValueError(
                f"step_scale: expected 1 with combine='outcome', which has no steps, got {self.step_scale}"
            )
        check_not_negative("beta", self.beta)
        for name in ("num_generations", "num_iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.rollout_batch_size is not None and self.rollout_batch_size < 1:
            raise ValueError(f"rollout_batch_size: expected at least 1, or None, got {self.rollout_batch_size}")
        if self.num_generations == 1 and self.combine == "outcome" and self.baseline not in UNGROUPED:
            raise ValueError(
                f"num_generations: expected at least 2, since baseline {self.baseline!r} compares the completions of a "
                "prompt and combine='outcome' leaves nothing else, got 1"
            )
        head = get_policy_formula(self.loss_type)
        head.check_options(self.head_options)
        level = (self.loss_options or {}).get("importance_sampling_level", "token")
        check_choice("importance_sampling_level", level, LEVELS)
        if level != "token" and not head.has_ratio:
            raise ValueError(f"importance_sampling_level: loss_type {self.loss_type!r} has no ratio, got {level!r}")
        if self.num_iterations > 1 and not head.has_ratio:
            raise ValueError(
                f"num_iterations: expected 1 with loss_type {self.loss_type!r}, which has no ratio to correct for the "
                f"updates since the rollouts, got {self.num_iterations}"
            )
        if self.num_iterations > 1 and self.save_strategy == "steps" and self.save_steps % self.num_iterations:
            raise ValueError(
                f"save_steps: expected a multiple of num_iterations={self.num_iterations}, since rollouts are not "
                f"saved, got {self.save_steps}"
            )

    def _check_signals(self) -> None:
        split_text("", self.split_by)
        if self.split_by == "numbered":
            raise ValueError("split_by: 'numbered' shows in no single token; expected newline, blank_line or a regex")
        as_probe(self.probe)
        given = self.probe_options or {}
        known = [name for name in inspect.signature(ProbeOptions).parameters if name != "grader"]
        for name in given:
            if name in ("grader", "tokenizer"):
                raise ValueError(f"probe_options: expected no {name!r}, which is the trainer's own")
            if name not in known:
                raise ValueError(f"probe_options: expected some of {', '.join(known)}, got {name!r}")
        try:
            ProbeOptions(**given)
        except (TypeError, ValueError) as error:
            raise type(error)(f"probe_options: {error}") from None

    @property
    def asked(self) -> Probe:
        """The probe, with `probe_end`, `probe_turn` and `chat_template_kwargs` where they are given."""
        ends = (self.probe_end,) if isinstance(self.probe_end, str) else tuple(self.probe_end)
        given = {"ends": ends} if any(ends) else {}
        given |= {"turn": True} if self.probe_turn else {}
        given |= {"chat_template_kwargs": self.chat_template_kwargs} if self.chat_template_kwargs else {}
        return replace(as_probe(self.probe), **given)

    @property
    def head_options(self) -> dict[str, float]:
        """The loss type's options that were given; those of step_policy_loss itself are left out."""
        given = {"epsilon": self.epsilon, "epsilon_high": self.epsilon_high, **(self.loss_options or {})}
        common = ("importance_sampling_level", "length_normalize", "prob_threshold")
        return {name: value for name, value in given.items() if value is not None and name not in common}
