# SPDX-License-Identifier: Apache-2.0
"""Sequences that share prefixes, in one forward that computes each shared token once.

trees   TokenTree: a batch of sequences as trees of tokens
models  tree_inputs, tree_attention: the inputs of a Hugging Face model; why_not tells whether a model supports them
"""

from ..layout.tree import TokenTree
from .inputs import tree_attention, tree_inputs
from .support import UnsupportedTree, why_not

__all__ = ["TokenTree", "UnsupportedTree", "tree_attention", "tree_inputs", "why_not"]
