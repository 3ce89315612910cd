# SPDX-License-Identifier: Apache-2.0
"""Chains, a tokenizer and a call of `sspo-ext trace`, for its tests."""

import json

from helpers.tokenizer import byte_tokenizer
from sspo_ext.cli.main import main

TOKENIZER = byte_tokenizer()
ROWS = [
    {"id": "sum", "prompt": "Q: 2 + 3?\n", "response": "2 + 3 = 5\n#### 5", "answer": "5"},
    {
        "id": "和",
        "prompt": "问：二加三？\n",
        "response": ["二加三是五 🙂", "#### 5"],
        "answer": ["5", "五"],
        "reward": 0.5,
    },
    {"id": "none", "prompt": "Q: 1?\n", "response": None, "answer": "1"},
    {"id": "wrong", "prompt": "Q: 2 + 3?\n", "response": "2 + 3 = 6\n#### 6", "answer": "5", "is_correct": False},
]


def trace(model, data, out, *more):
    return main(["trace", "--model", model, "--data", data, "--output-dir", str(out), "--device", "cpu", *more])


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def chain(number=3, **options):
    steps = ["<script>一</script> $y_1$\n"] * number
    values = [(k % 5) / 5 for k in range(number + 1)]
    advantages = [b - a for a, b in zip(values[:-1], values[1:], strict=True)]
    row = {"prompt": "问 <b>&</b> $x$ 🙂", "answer": "<1>", "reward": 1.0, "steps": steps}
    return row | {"values": values, "advantages": advantages} | options
