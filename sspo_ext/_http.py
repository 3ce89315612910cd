# SPDX-License-Identifier: Apache-2.0
"""Calls to a server, in JSON."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any


def call(url: str, body: Any = None, *, headers: Mapping[str, str] | None = None, timeout: float = 600.0) -> Any:
    """Ask a server.

    Args:
        url: whole, with its path and query.
        body: becomes JSON and is posted; None: nothing is, the answer is got. `{}` is an empty post.
        headers: of the call.
        timeout: seconds.

    Returns:
        The answer, read from JSON.

    Raises:
        ConnectionError: The server cannot be reached, or refuses; the message has the address, the status and its
            answer.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **(headers or {})})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise ConnectionError(f"{url}: {error.code} {short(error.read().decode(errors='replace'))}") from error
    except urllib.error.URLError as error:
        raise ConnectionError(f"{url}: {error.reason}") from error


def short(answer: Any) -> str:
    """The beginning of an answer, for a message."""
    text = answer if isinstance(answer, str) else json.dumps(answer)
    return text if len(text) <= 300 else text[:297] + "..."
