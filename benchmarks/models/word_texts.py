# SPDX-License-Identifier: Apache-2.0
"""The sentences of the word problems and of their solutions."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

LANGUAGES = ("en", "zh")

PROBE = "####"  # begins the line that answers, as in GSM8K


@dataclass(frozen=True)
class Texts:
    """The sentences of a language. `tell` and `apply` have one entry for each kind of operation."""

    start: str
    tell: Mapping[str, tuple[str, ...]]
    ask: str
    apply: Mapping[str, str]
    opening: tuple[str, ...]
    restate: str
    check: str
    mend: str
    repeat: str
    so_far: tuple[str, ...]
    doubt: tuple[str, ...]
    space: str
    equation: str
    names: tuple[tuple[str, ...], ...]  # name, he
    items: tuple[tuple[str, ...], ...]  # item, measure
    others: tuple[str, ...]
    not_applied: tuple[str, ...]  # how lines begin that apply nothing

    def draw_words(self, rng: random.Random) -> dict[str, str]:
        """A name, an item and another name."""
        (name, he), (item, measure) = rng.choice(self.names), rng.choice(self.items)
        return {"name": name, "he": he, "item": item, "of": measure, "other": rng.choice(self.others)}

    def line(self, text: str, left: int, symbol: str, right: int, result: int, words: Mapping[str, str]) -> str:
        """A sentence around an equation."""
        equation = self.equation.format(left=left, symbol=symbol, right=right, result=result)
        return text.format(**words, equation=equation)


TEXTS = {
    "en": Texts(
        start="{name} has {n} {item}.",
        tell={
            "+": ("{he} finds {n} more.", "{he} buys {n} more.", "{other} gives {name} {n} more."),
            "-": ("{he} loses {n}.", "{he} gives {n} to {other}.", "{he} sells {n}."),
            "*": ("Then {name} has {n} times as many.",),
            "/": ("{he} gives half of them away.",),
            "boxes": ("{he} gets {a} boxes of {b} {item}.", "{he} buys {a} bags of {b} {item}."),
        },
        ask="How many {item} does {name} have now?",
        apply={
            "+": "Then there are {equation} {item}.",
            "-": "Then {equation} {item} are left.",
            "*": "That many times gives {equation} {item}.",
            "/": "Half of them is {equation} {item}.",
            "boxes": "In all they hold {equation} {item}.",
            "side": "Together there are {equation} {item}.",
        },
        opening=("Let me think about this step by step.", "Okay, let me see what is asked here."),
        restate="{name} had {n} {item} at first.",
        check="Let me check: {equation}.",
        mend="Wait, that is wrong: {equation}.",
        repeat="So {equation}.",
        so_far=("So far {name} has {n} {item}.", "That makes {n} {item} by now."),
        doubt=("Hmm, wait, let me read the question again.", "I should be careful with the numbers here."),
        space=" ",
        equation="{left} {symbol} {right} = {result}",
        names=(("Tom", "He"), ("Ben", "He"), ("Sam", "He"), ("Anna", "She"), ("Mary", "She"), ("Lucy", "She")),
        items=tuple((item, "") for item in ("apples", "books", "coins", "cards", "eggs", "pens")),
        others=("Jack", "Kate", "Paul"),
        not_applied=("Let me check", "Wait,", "So "),
    ),
    "zh": Texts(
        start="{name}有{n}{of}{item}。",
        tell={
            "+": ("又来了{n}{of}。", "又得到{n}{of}。"),
            "-": ("用了{n}{of}。", "给人{n}{of}。"),
            "*": ("后来是{n}倍。",),
            "/": ("用了一半。",),
            "boxes": ("又有{a}包，每包{b}{of}。",),
        },
        ask="现在有几{of}？",
        apply={
            "+": "现在有{equation}{of}。",
            "-": "还有{equation}{of}。",
            "*": "倍数是{equation}{of}。",
            "/": "一半是{equation}{of}。",
            "boxes": "包里有{equation}{of}。",
            "side": "一共有{equation}{of}。",
        },
        opening=("我来想一想。", "先看题目。"),
        restate="开始有{n}{of}。",
        check="检查：{equation}。",
        mend="不对，是{equation}。",
        repeat="就是{equation}。",
        so_far=("到现在是{n}{of}。",),
        doubt=("等一下，再看一下。", "我要小心一点。"),
        space="",
        equation="{left}{symbol}{right}={result}",
        names=(("小明", ""), ("小红", ""), ("小文", ""), ("大平", "")),
        items=(("书", "本"), ("花", "个"), ("水果", "个"), ("地图", "本")),
        others=("",),
        not_applied=("检查", "不对", "就是"),
    ),
}
