# SPDX-License-Identifier: Apache-2.0
"""Whole units into as few chunks as can be had cheaply."""

from __future__ import annotations

from bisect import bisect_left, insort


def packed(sizes: list[int], capacity: int) -> list[list[int]]:
    """Bins of places in `sizes`; each bin's sizes add up to `capacity` at most. No size is above it.

    In order, if that takes no more bins than best-fit decreasing does (at most 11/9 of the fewest, and one): units
    that stay in order keep their bits. A bin's places are in order in both.
    """
    in_order, filled = [], capacity
    for place, size in enumerate(sizes):
        if filled + size > capacity:
            in_order.append([])
            filled = 0
        in_order[-1].append(place)
        filled += size
    if len(in_order) * capacity - sum(sizes) < capacity:  # no packing takes fewer
        return in_order
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (what is free, bin), sorted
    for place in sorted(range(len(sizes)), key=lambda p: -sizes[p]):
        at = bisect_left(room, (sizes[place], -1))
        if at == len(room):
            bins.append([])
            free, number = capacity, len(bins) - 1
        else:
            free, number = room.pop(at)
        bins[number].append(place)
        insort(room, (free - sizes[place], number))
    return in_order if len(bins) >= len(in_order) else [sorted(places) for places in bins]
