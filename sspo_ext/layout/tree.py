# SPDX-License-Identifier: Apache-2.0
"""A batch of sequences as trees: a prefix that several sequences share is stored once. Built once, on the host."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .._checks import check_count, describe
from .bundle import Built, TensorBundle
from .packing import packed

ROOT, PADDING = -1, -2  # values of `TokenTree.parent` where there is no token before


@dataclass(frozen=True, eq=False, repr=False)
class TokenTree(Built, TensorBundle):
    """Tokens of B sequences on a grid of R rows and L columns, where equal prefixes are one run of tokens.

    A row holds one tree or several, each in depth-first order, and padding on the right. The path of a token is the
    tokens from its root to itself, so a sequence is the path of its last token. A token sees its own path only: query q
    sees key k of the same row if `k <= q < end[k]`. Padding sees itself.

    Build it with `from_sequences`.

    Examples:
        >>> tree = TokenTree.from_sequences([[5, 6, 7], [5, 6, 8, 9]])
        >>> tree.input_ids, tree.parent
        (tensor([[5, 6, 7, 8, 9]]), tensor([[-1,  0,  1,  1,  3]], dtype=torch.int32))
    """

    input_ids: Tensor  # (R, L) int64
    position_ids: Tensor  # (R, L) int64: how many tokens come before it on its path; 0 at padding
    parent: Tensor  # (R, L) int32: column of the token before it on its path; -1 at a root, -2 at padding
    end: Tensor  # (R, L) int32: one past the last column of what follows it; column + 1 at padding
    host_place: Tensor  # (sum of lengths,) int64: row * L + column of every token, sequence after sequence
    host_offsets: Tensor  # (B + 1,) int64, CSR over `host_place`: the tokens of each sequence
    num_sequences: int  # B
    num_tokens: int  # of all trees, without padding; a part that is repeated counts each time

    @property
    def shape(self) -> tuple[int, int]:
        """(R, L)."""
        rows, length = self.input_ids.shape
        return rows, length

    @property
    def num_unshared_tokens(self) -> int:
        """The tokens of all sequences, each counted for itself."""
        return self.host_place.shape[0]

    @property
    def longest(self) -> int:
        """The tokens of the longest sequence."""
        return int(self.host_offsets.diff().max()) if self.num_sequences else 0

    @property
    def sharing(self) -> float:
        """`num_unshared_tokens / num_tokens`: how many sequences a token stands for on average; 1 if none is shared."""
        return self.num_unshared_tokens / max(self.num_tokens, 1) if self.num_unshared_tokens else 1.0

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.input_ids.device

    def places(self) -> tuple[Tensor, ...]:
        """For each sequence the places of its tokens on the grid, row * L + column, on the host."""
        return self.host_place.split(self.host_offsets.diff().tolist())

    def __repr__(self) -> str:
        return (
            f"TokenTree(sequences={self.num_sequences}, shape={self.shape}, tokens={self.num_tokens}, "
            f"unshared={self.num_unshared_tokens}, device={self.device})"
        )

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequence[Sequence[int] | Tensor | np.ndarray],
        *,
        max_tokens: int | None = None,
        groups: Sequence[int] | None = None,
        pad_token_id: int = 0,
        pad_to_multiple_of: int | None = None,
    ) -> TokenTree:
        """Merge equal prefixes of sequences, exactly, by their token ids.

        The trees do not depend on the order of the sequences. Sequences may be empty, equal to each other, or a prefix
        of another one. The time is linear in the number of tokens, but for the sort of the sequences.

        All prompts of one chat template begin with the same few tokens. Then all sequences are one tree, unless
        `groups` or `max_tokens` parts them.

        Args:
            sequences: B sequences of token ids, without padding.
            max_tokens: the most tokens of a row. A tree above it is split where that repeats the fewest tokens. None
                splits no tree: a row is then as long as the largest one.
            groups: (B,) int. Prefixes are merged inside a group only, such as the sequences of one prompt. None merges
                them all.
            pad_token_id: the token id at padding.
            pad_to_multiple_of: L becomes a multiple of this, which may be more than `max_tokens`.

        Returns:
            A TokenTree on the host, of one position at least.

        Raises:
            TypeError: if ids or groups are no integers.
            ValueError: if a sequence is longer than `max_tokens` or has an id below 0 (the message names the sequence),
                or if there is not one group a sequence.

        Examples:
            >>> TokenTree.from_sequences([[1, 2, 3], [1, 2, 4], [7]], max_tokens=4)
            TokenTree(sequences=3, shape=(2, 4), tokens=5, unshared=7, device=cpu)
        """
        found = [_ids(sequence, b) for b, sequence in enumerate(sequences)]
        lengths = np.array([len(ids) for ids in found], np.int64)
        group = _groups(groups, len(found))
        if max_tokens is not None:
            check_count("max_tokens", max_tokens)
            _refuse_long(lengths, max_tokens)
        check_count("pad_token_id", pad_token_id, least=0)
        if pad_to_multiple_of is not None:
            check_count("pad_to_multiple_of", pad_to_multiple_of)
        # Bytes sort as the ids do if the highest byte comes first, and on every machine alike.
        keys = [ids.astype(">i8").tobytes() for ids in found]
        order = sorted((b for b in range(len(found)) if lengths[b]), key=lambda b: (group[b], keys[b]))
        shared = _shared(found, order, group)
        if max_tokens is not None:
            shared = _split(lengths[order], shared, max_tokens)
        nodes = _merged(found, order, shared)

        shape, place, shift = _placed(nodes, max_tokens, pad_to_multiple_of or 1)

        def grid(padding, values, dtype):
            out = np.empty(shape, dtype)
            out[...] = padding
            out.reshape(-1)[place] = values
            return torch.from_numpy(out)

        host_place = np.empty(int(lengths.sum()), np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        for b, path in zip(order, nodes.paths, strict=True):
            host_place[offsets[b] : offsets[b + 1]] = place[path]
        return cls(
            input_ids=grid(pad_token_id, nodes.ids, np.int64),
            position_ids=grid(0, nodes.depth, np.int64),
            parent=grid(PADDING, np.where(nodes.parent == ROOT, ROOT, nodes.parent + shift), np.int32),
            end=grid(np.arange(1, shape[1] + 1), nodes.end + shift, np.int32),
            host_place=torch.from_numpy(host_place),
            host_offsets=torch.from_numpy(offsets),
            num_sequences=len(found),
            num_tokens=len(place),
        )


@dataclass(frozen=True)
class _Nodes:
    """The tokens of all trees, one tree after the other; `parent` and `end` are places in these arrays."""

    ids: np.ndarray
    depth: np.ndarray
    parent: np.ndarray
    end: np.ndarray
    paths: list[np.ndarray]  # the places of each sequence's tokens


def _merged(found: list[np.ndarray], order: list[int], shared: np.ndarray) -> _Nodes:
    """Trees of sorted sequences, each of which begins with `shared` tokens of the one before it.

    Sorted, each sequence adds the tokens that follow its shared ones, and the order in which they come is depth-first.
    """
    new = np.array([len(found[b]) for b in order], np.int64) - shared
    starts = np.cumsum(new) - new
    total = int(new.sum())
    ids, depth, parent, end = np.empty((4, total), np.int64)
    path, paths = np.empty(0, np.int64), []
    for b, start, kept in zip(order, starts.tolist(), shared.tolist(), strict=True):
        own = np.arange(start, start + len(found[b]) - kept)
        end[path[kept:]] = start
        ids[own], depth[own], parent[own] = found[b][kept:], np.arange(kept, len(found[b])), own - 1
        if len(own):
            parent[start] = path[kept - 1] if kept else ROOT
        path = np.concatenate([path[:kept], own])
        paths.append(path)
    end[path] = total
    return _Nodes(ids, depth, parent, end, paths)


def _placed(nodes: _Nodes, max_tokens: int | None, multiple: int) -> tuple[tuple[int, int], np.ndarray, np.ndarray]:
    """Put whole trees into rows: (R, L), the place of each node, and what is to be added to it for its column."""
    starts = np.flatnonzero(nodes.parent == ROOT)
    sizes = np.diff(np.append(starts, len(nodes.parent)))
    rows = packed(sizes.tolist(), max_tokens or int(sizes.max(initial=1)))
    shift, row = np.zeros((2, len(sizes)), np.int64)
    for r, trees in enumerate(rows):
        shift[trees], row[trees] = np.cumsum(sizes[trees]) - sizes[trees] - starts[trees], r
    longest = max((int(sizes[trees].sum()) for trees in rows), default=1)
    shape = (max(len(rows), 1), -(-longest // multiple) * multiple)
    shift, row = np.repeat(shift, sizes), np.repeat(row, sizes)
    return shape, row * shape[1] + np.arange(len(row)) + shift, shift


def _shared(found: list[np.ndarray], order: list[int], group: np.ndarray) -> np.ndarray:
    """How many tokens each of the sorted sequences has in common with the one before it."""
    shared = np.zeros(len(order), np.int64)
    for k in range(1, len(order)):
        last, this = order[k - 1], order[k]
        if group[last] == group[this]:
            n = min(len(found[last]), len(found[this]))
            differs = found[last][:n] != found[this][:n]
            at = int(differs.argmax())
            shared[k] = at if differs[at] else n
    return shared


def _split(lengths: np.ndarray, shared: np.ndarray, max_tokens: int) -> np.ndarray:
    """`shared` with zeros where a new tree begins, so that no tree is above `max_tokens`.

    A cut before a sequence repeats its shared tokens. The cuts that repeat the fewest are found by dynamic programming:
    the best trees up to a sequence are the best ones up to some earlier sequence, and one tree of all from there.
    """
    before = np.concatenate([[0], np.cumsum(lengths - shared)]).tolist()
    shared_of = shared.tolist()
    repeated = [0]  # the fewest tokens repeated in trees of the first sequences
    cut = []  # the first sequence of the last of these trees
    open_: list[tuple[int, int]] = []  # (tokens repeated if a tree begins here, sequence): a heap
    for k, kept in enumerate(shared_of):
        if kept == 0:
            open_ = []
        heapq.heappush(open_, (repeated[k] + kept, k))
        while before[k + 1] - before[open_[0][1]] + shared_of[open_[0][1]] > max_tokens:
            heapq.heappop(open_)  # it only grows, so no later tree begins here
        best, first = open_[0]
        repeated.append(best)
        cut.append(first)
    out = shared.copy()
    k = len(cut)
    while k:
        k = cut[k - 1]
        out[k] = 0
    return out


def _ids(sequence: Sequence[int] | Tensor | np.ndarray, b: int) -> np.ndarray:
    """One sequence as an int64 array."""
    ids = sequence.cpu().numpy() if isinstance(sequence, Tensor) else np.asarray(sequence)
    if ids.ndim != 1:
        raise ValueError(f"sequences: expected token ids in one dimension, got {describe(sequence)} as sequence {b}")
    if ids.size and ids.dtype.kind not in "iu":
        raise TypeError(f"sequences: expected integers, got {describe(sequence)} as sequence {b}")
    ids = ids.astype(np.int64)
    if ids.size and ids.min() < 0:
        at = int((ids < 0).argmax())
        raise ValueError(f"sequences: expected token ids of at least 0, got {ids[at]} at {at} of sequence {b}")
    return ids


def _groups(groups: Sequence[int] | None, num_sequences: int) -> np.ndarray:
    if groups is None:
        return np.zeros(num_sequences, np.int64)
    found = np.asarray(groups)
    if found.shape != (num_sequences,):
        raise ValueError(f"groups: expected one number for each of {num_sequences} sequences, got {describe(groups)}")
    if found.size and found.dtype.kind not in "iu":
        raise TypeError(f"groups: expected integers, got {describe(groups)}")
    return found.astype(np.int64)


def _refuse_long(lengths: np.ndarray, max_tokens: int) -> None:
    long = np.flatnonzero(lengths > max_tokens)
    if len(long):
        b = int(long[0])
        raise ValueError(
            f"sequences: expected at most max_tokens={max_tokens} tokens, got {lengths[b]} in sequence {b}"
        )
