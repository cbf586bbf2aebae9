"""The border to code that the user wrote: models, losses, data functions.

Here: one context manager that turns their exceptions into a line with the user's own file and line.  Not here:
loading that code (``partyfile``).
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from splitsec.errors import PartyFileError, SplitsecError

__all__ = ["user_code"]

_OURS = Path(__file__).resolve().parent


@contextmanager
def user_code(what: str) -> Iterator[None]:
    """Run the user's code; ``what`` names it.  Raises ``PartyFileError`` for any exception of its own."""
    try:
        yield
    except SplitsecError:
        raise
    except Exception as error:
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if "site-packages" not in frame.filename
            and Path(frame.filename).resolve().parent != _OURS
            and not frame.filename.startswith("<")
        ]
        file, line = (frames[-1].filename, frames[-1].lineno) if frames else (None, None)
        raise PartyFileError(
            f"{what} failed: {type(error).__name__}: {error}", file=file, line=line, fix=_advice(str(error))
        ) from error


def _advice(text: str) -> str:
    if "in-place operation" in text:
        return "a segment's input belongs to the cut: use inplace=False in its first layer"
    return ""
