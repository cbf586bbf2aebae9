"""``python -m splitsec``: the command line (``cli``)."""

from splitsec.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
