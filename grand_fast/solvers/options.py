"""Options that are declared once, in a frozen dataclass, and taken whole or by keyword.

`option` is a field that says how its text is read; `gathered` takes the fields out of keywords;
`takes` puts their names into the signature and the docstring of what takes them so.
"""

import difflib
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import field, fields, replace
from typing import Any, TypeVar

T = TypeVar("T")
C = TypeVar("C", bound=type)
_WIDTH = 96  # of a line of a docstring


def option(
    default: Any,
    text: str,
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    above: float | None = None,
    below: float | None = None,
    needs: tuple[str, ...] = (),
    group: str = "",
) -> Any:
    """A field that a command line and a file of options may set.

    Args:
        default: its value.
        text: what `--help` says of it.
        choices: the names that may be given, if only some may; of a `Literal` its own.
        low, above, below: bounds of a number: the least, and those that it must not reach.
        needs: the name of another option, and the values of it with which this one has an effect.
        group: the heading in `--help`.
    """
    bounds = {"low": low, "above": above, "below": below}
    about = {"help": text, "choices": choices, "bounds": bounds, "needs": needs, "group": group}
    return field(default=default, metadata=about)


def names_of(kind: type) -> tuple[str, ...]:
    """The fields of a dataclass."""
    return tuple(f.name for f in fields(kind))


def gathered(
    operator: str, kind: type[T], given: T | None, options: dict[str, Any], **defaults: Any
) -> T:
    """`given`, or one with `defaults`, with those `options` in it that are its fields.

    They are taken out of `options`: what is left there, no dataclass knows.

    Raises:
        TypeError: `given` is something else.
    """
    names = _NAMES.get(kind) or _NAMES.setdefault(kind, frozenset(names_of(kind)))
    own = {name: options.pop(name) for name in list(options) if name in names}
    if given is None:
        return kind(**{**defaults, **own})
    if not isinstance(given, kind):
        name, got = kind.__name__, type(given).__name__
        raise TypeError(f"{operator}: `{name.lower()}` must be {name}(…), got {got}.")
    return replace(given, **own) if own else given  # type: ignore[type-var]


_NAMES: dict[type, frozenset[str]] = {}


def refuse(operator: str, options: Mapping[str, Any], function: Callable[..., Any]) -> None:
    """No keyword is left that `function` does not know.

    Raises:
        TypeError: one is; it names the nearest known.
    """
    for name in options:
        parameters = inspect.signature(function).parameters.values()
        known = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL]
        near = difflib.get_close_matches(name, known, n=1)
        meant = f"Did you mean `{near[0]}`?" if near else f"The options are {', '.join(known)}."
        raise TypeError(f"{operator}: `{name}` is not an option. {meant}")


def takes(*kinds: type, without: tuple[str, ...] = (), **defaults: Any) -> Callable[[T], T]:
    """A function or class that takes the fields of `kinds` by keyword, in `**options`.

    Its signature then lists them, and in its docstring `{Kind}` stands for their names and
    `{Kind.Args}` for what the docstring of `Kind` says of each.

    Args:
        kinds: dataclasses.
        without: fields that it does not take, or has in its own signature.
        defaults: those that differ here.
    """

    def decorate(taker: T) -> T:
        function: Any = taker.__init__ if isinstance(taker, type) else taker  # type: ignore[misc]
        signature = inspect.signature(function)
        parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        own = {p.name for p in parameters} | set(without)
        for kind in kinds:
            parameters += [
                inspect.Parameter(
                    f.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=defaults.get(f.name, f.default),
                    annotation=f.type,
                )
                for f in fields(kind)
                if f.name not in own
            ]
        function.__signature__ = signature.replace(parameters=parameters)
        text = taker.__doc__ or ""
        for kind in kinds:
            listed = ", ".join(name for name in names_of(kind) if name not in own)
            text = _filled(text, f"{{{kind.__name__}.Args}}", _arguments_of(kind))
            text = _filled(text, f"{{{kind.__name__}}}", listed)
        taker.__doc__ = text
        return taker

    return decorate


def _filled(text: str, mark: str, content: str) -> str:
    """`content` in the place of a mark, in lines as far to the right as its own."""
    found = re.search(rf"^( *){re.escape(mark)}(.*)$", text, re.M)
    if found is None:
        return text
    indent, rest = found.groups()
    if "\n" in content:
        lines = textwrap.indent(content, indent)
    else:
        lines = textwrap.fill(
            content + rest, _WIDTH, initial_indent=indent, subsequent_indent=indent + " " * 4
        )
    return text[: found.start()] + lines + text[found.end() :]


def _arguments_of(kind: type) -> str:
    """The entries of `Args:` in a class's docstring."""
    section = re.search(r"^Args:\n(.*?)(?:\n\n|\Z)", inspect.getdoc(kind) or "", re.M | re.S)
    return textwrap.dedent(section[1]).rstrip() if section else ""


def shows(kind: type, holder: str) -> Callable[[C], C]:
    """A class whose attribute `holder` is a `kind`: its fields are attributes too, to read and set.

    To set one puts a new `kind` into `holder`.
    """

    def decorate(cls: C) -> C:
        for name in names_of(kind):
            setattr(cls, name, _field_property(holder, name))
        return cls

    return decorate


def _field_property(holder: str, name: str) -> property:
    def read(self: Any) -> Any:
        return getattr(getattr(self, holder), name)

    def write(self: Any, value: Any) -> None:
        setattr(self, holder, replace(getattr(self, holder), **{name: value}))

    return property(read, write, doc=f"`{name}` of `.{holder}`.")
