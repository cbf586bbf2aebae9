"""YAML files that people write: read safely, with the line of every key, and mistakes told in our words.

Here: reading (size and depth are limited; aliases, tags and duplicate keys are refused), the value with its lines, and
the translation of pydantic's complaints.  Not here: what a graph or party file may say; that is in graph.py and
partyfile.py, where the story goes next.

Scalars follow YAML 1.2's core schema, not PyYAML's YAML 1.1: ``no`` is a name and not False, ``1e-3`` is a number and
not text, ``010`` is ten and ``12:30`` is text.  A key is always the text that was written.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from splitsec.errors import GraphError, PartyFileError

__all__ = ["Document", "FrozenDict", "meant", "mistake", "parse", "read", "shown", "validate"]

Model = TypeVar("Model", bound=BaseModel)
FileError = type[GraphError] | type[PartyFileError]
Path_ = tuple[str | int, ...]
Value = TypeVar("Value")

MAX_BYTES = 1024 * 1024  # of one file; a graph of a thousand parties needs a tenth of it
MAX_DEPTH = 24  # levels of nesting; our own models have 5, the rest is for a party's own args
MAX_DIGITS = 4000  # of one number; below the limit at which Python refuses to convert (4300)
SHOWN = 60  # characters of a wrong value that a message repeats


class FrozenDict(dict[str, Value]):
    """A dict that cannot be changed after it was made; iterates in the order of the file."""

    def _refuse(self, *_: object, **__: object) -> typing.NoReturn:
        raise TypeError("this mapping comes from a file that was read; it cannot be changed")

    __setitem__ = __delitem__ = clear = pop = popitem = setdefault = update = __ior__ = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[type[FrozenDict[Value]], tuple[dict[str, Value]]]:
        return type(self), (dict(self),)


@dataclass(frozen=True)
class Document:
    """What a file said, and on which line."""

    file: str
    value: dict[str, Any]
    lines: Mapping[Path_, int] = field(repr=False)

    def line_of(self, *keys: str | int) -> int:
        """Line of the entry at ``keys`` (counted from 1); of the nearest enclosing entry if it is not written."""
        for length in range(len(keys), 0, -1):
            line = self.lines.get(keys[:length])
            if line is not None:
                return line
        return self.lines.get((), 1)


# Scalars: https://yaml.org/spec/1.2.2/#103-core-schema
_NULL = re.compile(r"(?:~|null|Null|NULL|)\Z")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
_INT = re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z")
_FLOAT = re.compile(
    r"[-+]?(?:(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))\Z|\.(?:nan|NaN|NAN)\Z"
)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader up to its nodes; without aliases, and not deeper than ``MAX_DEPTH``."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _Mistake(
                line,
                f"{'*' if isinstance(event, yaml.AliasEvent) else '&'}{event.anchor}, a YAML anchor or alias",
                "every value written out where it is used",
                "replace the alias by what it stands for (quote the text if it only happens to begin with * or &)",
            )
        if getattr(event, "tag", None) is not None:
            raise _Mistake(line, f"the YAML tag {shown(str(event.tag))}", "plain values without tags", "remove the tag")
        if self.depth >= MAX_DEPTH:
            raise _Mistake(
                line, f"nesting deeper than {MAX_DEPTH} levels", "a few levels", "look for a bracket that is not closed"
            )
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


class _Mistake(Exception):
    def __init__(self, line: int | None, seen: str, expected: str, fix: str) -> None:
        self.line, self.seen, self.expected, self.fix = line, seen, expected, fix


def read(path: str | Path, error: FileError) -> Document:
    """The YAML mapping in the file at ``path``; whatever is wrong with it is raised as ``error`` with file and line."""
    file = Path(path)
    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise error("there is no such file", file=file, expected="a YAML file", fix="check the path") from None
    except OSError as reason:
        raise error(f"cannot be read: {reason.strerror}", file=file, expected="a YAML file that you may read") from None
    if len(raw) > MAX_BYTES:
        raise error(
            "the file is larger than 1 MiB",
            file=file,
            expected="a text file of some kilobytes",
            fix="check that this is the right file",
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as reason:
        line = raw[: reason.start].count(b"\n") + 1
        seen = f"not text in UTF-8 (byte 0x{raw[reason.start]:02x})"
        raise error(
            seen, file=file, line=line, expected="a YAML file in UTF-8", fix="check that this is the right file"
        ) from None
    return parse(text, file, error)


def parse(text: str, file: str | Path, error: FileError) -> Document:
    """The YAML mapping in ``text``; ``file`` is what errors and the document call it."""
    lines: dict[Path_, int] = {}
    try:
        root = _compose(text)
        value = _construct(root, (), lines)
    except _Mistake as found:
        raise error(found.seen, file=file, line=found.line, expected=found.expected, fix=found.fix) from None
    return Document(str(file), value, lines)


def _compose(text: str) -> yaml.MappingNode:
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as reason:
        mark = reason.problem_mark or reason.context_mark
        what = ", ".join(part for part in (reason.problem, reason.context) if part)
        raise _Mistake(
            mark.line + 1 if mark else None,
            f"not YAML: {what}",
            "YAML",
            "mend the line, or the one before it; brackets and quotes must close",
        ) from None
    except yaml.reader.ReaderError as reason:
        line = text[: reason.position].count("\n") + 1
        code = reason.character if isinstance(reason.character, int) else ord(str(reason.character)[0])
        raise _Mistake(
            line, f"not YAML: the character U+{code:04X} is not allowed", "YAML, which is text", "remove the character"
        ) from None
    except yaml.YAMLError as reason:
        raise _Mistake(None, f"not YAML: {reason}", "YAML", "check that this is the right file") from None
    finally:
        if loader is not None:
            loader.dispose()
    if root is None:
        raise _Mistake(None, "the file is empty", "keys and values", "start from one of the files in examples/")
    if not isinstance(root, yaml.MappingNode):
        raise _Mistake(
            root.start_mark.line + 1,
            f"{_kind(root)} at the top",
            "keys and values",
            "start from one of the files in examples/",
        )
    return root


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return "a mapping" if isinstance(node, yaml.MappingNode) else "one single value"


def _construct(node: yaml.Node, path: Path_, lines: dict[Path_, int]) -> Any:
    line = node.start_mark.line + 1
    lines.setdefault(path, line)
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, line)
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, (*path, index), lines) for index, item in enumerate(node.value)]
    value: dict[str, Any] = {}
    for key_node, item in node.value:
        key_line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise _Mistake(key_line, f"{_kind(key_node)} as a key", "a name as a key", "write `name: value`")
        key = key_node.value
        if key in value:
            raise _Mistake(
                key_line,
                f"the key `{shown(key)}` is there twice (first on line {lines[(*path, key)]})",
                "every key once",
                "remove or rename one of them",
            )
        lines[(*path, key)] = key_line
        value[key] = _construct(item, (*path, key), lines)
    return value


def _scalar(node: yaml.ScalarNode, line: int) -> Any:
    text = str(node.value)
    if node.style is not None:  # quoted or block: text, whatever it looks like
        return text
    if _NULL.match(text):
        return None
    if _BOOL.match(text):
        return text.lower() == "true"
    if _INT.match(text):
        if len(text) > MAX_DIGITS:
            raise _Mistake(
                line,
                f"a number of {len(text)} digits",
                "a number of reasonable size",
                "shorten it, or quote it if it is text",
            )
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text)
    if _FLOAT.match(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


# Mistakes in our words


def shown(value: object) -> str:
    """A value from a file as a message repeats it: short, on one line, without control characters."""
    if isinstance(value, str):
        text = value if value and value.isprintable() and "`" not in value else repr(value)
    elif isinstance(value, bool):
        text = "true" if value else "false"
    elif value is None:
        text = "null"
    elif isinstance(value, (dict, BaseModel)):
        text = "a mapping"
    elif isinstance(value, (list, tuple)):
        text = "[" + ", ".join(shown(item) for item in value[:9]) + (", ...]" if len(value) > 9 else "]")
    else:
        text = repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def meant(name: str, known: Iterable[str]) -> str:
    """What to do about an unknown name: the nearest known ones, else all of them."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if near:
        return "did you mean " + " or ".join(f"`{one}`" for one in near) + "?"
    if not names:
        return ""
    return "use one of " + ", ".join(f"`{one}`" for one in names[:20]) + (", ..." if len(names) > 20 else "")


def mistake(seen: str, *, expected: str = "", fix: str = "") -> PydanticCustomError:
    """What a validator raises: ``validate`` turns it into the file's error with the line of the value."""
    return PydanticCustomError("mistake", "{seen}", {"seen": seen, "expected": expected, "fix": fix})


def validate(model: type[Model], document: Document, error: FileError) -> Model:
    """``document`` as a ``model``; the first mistake in the file is raised as ``error``, the others are counted.

    The model's ``model_post_init`` receives the document as its context.  A ``GraphError`` or ``PartyFileError`` that
    the model itself raises passes through.
    """
    try:
        return model.model_validate(document.value, context=document, by_alias=True, by_name=False)
    except ValidationError as reason:
        found = [(document.line_of(*_keys(one["loc"], one["type"])), one) for one in reason.errors(include_url=False)]
    # in the order of the file, but what is missing last: a misspelt key is both unknown and missing
    found.sort(key=lambda pair: (pair[1]["type"] == "missing", pair[0]))
    line, first = found[0]
    seen, expected, fix = _translated(model, first)
    others = ", ".join(str(number) for number in sorted({number for number, _ in found} - {line}))
    if others:
        fix = f"{fix}; then see line {others}, too" if fix else f"see line {others}, too"
    raise error(seen, file=document.file, line=line, expected=expected, fix=fix) from None


def _keys(location: tuple[int | str, ...], kind: str) -> Path_:
    if location and location[-1] == "[key]":
        return location[:-1]
    return location[:-1] if kind == "missing" else location


_KINDS = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "dict_type": "keys and values, as in {key: value}",
    "model_type": "keys and values, as in {key: value}",
    "model_attributes_type": "keys and values, as in {key: value}",
    "tuple_type": "a list, as in [a, b]",
    "list_type": "a list, as in [a, b]",
}


def _translated(model: type[BaseModel], found: ErrorDetails) -> tuple[str, str, str]:
    location, kind, context = found["loc"], found["type"], found.get("ctx", {})
    name = _dotted(location)
    if kind == "mistake":
        return str(context["seen"]), str(context["expected"]), str(context["fix"])
    owner = _model_at(model, location[:-1])
    last = str(location[-1]) if location else ""
    if kind == "extra_forbidden":
        known = list(_aliases(owner)) if owner else []
        where = f" in `{_dotted(location[:-1])}`" if location[:-1] else ""
        return (
            f"unknown key `{shown(last)}`{where}",
            "one of " + ", ".join(f"`{one}`" for one in known),
            f"{meant(last, known)} (or remove the line)",
        )
    if kind == "missing":
        description = _aliases(owner).get(last, "") if owner else ""
        where = f" in `{_dotted(location[:-1])}`" if location[:-1] else ""
        return (
            f"`{last}` is missing{where}",
            f"`{last}`: {description}" if description else f"a key `{last}`",
            f"add `{last}: ...`",
        )
    seen = f"`{name}` is {shown(found['input'])}"
    if isinstance(found["input"], str) and kind != "string_type":
        seen += " (text)"
    if kind in _KINDS:
        expected = _KINDS[kind]
    elif kind == "literal_error":
        expected = str(context["expected"]).replace("'", "`")
        options = re.findall(r"`([^`]*)`", expected)
        return seen, expected, meant(str(found["input"]), options)
    else:
        expected = found["msg"].removeprefix("Input should be ").removeprefix("Value should be ")
        expected = expected[:1].lower() + expected[1:]
    return seen, expected, "change it"


def _dotted(location: Iterable[int | str]) -> str:
    text = ""
    for key in location:
        if key != "[key]":
            text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else key
    return text


def _aliases(model: type[BaseModel]) -> dict[str, str]:
    return {one.alias or name: one.description or "" for name, one in model.model_fields.items()}


def _model_at(model: type[BaseModel], location: Iterable[int | str]) -> type[BaseModel] | None:
    """The model class that validates the mapping at ``location`` below ``model``."""
    at: Any = model
    for key in location:
        if isinstance(at, type) and issubclass(at, BaseModel):
            named = {one.alias or name: one.annotation for name, one in at.model_fields.items()}
            if key not in named:
                return None
            at = named[str(key)]
        else:
            inner = [one for one in _unwrapped(at) if one is not Ellipsis]
            if not inner:
                return None
            at = inner[-1]
        at = _plain(at)
    return at if isinstance(at, type) and issubclass(at, BaseModel) else None


def _unwrapped(annotation: Any) -> Iterator[Any]:
    yield from typing.get_args(_plain(annotation))


def _plain(annotation: Any) -> Any:
    """``annotation`` without Annotated and without None."""
    while True:
        origin = typing.get_origin(annotation)
        if origin is typing.Annotated:
            annotation = typing.get_args(annotation)[0]
        elif origin in (typing.Union, types.UnionType):
            annotation = next(one for one in typing.get_args(annotation) if one is not type(None))
        else:
            return annotation
