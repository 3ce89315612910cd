# SPDX-License-Identifier: Apache-2.0
"""Writes down the signatures of another package's functions, from its sources, for the tests that have not got it.

    python tools/record_signatures.py FOLDER "vllm 0.33.0, its wheel" vllm/entrypoints/llm.py:LLM.generate ... > FILE

A class stands for what it is made with: `__init__`, or its fields. Nothing of the package is imported or copied but
names, kinds and defaults of arguments; a default that is no plain constant is written `...`.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path


def main(folder: str, source: str, *names: str) -> None:
    """Print the record.

    Args:
        folder: holds the unpacked sources.
        source: what they are and where they come from, for the first line.
        *names: `path:name` each; a name may have a class before a dot.
    """
    print(f"# {source}")
    for name in names:
        path, _, inside = name.partition(":")
        print(f"{name}{signature(ast.parse((Path(folder) / path).read_text()), inside)}")


def signature(tree: ast.AST, name: str) -> str:
    """The signature of a function, or of what a class is made with, as the text between `def f` and the colon."""
    for part in name.split("."):
        body: list[ast.stmt] = getattr(tree, "body", [])
        found = [n for n in body if getattr(n, "name", None) == part]
        if not found:
            raise SystemExit(f"{name}: {part} is not there")
        tree = found[-1]  # the last one, after overloads
    if isinstance(tree, ast.ClassDef):
        made = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        return arguments(made[0].args) if made else fields(tree)
    assert isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef))
    return arguments(tree.args)


def arguments(args: ast.arguments) -> str:
    """The arguments of a function without their annotations."""
    for group in (args.posonlyargs, args.args, args.kwonlyargs, [args.vararg, args.kwarg]):
        for one in filter(None, group):
            one.annotation = None
    args.defaults = [plain(node) for node in args.defaults]
    args.kw_defaults = [None if node is None else plain(node) for node in args.kw_defaults]
    return f"({ast.unparse(args)})"


def fields(tree: ast.ClassDef) -> str:
    """The fields of a dataclass, a model or a struct, by name; a field without a value has to be given."""
    found = []
    for node in tree.body:
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and "ClassVar" not in ast.unparse(node)
        ):
            found.append(node.target.id + ("" if node.value is None else f"={ast.unparse(plain(node.value))}"))
    return f"(*, {', '.join(found)})"


def plain(node: ast.expr) -> ast.expr:
    """A constant as it is, anything else as `...`."""
    constant = node.operand if isinstance(node, ast.UnaryOp) else node
    return node if isinstance(constant, ast.Constant) else ast.Constant(...)


if __name__ == "__main__":
    main(*sys.argv[1:])
