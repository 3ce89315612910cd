# SPDX-License-Identifier: Apache-2.0
"""Which probe makes this model answer: texts tried on completions of the model's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from ..._checks import check_choice, check_count, check_not_negative, describe
from ..branches.branch import ENGINES, Branch
from ..branches.sample import sample_branches
from ..split import SplitBy, delimiter_mask, split_steps
from ..values import StepBatch
from .compare import ProbeChoice, Progress, answer_words, compare_probes, holds
from .states import special_ids
from .texts import PROBES, Probe, as_probe


def choose_probe(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[str | Sequence[int]],
    answers: Sequence[Any],
    probes: Sequence[str | Probe] | Mapping[str, str | Probe] = (),
    *,
    builtin: bool = True,
    grader: Callable[[str, Any], float] | None = None,
    num_generations: int = 4,
    max_completion_length: int = 256,
    temperature: float = 1.0,
    split_by: SplitBy = "newline",
    seed: int = 0,
    engine: str = "auto",
    max_tokens: int = 4096,
    progress: Progress | None = None,
) -> ProbeChoice:
    r"""Find the probe that makes a model answer, on completions that it samples itself.

    Whether values say anything depends on the probe's text, and every model has its own: the same text gives one model
    .2 after the answer is reached, and another 0. So try it before training. A probe is good if its value is low before
    the answer is reached and high after it, and not near zero everywhere else. `ProbeTrial.score` puts both in one
    number. The probe with the highest score is taken, if its value rises by .01 at least. The score is ours.

    Args:
        model: any Hugging Face causal LM, the policy that will be trained.
        tokenizer: its tokenizer.
        prompts: texts, or token ids, as `sspo_ext.data.prompts.prompt_tokens` makes of chat messages.
        answers: the right answer to each: a text, a number, or several.
        probes: texts and Probes of your own, or a mapping with names for them. A language of `PROBES` is one too.
        builtin: try all of `PROBES` as well.
        grader: grader(completion, answer) -> number; 1 and above is right. None: a completion is right if its last line
            holds the answer as a word. One that was cut off is wrong, as in training.
        num_generations: completions of each prompt.
        max_completion_length: the most tokens of a completion.
        temperature: of the completions; 0 is greedy.
        split_by: what ends a step, as for `delimiter_mask`.
        seed: of the completions. The result depends on nothing else that is random.
        engine: how values are computed, as in `probe_step_values`.
        max_tokens: the budget of one forward in tokens.
        progress: called with (parts done, parts in all).

    Returns:
        ProbeChoice: a trial for each probe, and which to take.

    Raises:
        ValueError: if an argument does not fit, an answer is blank, or there is no probe; before anything is sampled.
        TypeError: if an argument has the wrong type.

    Examples:
        >>> choice = choose_probe(
        ...     model, tokenizer, ["6 + 13 + 7 = ?\n"], ["26"], ["So it is:"], max_completion_length=12
        ... )
        >>> choice.best, len(choice.trials)
        (None, 11)
    """
    tried = named_probes(probes, builtin=builtin)
    if tokenizer is None or not len(prompts) or len(prompts) != len(answers):
        raise ValueError(
            f"prompts: expected at least one, an answer for each and a tokenizer, got {len(prompts)} prompts and "
            f"{len(answers)} answers" + (", and no tokenizer" if tokenizer is None else "")
        )
    accepted = [answer_words(answer) for answer in answers]
    check_count("num_generations", num_generations)
    check_count("max_completion_length", max_completion_length)
    check_count("seed", seed, 0)
    check_not_negative("temperature", temperature)
    check_choice("engine", engine, ("auto", *ENGINES))
    ids = [_prompt_ids(p, tokenizer) for p in prompts]
    ends = special_ids(model, tokenizer)
    each = num_generations if temperature else 1
    size = max(getattr(getattr(model, "config", None), "vocab_size", 0) or 0, len(tokenizer))
    delimiters = delimiter_mask(tokenizer, split_by, vocab_size=size, eos_token_ids=sorted(ends))
    total = len(ids) * 2
    completions: list[list[int]] = []
    for i, prompt in enumerate(ids):
        if progress is not None:
            progress(i, total)
        completions += sample_branches(
            model, [prompt], [Branch(0, len(prompt), [])], each, max_new_tokens=max_completion_length,
            eos_token_ids=sorted(ends), temperature=temperature, seed=seed, max_tokens=max_tokens,
        )[0]  # fmt: skip
    rewards = []
    for i, tokens in enumerate(completions):
        text = tokenizer.decode([t for t in tokens if t not in ends], clean_up_tokenization_spaces=False)
        ended = bool(tokens) and tokens[-1] in ends
        rewards.append(float((grader or _last_line)(text, answers[i // each])) if ended else 0.0)

    def told(done: int, of: int) -> None:
        if progress is not None:
            progress(len(ids) + len(ids) * done // of, total)

    batch = StepBatch([prompt for prompt in ids for _ in range(each)], split_steps(completions, delimiters))
    owned = [words for words in accepted for _ in range(each)]
    return compare_probes(
        model, tokenizer, batch, owned, rewards, tried, engine=engine, max_tokens=max_tokens, progress=told
    )


def named_probes(
    probes: Sequence[str | Probe] | Mapping[str, str | Probe] = (), *, builtin: bool = True
) -> dict[str, Probe]:
    """Return Probes by name: those of `PROBES` with `builtin`, then these. A text is its own name.

    Args:
        probes: texts and Probes, or a mapping with names for them.
        builtin: whether those of `PROBES` come first.

    Returns:
        The Probes, each once.

    Raises:
        ValueError: if there is none, a text is blank or reads like a language that is none, or two differ in all but
            their names.
        TypeError: if a probe is neither a text nor a Probe.

    Examples:
        >>> list(named_probes(["So it is:", "de"], builtin=False))
        ['So it is:', 'de']
    """
    if isinstance(probes, str):
        raise TypeError(f"probes: expected a list of texts and Probes, or a mapping, got {describe(probes)}")
    found = dict(PROBES) if builtin else {}
    given = probes.items() if isinstance(probes, Mapping) else ((None, probe) for probe in probes)
    for name, one in given:
        probe = as_probe(one)
        if not probe.text.strip():
            raise ValueError(f"probes: expected texts that are not blank, got {one!r}")
        name = name or (one if isinstance(one, str) else probe.text)
        if found.get(name, probe) != probe:
            raise ValueError(f"probes: expected different names, got {name!r} for two probes; give a mapping")
        if probe not in found.values():
            found[name] = probe
    if not found:
        raise ValueError("probes: expected at least one, or builtin=True")
    return found


def _last_line(text: str, answer: Any) -> float:
    lines = text.strip().splitlines()
    return float(bool(lines) and any(holds(lines[-1], word) for word in answer_words(answer)))


def _prompt_ids(prompt: str | Sequence[int], tokenizer) -> list[int]:
    ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
    if not ids or not all(isinstance(i, int) for i in ids):
        raise ValueError(f"prompts: expected texts or token ids with at least one token, got {describe(prompt)}")
    return ids
