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
def user_code(what: str, named_at: tuple[Path | None, int | None] = (None, None)) -> Iterator[None]:
    """Run the user's code; ``what`` names it.  Raises ``PartyFileError`` for any exception of its own.

    ``named_at``: file and line that name the code, for an exception that came before its first line.
    """
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
        file, line = (frames[-1].filename, frames[-1].lineno) if frames else named_at
        raise PartyFileError(
            f"{what} failed: {type(error).__name__}: {error}",
            file=file,
            line=line,
            expected="code that runs",
            fix=_advice(str(error)),
        ) from error


def _advice(text: str) -> str:
    if "same dtype" in text or "expected scalar type" in text:
        return "numpy makes float64 by default: return float32 samples, `.astype('float32')` or `.float()`"
    if "unexpected keyword argument" in text or "required positional argument" in text:
        return "make `args` there and the function's parameters agree"
    if "out of bounds" in text:
        return "classes are numbered from 0 and need one output each: look at the labels and the last layer"
    return "mend the code on that line, or what it is given"
