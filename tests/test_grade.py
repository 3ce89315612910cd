"""Graders: what counts as the same answer, and how the answers of a probe are handed to them.

Mutations of sspo_ext/train/grade.py that turned a test red: see the end of each test's docstring.
"""

import pytest

from sspo_ext.train.grade import load_grader

HALF = "\\frac{1}{2}"


@pytest.mark.parametrize(
    "answer, completion, expected",
    [
        # LaTeX as the answer columns of MATH and its like have it: without delimiters
        ("\\sqrt{2}", "The answer is $\\sqrt{2}$", 1.0),
        ("x^2+1", "it is $1+x^2$", 1.0),
        ("(2,3)", "it is \\boxed{(2,3)}", 1.0),
        ("2\\sqrt{3}", "$2$", 0.0),
        ("2\\sqrt{3}", "$\\sqrt{12}$", 1.0),
        ("1\\frac{1}{2}", "$\\frac{1}{2}$", 0.0),
        ("\\text{Evelyn}", "\\boxed{Evelyn}", 1.0),
        # what was read before is read as before
        (26, "so 26.", 1.0),
        ("26", "25", 0.0),
        ("1,234", "$1234$", 1.0),
        ("10\\%", "$10\\%$", 1.0),
        ("10\\%", "$20$", 0.0),
        (f"${HALF}$", f"${HALF}$", 1.0),
        (f"so \\boxed{{{HALF}}}", "$0.5$", 1.0),
        (f"\\({HALF}\\)", "$0.5$", 1.0),
        ("\\$18", "$18$", 1.0),
        ("48/2 = <<48/2=24>>24\n48+24 = <<48+24=72>>72 in May.\n#### 72", "#### 72", 1.0),
        ("x=5", "$5$", 1.0),
    ],
)
def test_math_verify(answer, completion, expected):
    pytest.importorskip("math_verify")
    assert load_grader("math-verify")("", completion, answer) == expected


def test_math_verify_refuses_an_answer_without_mathematics():
    pytest.importorskip("math_verify")
    for answer in ("", "$$"):
        with pytest.raises(ValueError, match="answer: math-verify reads no mathematics in"):
            load_grader("math-verify")("", "$2$", answer)
