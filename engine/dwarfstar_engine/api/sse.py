"""Server-sent events, as OpenAI's streams use them: one line of JSON each.

JSON is written in ASCII: some clients split lines at U+2028 or U+0085 too, which may stand unescaped in JSON strings.
"""

from __future__ import annotations

import json
from json.encoder import encode_basestring_ascii  # what json.dumps comes to for a string, four calls later
from typing import Any

DONE = b"data: [DONE]\n\n"
END = b"\n\n"


def event(body: Any) -> bytes:
    return b"data: " + json.dumps(body, separators=(",", ":")).encode("ascii") + END


def text_json(text: str) -> bytes:
    """``text`` as a JSON string; the only encoding done for every token."""
    return encode_basestring_ascii(text).encode("ascii")


def opened(fields: dict[str, Any]) -> bytes:
    """The beginning of an event whose object has ``fields`` and more to come."""
    return event(fields)[: -len(END) - 1] + b","
