"""Errors that a user can fix, in one line; texts made safe to show."""

from __future__ import annotations

import errno
import os
import re
import unicodedata


class UserError(Exception):
    """An error that the user can fix. `cli.start` prints it as one line and exits with code 2."""


OUT_OF_MEMORY = (  # messages of errors whose type does not say it: torch on a CPU, vLLM at its start and as it wakes up
    "DefaultCPUAllocator: can't allocate memory", "Free memory on device", "CUDA Error: out of memory")


def remedy(error: Exception) -> str:
    """Advice for an error that the user can fix; empty for a bug, which keeps its traceback."""
    said = str(error)
    if isinstance(error, UserError):
        return said
    if type(error).__name__ == "OutOfMemoryError" or any(words in said for words in OUT_OF_MEMORY):
        return ("out of memory: lower --micro-batch-tokens (or --at-once of an evaluation), or grpo.py's "
                "--engine-memory; --checkpointing and --offload-optimizer save more; the same command continues, and "
                "--dry-run N shows what a run on N GPUs needs")
    if "out of resource: shared memory" in said:  # Triton, of a kernel that does not fit the card
        return f"{said[:200]}: this card is too small for the kernel; try --compute-dtype bfloat16, or another card"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        return f"{error.filename or 'a file'}: {error.strerror}; nothing is lost, the same command continues"
    if any(os.strerror(number) in said for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)):  # from a library
        return f"{said[:200]}; nothing is lost, the same command continues"
    return ""


def printable(text: str) -> str:
    """Text that cannot control a terminal or a page: control, bidi and zero-width characters become `<U+001B>`.
    Line ends and tabs stay.

    >>> printable("red \\x1b[31m" + chr(0x202E))
    'red <U+001B>[31m<U+202E>'
    """

    def spelled_out(match: re.Match[str]) -> str:
        c = match[0]
        return c if c.isprintable() or unicodedata.category(c) == "Zs" else f"<U+{ord(c):04X}>"

    return re.sub(r"[^ -~\n\t]", spelled_out, text.replace("\r\n", "\n"))
