# SPDX-License-Identifier: Apache-2.0
"""Signatures of packages that are not installed here, as `tools/record_signatures.py` wrote them down, in signatures/.

The first line of a file says of which version they are and where they come from.
"""

import functools
import inspect
from pathlib import Path


class Record:
    """The signatures of one file, by `path:name`."""

    def __init__(self, file):
        source, *lines = (Path(__file__).parent / "signatures" / file).read_text().splitlines()
        self.source, self.texts = source[2:], dict(line.split("(", 1) for line in lines)

    def signature(self, name):
        """The inspect.Signature of a function, or of what a class is made with."""
        space = {}
        exec(f"def f({self.texts[name]}: ...", space)
        return inspect.signature(space["f"])

    def bind(self, name, /, *args, **kwargs):
        """The arguments by name, with defaults; TypeError for a call that the real function would not take."""
        bound = self.signature(name).bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    def names(self, name):
        """The names that a class takes."""
        return set(self.signature(name).parameters) - {"self"}

    def follows(self, name):
        """A decorator: what is called as the function of this name must be called as the real one takes it."""

        def wrap(function):
            @functools.wraps(function)
            def checked(*args, **kwargs):
                self.bind(name, *args, **kwargs)
                return function(*args, **kwargs)

            return checked

        return wrap
