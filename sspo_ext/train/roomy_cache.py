# SPDX-License-Identifier: Apache-2.0
"""A DynamicCache that writes a token in place. The one of transformers copies all that it holds for every token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer


class RoomyCache(DynamicCache):
    """A DynamicCache of `RoomyLayer`s, for generation without gradients."""

    def __init__(self):
        super().__init__()
        self.layer_class_to_replicate = RoomyLayer


class RoomyLayer(DynamicLayer):
    """Keys and values (rows, heads, tokens, size) are views of larger tensors, with room for the tokens to come."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._rooms: dict[str, tuple[Tensor, Tensor]] = {}  # the larger tensors, and the views of them

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the states of new tokens, and return those of all: under autocast in its dtype.

        The attention would bring all of them into it for every token.
        """
        device = key_states.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        if self.get_seq_length() == 0:
            return super().update(key_states, value_states, *args, **kwargs)
        return self._append("keys", key_states), self._append("values", value_states)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`. Only rows that are not in their place already are copied."""
        for name in ("keys", "values"):
            held, room = getattr(self, name), self._room(name)
            if room is None or len(indices) > len(held):
                setattr(self, name, held[indices])
                continue
            moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero()[:, 0]
            held[moved] = held[indices[moved]]
            self._hold(name, room[: len(indices)], held.shape[-2])

    def _append(self, name: str, states: Tensor) -> Tensor:
        held, room = getattr(self, name), self._room(name)
        before, length = held.shape[-2], held.shape[-2] + states.shape[-2]
        if room is None or room.shape[-2] < length:
            room = held.new_empty(*held.shape[:-2], length + max(length // 4, 64), held.shape[-1])
            room[..., :before, :] = held
        room[..., before:length, :] = states
        return self._hold(name, room, length)

    def _hold(self, name: str, room: Tensor, length: int) -> Tensor:
        view = room[..., :length, :]
        self._rooms[name] = room, view
        setattr(self, name, view)
        return view

    def _room(self, name: str) -> Tensor | None:
        """The tensor whose view is held; None where another method has put a tensor of its own there."""
        room, view = self._rooms.get(name, (None, None))
        return room if view is getattr(self, name) else None
