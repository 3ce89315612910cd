"""The settings of StepPreferenceTrainer."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from .model_call import ROUTE_HELP


@dataclass
class StepPreferenceConfig(TrainingArguments):
    """TrainingArguments and the options of the loss. Three defaults differ: unused columns stay, NaN losses are
    logged as NaN, and something is logged every 10 steps."""

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "loss_options"]

    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Columns are the collator's, not the model's."}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "True hides a NaN loss from the log."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many updates."})
    loss_type: str | list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": "A pair loss of docs/losses.md, or several, which are added up."},
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "What each loss type counts; None is 1 each."}
    )
    beta: float | None = field(default=None, metadata={"help": "Reward scale; None is the loss type's own default."})
    label_smoothing: float = field(default=0.0, metadata={"help": "Probability that a pair's order is wrong."})
    loss_options: dict | str | None = field(
        default=None, metadata={"help": "The loss types' other options, {'simpo_gamma': 0.5}."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Logits are divided by it."})
    reference_free: bool = field(default=False, metadata={"help": "No reference model: rewards are beta * log pi."})
    reference_cache: str | None = field(
        default=None, metadata={"help": "Folder of cached reference log-probs; None is OUTPUT_DIR/reference_cache."}
    )
    packing: bool = field(default=False, metadata={"help": "Padding-free batches: sequences end to end in one row."})
    backend: str = field(default="auto", metadata={"help": "auto, cpu, triton, cuda or reference."})
    route: str = field(default="linear", metadata={"help": ROUTE_HELP})
    chunk_bytes: int | None = field(default=None, metadata={"help": "Budget of the linear route's logits buffer."})
    inplace_backward: bool | None = field(
        default=None,
        metadata={"help": "Logits route: write the gradient over the logits; None does where the backend can."},
    )

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor: expected 0, since it smooths tokens, got {self.label_smoothing_factor}; "
                "label_smoothing is for the order of pairs"
            )
        if not isinstance(self.loss_options, dict | None):
            raise TypeError(f"loss_options: expected a dictionary, or its JSON, got {self.loss_options!r}")
