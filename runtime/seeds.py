"""Numbers that are the same in every process: seeds and digests."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def derive_seed(*parts: object) -> int:
    """A 62-bit seed from any parts as text, the same in every process, unlike `hash`. Unpaired surrogates work too."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def digest(value: Any) -> str:
    """16 hex digits of anything that JSON can hold."""
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=8).hexdigest()
