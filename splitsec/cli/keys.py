"""``splitsec keys``: make an identity key, and show the public half of one.

Here: the command, and where passphrases come from, for every command that opens a key.  Not here: key files; they are
in identity.py.  Standard output carries the one line to paste into the graph file, all else goes to standard error.
"""

from __future__ import annotations

import argparse
import getpass
import os
import sys
from pathlib import Path

__all__ = ["PASSPHRASE_VARIABLE", "add_parser", "add_passphrase_option", "passphrase_for", "run"]

PASSPHRASE_VARIABLE = "SPLITSEC_PASSPHRASE"

DESCRIPTION = """\
Every party has one identity key.  The private half stays in a file at that party; the public half stands in the graph.
An anonymous group has a key besides, which all of its members hold.

  splitsec keys new clinic-a                 write clinic-a.key, print the line for the graph file
  splitsec keys new clinic-a --passphrase    the same, protected by a passphrase
  splitsec keys new clinics --group          write clinics.key, for each member of the group clinics
  splitsec keys show clinic-a.key            print the line again
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "keys",
        help="make identity keys, and show their public half",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    new = actions.add_parser(
        "new",
        help="make a key",
        description="Write a new private key to FOLDER/NAME.key (mode 0600) and print the line for the graph file.",
    )
    new.add_argument("name", metavar="NAME", help="the party's name in the graph file")
    new.add_argument("--out", metavar="FOLDER", default=".", help="where to write it (default: here)")
    new.add_argument("--passphrase", action="store_true", help="protect the key by a passphrase")
    new.add_argument("--group", action="store_true", help="NAME is an anonymous group; the line is one of its entry")
    add_passphrase_option(new)
    show = actions.add_parser("show", help="print the line for the graph file again")
    show.add_argument("file", metavar="FILE", help="a private key file, called after its party")
    show.add_argument("--group", action="store_true", help="the key of an anonymous group")


def add_passphrase_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--passphrase-fd``, which ``passphrase_for`` reads."""
    parser.add_argument(
        "--passphrase-fd",
        metavar="N",
        type=int,
        help=f"read the passphrase from file descriptor N, one line for each key that has one (else from "
        f"{PASSPHRASE_VARIABLE}, else the terminal asks)",
    )


def passphrase_for(file: Path, arguments: argparse.Namespace, *, new: bool = False) -> str | None:
    """The passphrase of the key at ``file``: from ``--passphrase-fd``, the environment, or the terminal.

    None where an existing key needs none, or where there is no terminal to ask at.  A new one is asked for twice.
    """
    from splitsec.errors import KeyFileError
    from splitsec.identity import is_protected

    if not new and not is_protected(file):
        return None
    descriptor: int | None = arguments.passphrase_fd
    if descriptor is not None:
        return _from_descriptor(file, descriptor)
    if PASSPHRASE_VARIABLE in os.environ:
        return os.environ[PASSPHRASE_VARIABLE]
    if not sys.stdin.isatty():
        if not new:
            return None
        raise KeyFileError(
            "there is no terminal to ask for a passphrase at",
            file=file,
            expected=f"a passphrase in {PASSPHRASE_VARIABLE}, or --passphrase-fd",
            fix="give it in one of these ways",
        )
    first = getpass.getpass(f"Passphrase for {file}: ", stream=sys.stderr)
    if new and getpass.getpass("The same again: ", stream=sys.stderr) != first:
        raise KeyFileError(
            "the two passphrases differ", file=file, expected="the same one twice", fix="try again; nothing was written"
        )
    return first


def _from_descriptor(file: Path, descriptor: int) -> str:
    from splitsec.errors import KeyFileError

    try:
        line = bytearray()
        while len(line) <= 4096 and (one := os.read(descriptor, 1)) not in (b"", b"\n"):
            line += one  # and not one byte more: the next line is another key's
        return line.rstrip(b"\r").decode("utf-8")
    except (OSError, ValueError) as reason:
        raise KeyFileError(
            f"no passphrase can be read from file descriptor {descriptor}: {type(reason).__name__}",
            file=file,
            expected="an open descriptor that gives one line of UTF-8",
            fix="for instance --passphrase-fd 3 3<passphrase.txt",
        ) from None


def run(arguments: argparse.Namespace) -> int:
    """Make or show a key; prints one line on standard output."""
    from splitsec.graph import check_name
    from splitsec.identity import new_key, read_public

    if arguments.action == "show":
        shown = Path(arguments.file)
        _print_line(shown.stem, read_public(shown), group=arguments.group)
        return 0
    check_name(arguments.name)
    file = Path(arguments.out) / f"{arguments.name}.key"
    wanted = arguments.passphrase or arguments.passphrase_fd is not None
    public = new_key(file, passphrase_for(file, arguments, new=True) if wanted else None)
    if arguments.group:
        said = (
            f"Private key of the group: {file}.  Hand a copy to each of its members (`group_key_file` in the party "
            "file) and to nobody else: who has it can speak as one of them.",
            f"Paste this line into the graph file, under `groups:`, into `{arguments.name}`",
        )
    else:
        said = (
            f"Private key: {file} (keep it here, and a backup in a safe place).",
            "Paste this line into the graph file, under `parties:`",
        )
    print(*said, sep="\n", file=sys.stderr)
    _print_line(arguments.name, public, group=arguments.group)
    return 0


def _print_line(name: str, public: str, *, group: bool) -> None:
    print(f'    key: "{public}"' if group else f'  {name}: {{key: "{public}"}}')
