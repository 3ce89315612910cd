"""The demo's picture: what the model believes, writes and prefers, before and after."""

from __future__ import annotations

from os import PathLike

from .task import Problem, review

BEFORE, AFTER, BAD, WORDY, INK = "#b8b2a7", "#1f6f8b", "#c8553d", "#e0a458", "#2b2b2b"


def draw(result: dict, path: str | PathLike) -> None:
    """Writes a PNG from what `run` returns."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    style = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "text.color": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    first, last = result["stages"][0], result["stages"][-1]
    with plt.rc_context(style):
        figure = plt.figure(figsize=(13, 8.2), dpi=120, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
        top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.2])
        _rounds(*top.subplots(1, 3, width_ratios=[1.1, 1, 1]), result)
        left, right = bottom.subfigures(1, 2, width_ratios=[1.35, 1])
        _beliefs(left, result["belief"])
        _examples(right, result["stages"])
        accuracy, tokens = (
            f"{first[k]:{form}} → {last[k]:{form}}" for k, form in (("accuracy", ".0%"), ("tokens", ".0f"))
        )
        title = f"Step preferences on generated arithmetic: right answers {accuracy}, tokens per solution {tokens}"
        figure.suptitle(title, fontsize=13, fontweight="bold")
        figure.savefig(path)
        plt.close(figure)


def _rounds(outcome, training, histogram, result: dict) -> None:
    stages = result["stages"]
    rounds = range(len(stages))
    kinds = (("accuracy", "right answer", AFTER), ("slips", "first bad step is wrong", BAD))
    for name, label, colour in (*kinds, ("redundant", "... is redundant", WORDY)):
        values = [s[name] for s in stages]
        outcome.plot(rounds, values, "o-", color=colour, label=label, lw=2)
        outcome.annotate(
            f"{values[-1]:.0%}", (rounds[-1], values[-1]), (6, -3), textcoords="offset points", color=colour
        )
    outcome.set(
        title="Held-out problems, greedy", xlabel="rounds of step preferences", ylim=(-0.03, 1.03), xticks=list(rounds)
    )
    outcome.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
    outcome.legend(frameon=False, loc="best")

    log = result["log"]
    updates = range(1, len(log) + 1)
    training.plot(updates, [e["loss"] for e in log], color=INK, lw=1.5, label="loss")
    training.set(title="Training", xlabel="update", ylabel="loss", ylim=(0, None))
    twin = training.twinx()
    twin.plot(updates, [e["rewards/accuracies"] for e in log], color=AFTER, lw=1, alpha=0.8)
    twin.set_ylim(0, 1.03)
    twin.spines["right"].set_visible(True)
    twin.set_ylabel("reward accuracy", color=AFTER)
    twin.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")

    for stage, colour, name in ((stages[0], BEFORE, "imitation only"), (stages[-1], AFTER, "after")):
        margins = [min(max(m, -12), 12) for kind in ("slip_pairs", "redundant_pairs") for m in stage[kind]["margins"]]
        histogram.hist(margins, bins=[x / 2 for x in range(-24, 25)], color=colour, alpha=0.75, label=name)
    histogram.axvline(0, color=INK, lw=0.8)
    histogram.set(
        title="Held-out pairs: right against bad step", xlabel="log p(right) − log p(bad), nats", ylabel="pairs"
    )
    histogram.legend(frameon=False, loc="upper left")


def _beliefs(figure, belief: list[dict]) -> None:
    figure.suptitle("Probability of the right result", x=0.02, ha="left", fontweight="bold")
    axes = figure.subplots(1, 4, sharey=True)
    for axis, (op, stage) in zip(axes, ((op, stage) for op in "+-" for stage in (0, 1)), strict=True):
        image = axis.imshow(belief[stage][op], vmin=0, vmax=1, cmap="RdYlGn", aspect="auto", origin="lower")
        axis.set(
            title=f"a {'+' if op == '+' else '−'} b, {('before', 'after')[stage]}", xlabel="b", xticks=range(0, 10, 3)
        )
        axis.spines[:].set_visible(False)
    axes[0].set(ylabel="a", yticks=range(0, 16, 3))
    figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01, format=lambda v, _: f"{v:.0%}")


def _examples(figure, stages: list[dict]) -> None:
    """Two held-out problems that tell most: wrong and wordy before, as it should be after."""
    found = []
    for b, a in zip(stages[0]["example"], stages[-1]["example"], strict=True):
        problem = Problem(b["prompt"].removesuffix(" =\n"))
        score = (
            (not review(problem, b["text"]).correct) + (review(problem, a["text"]).bad is None),
            "check" in b["text"],
        )
        found.append((score, len(problem.terms) == 4, problem, b["text"], a["text"]))
    figure.suptitle("Held-out examples", x=0.02, ha="left", fontweight="bold", fontsize=10)
    axes = figure.subplots(2, 1)
    for axis, (*_, problem, before, after) in zip(axes, sorted(found, key=lambda e: e[:2], reverse=True), strict=False):
        axis.axis("off")
        axis.text(0, 1, f"{problem.expression} = {problem.answer}", transform=axis.transAxes, fontweight="bold")
        for x, name, text in ((0.0, "before", before), (0.52, "after", after)):
            axis.text(x, 0.89, name, transform=axis.transAxes, color="#7a7a7a")
            for k, (line, colour) in enumerate(_coloured(problem, text)[:9]):
                axis.text(x, 0.78 - 0.098 * k, line, color=colour, family="monospace", transform=axis.transAxes)


def _coloured(problem: Problem, text: str) -> list[tuple[str, str]]:
    """Every line with its colour: bad if its arithmetic is wrong or it repeats, or if it follows from a wrong one."""
    lines = []
    for line in text.split("\n"):
        words = line.replace("check ", "").split()
        wrong = len(words) == 5 and words[1] in "+-" and _result(words) != words[4]
        repeats = line.startswith(("check", "so far"))
        colour = BAD if wrong else WORDY if repeats else INK
        lines.append((line, colour if line != f"answer {problem.answer}" else "#2e7d32"))
    if not lines[-1][0].endswith(f"answer {problem.answer}"):
        lines[-1] = (lines[-1][0], BAD)
    return lines


def _result(words: list[str]) -> str:
    a, op, b = words[:3]
    try:
        return str(int(a) + int(b) if op == "+" else int(a) - int(b))
    except ValueError:
        return ""
