# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C (SIGINT) and SIGTERM during a training: it ends after the update that is running, with a checkpoint."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from transformers import TrainerCallback


class StopOnSignal(TrainerCallback):
    """Ends a training after the update in which a signal arrives. A second signal ends the process at once.

    Attributes:
        received: The number of the signal; None until one arrives.
    """

    def __init__(self):
        self.received: int | None = None

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Takes the signals meanwhile. A signal that the process ignores, as under nohup, stays ignored."""
        before = {}
        if threading.current_thread() is threading.main_thread():  # Python has handlers there alone
            now = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
            before = {number: handler for number, handler in now.items() if handler != signal.SIG_IGN}
        for number in before:
            signal.signal(number, self._receive)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        self.received = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # print could be interrupted in itself
        os.write(2, b"\nstopping after this update, with a checkpoint; once more: at once, without\n")

    def on_step_end(self, args, state, control, **kwargs):
        """Asks for a checkpoint and for the end. With several updates on one batch of rollouts, after the last."""
        if self.received is not None and state.global_step % getattr(args, "num_iterations", 1) == 0:
            control.should_save = control.should_training_stop = True
