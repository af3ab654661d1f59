"""How settings are declared and read.

An option is declared once, as a dataclass field made by `option` (or by `limit`, for bounds on outside input). The
parser, the help text, the defaults and the command line that the launcher writes for a child process (`to_argv`) are
derived from it. argparse accepts abbreviated flags, because FastChat's documentation uses them (`--controller`,
`--worker`, `--model-name`).
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import field
from typing import Any, TypeVar

from fastserve.errors import StartupError

ConfigT = TypeVar("ConfigT")
LIMITS = "limits"


_COMMA = re.compile(r"(\\*),")


def comma_list(text: str) -> tuple[str, ...]:
    """Values separated by commas. In a value a comma is written `\\,`, and a backslash before one `\\\\`."""
    parts, at = [""], 0
    for match in _COMMA.finditer(text):
        num_backslashes = len(match[1])
        parts[-1] += text[at : match.start()] + "\\" * (num_backslashes // 2)
        at = match.end()
        if num_backslashes % 2:
            parts[-1] += ","
        else:
            parts.append("")
    parts[-1] += text[at:]
    return tuple(part.strip() for part in parts if part.strip())


def comma_join(values: Iterable[str]) -> str:
    """The text that `comma_list` makes `values` of, if none is empty or has blanks at its ends."""
    escaped = [_COMMA.sub(r"\1\1\\,", value) for value in values]
    for at, value in enumerate(escaped[:-1]):
        escaped[at] += value[len(value.rstrip("\\")) :]
    return ",".join(escaped)


def json_list(text: str) -> tuple[str, ...]:
    value = json.loads(text)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError("expected a JSON list of strings")
    return tuple(value)


def is_json_object(text: str) -> bool:
    """Whether a text of a repeatable option is JSON, which has commas of its own."""
    return text.lstrip().startswith("{")


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] | None = None,
    parse: Callable[[str], Any] | None = None,
    nargs: str | None = None,
    repeatable: bool = False,
    flag: str | None = None,
    alias: str | None = None,
    env: str | None = None,
    added: bool = False,
    minimum: float | None = None,
    maximum: float | None = None,
    group: str | None = None,
) -> Any:
    """Declare one option.

    `parse` converts the flag's text, `flag` overrides the flag's name, `alias` is a second name, `env` names a variable
    for the default.
    `repeatable`: the flag takes one or more texts and may be given several times; all are kept, in order.
    `added`: FastChat has no such flag, so it must not make abbreviations of FastChat's flags ambiguous.
    `minimum`, `maximum`: a value outside is a startup error, as NaN and infinity are for every option.
    `group`: the heading in the help text; the `title` of the declaring class if unset.
    """
    metadata = {
        "help": help, "choices": choices, "parse": parse, "nargs": nargs, "repeatable": repeatable, "flag": flag,
        "alias": alias, "env": env, "added": added, "minimum": minimum, "maximum": maximum, "is_limit": False,
        "group": group,
    }  # fmt: skip
    return field(default=default, metadata=metadata)


def limit(default: Any, help: str, *, minimum: float = 1, maximum: float | None = None, group: str = LIMITS) -> Any:
    """Declare a bound on outside input: a size, number, depth or time. Its name ends in its unit (`_bytes`, `_s`).

    The environment variable `FASTSERVE_<NAME>` sets it too, so services started by the launcher inherit it.
    docs/limits.md lists all limits.
    """
    made = option(default, help, added=True, minimum=minimum, maximum=maximum, group=group)
    return field(default=default, metadata={**made.metadata, "is_limit": True})


def limits_of(config_class: type[Any]) -> list[dataclasses.Field[Any]]:
    """The options of a settings class that were declared with `limit`."""
    return [item for item in dataclasses.fields(config_class) if item.metadata.get("is_limit")]


def env_of(option_field: dataclasses.Field[Any]) -> str | None:
    """Name of the environment variable that gives the option's default, or None."""
    if option_field.metadata.get("is_limit"):
        return "FASTSERVE_" + option_field.name.upper()
    variable: str | None = option_field.metadata.get("env")
    return variable


def flag_of(option_field: dataclasses.Field[Any]) -> str:
    return option_field.metadata["flag"] or "--" + option_field.name.replace("_", "-")


def group_of(config_class: type[Any], name: str) -> str:
    """Heading in the help text for the option `name`: its `group`, else the title of the first declaring class."""
    item = next(item for item in dataclasses.fields(config_class) if item.name == name)
    title = item.metadata["group"] or next(
        cls.__dict__.get("title", "options") for cls in reversed(config_class.__mro__) if name in _annotations(cls)
    )
    renamed: typing.Mapping[str, str] = getattr(config_class, "renamed_groups", {})
    return renamed.get(title, title)


def _annotations(cls: type[Any]) -> typing.Mapping[str, Any]:
    return inspect.get_annotations(cls)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Appends defaults, except where the help text itself describes the unset option."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, ()):
            return action.help
        if isinstance(action.default, tuple):
            default = json.dumps(action.default) if action.type is json_list else ",".join(action.default)
            return f"{action.help} (default: {default.replace('%', '%%')})"
        return super()._get_help_string(action)


def build_parser(
    config_class: type[Any], prog: str, choices: typing.Mapping[str, Sequence[str]] | None = None
) -> argparse.ArgumentParser:
    """`choices`: by field name, choices known only at run time (plug-ins)."""
    description = (config_class.__doc__ or "").strip().split("\n")[0]
    parser = argparse.ArgumentParser(
        prog=prog, usage="%(prog)s [OPTION ...]", description=description, formatter_class=_HelpFormatter
    )
    groups: dict[str, Any] = {}
    hints = typing.get_type_hints(config_class)
    for item in dataclasses.fields(config_class):
        if "help" not in item.metadata:
            continue
        kind = _plain_type(hints[item.name])
        arguments: dict[str, Any] = {"dest": item.name, "default": item.default, "help": item.metadata["help"]}
        if kind is bool:
            arguments["action"] = argparse.BooleanOptionalAction if item.default else "store_true"
        elif item.metadata["repeatable"]:
            arguments |= {"action": "extend", "nargs": "+", "type": str, "default": list(arguments["default"])}
            arguments["metavar"] = _metavar(item.name, kind)
        else:
            arguments["type"] = item.metadata["parse"] or kind
            arguments["choices"] = (choices or {}).get(item.name, item.metadata["choices"])
            arguments["nargs"] = item.metadata["nargs"]
            arguments["metavar"] = None if arguments["choices"] else _metavar(item.name, kind)
        title = group_of(config_class, item.name)
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        alias = item.metadata["alias"]
        groups[title].add_argument(flag_of(item), *([alias] if alias else []), **arguments)
    return parser


def _metavar(name: str, kind: Any) -> str:
    """Placeholder of an option's value in the help text: its unit if the name has one."""
    last = name.rsplit("_", 1)[-1]
    if name.endswith("_per_s"):
        return "NUMBER"
    return {"s": "SECONDS", "bytes": "BYTES"}.get(last) or {int: "N", float: "NUMBER"}.get(kind) or last.upper()


def parse_config(
    config_class: type[ConfigT],
    argv: Sequence[str] | None,
    prog: str,
    environ: typing.Mapping[str, str],
    choices: typing.Mapping[str, Sequence[str]] | None = None,
) -> ConfigT:
    """Settings from `argv` (None: sys.argv), else from the environment, else the defaults.

    Raises StartupError if a value from the environment is invalid; an invalid flag ends the process with argparse's
    message and exit code 2.
    """
    # Values already in the namespace override argparse's defaults and are overridden by flags. They are not made
    # defaults, because the help text shows defaults, and a variable may hold a secret.
    namespace = argparse.Namespace()
    items = dataclasses.fields(typing.cast(Any, config_class))
    for item in items:
        variable = env_of(item)
        if variable and environ.get(variable):
            try:
                value = parse_option(config_class, item.name, environ[variable])
            except ValueError as error:
                raise StartupError(f"The environment variable {variable} cannot be read: {error}.") from error
            # argparse extends a list, and no tuple.
            setattr(namespace, item.name, list(value) if item.metadata["repeatable"] else value)
    words = expand_abbreviations(config_class, sys.argv[1:] if argv is None else argv)
    parser = build_parser(config_class, prog, choices)
    values = vars(parser.parse_args(words, namespace))
    for item in items:
        problem = _range_problem(item, values.get(item.name))
        if problem:
            parser.error(f"argument {flag_of(item)}: {problem}")
    return config_class(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def check_ranges(config_class: type[Any], values: Any) -> None:
    """Raises StartupError if an attribute of `values` is outside the range of the option with the same name.

    For settings that do not come from `parse_config`.
    """
    for item in dataclasses.fields(config_class):
        value = getattr(values, item.name, None)
        problem = _range_problem(item, value)
        if problem:
            raise StartupError(f"{flag_of(item)} {value} is out of range: {problem}.")


def _range_problem(item: dataclasses.Field[Any], value: Any) -> str | None:
    """Why `value` is outside the option's range, or None if it is not."""
    minimum, maximum = item.metadata.get("minimum"), item.metadata.get("maximum")
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is not a finite number"
    if value is not None and minimum is not None and value < minimum:
        return f"{value:g} is less than the minimum of {minimum:g}"
    if value is not None and maximum is not None and value > maximum:
        return f"{value:g} is more than the maximum of {maximum:g}"
    return None


def expand_abbreviations(config_class: type[Any], argv: Sequence[str]) -> list[str]:
    """Expand abbreviations that are unique among the flags not `added`, so that added flags cannot break them."""
    items = dataclasses.fields(config_class)
    flags = {flag_of(item): item.metadata["added"] for item in items}
    flags |= {item.metadata["alias"]: True for item in items if item.metadata["alias"]}
    expanded = []
    for word in argv:
        flag, equals, value = word.partition("=")
        matches = [name for name, added in flags.items() if name.startswith(flag) and not added]
        is_abbreviation = flag.startswith("--") and len(flag) > 2 and flag not in flags
        expanded.append(matches[0] + equals + value if is_abbreviation and len(matches) == 1 else word)
    return expanded


def to_argv(config: Any) -> list[str]:
    """The command line from which `parse_config` makes `config` again; options at their default are left out.

    Secrets in `config` would be visible in it: leave them at their default and pass them by environment.
    """
    argv: list[str] = []
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if "help" not in item.metadata or value == item.default:
            continue
        if isinstance(value, bool):
            argv.append(flag_of(item) if value else "--no-" + flag_of(item).removeprefix("--"))
        elif item.metadata["parse"] is json_list:
            argv += [flag_of(item), json.dumps(list(value))]
        elif isinstance(value, tuple) and (item.metadata["nargs"] or item.metadata["repeatable"]):
            argv += [flag_of(item), *map(str, value)]
        elif isinstance(value, tuple):
            argv += [flag_of(item), comma_join(value)]
        else:
            argv.append(f"{flag_of(item)}={value}")
    return argv


def _plain_type(hint: Any) -> Any:
    """The type without None: `int | None` gives int."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return next(part for part in typing.get_args(hint) if part is not type(None))
    return hint


def same_option(config_class: type[Any], name: str, **changes: Any) -> Any:
    """The option `name` of another settings class, with `changes` to its default, help, added, ..."""
    original = next(item for item in dataclasses.fields(config_class) if item.name == name)
    metadata = {
        **original.metadata,
        "group": group_of(config_class, name),
        **{key: value for key, value in changes.items() if key != "default"},
    }
    return field(default=changes.get("default", original.default), metadata=metadata)


def pass_on(*config_classes: type[Any], names: Sequence[str] = ()) -> Callable[[type[ConfigT]], type[ConfigT]]:
    """Class decorator, applied before `dataclass`: adds all limits and the options `names` of other settings classes,
    for a program that passes them on. An unset limit keeps the default of each process."""

    def limits_group(name: str) -> str:
        owners = [cls for cls in config_classes if any(item.name == name for item in dataclasses.fields(cls))]
        if len(owners) == len(config_classes):
            return f"{LIMITS} of every service"
        return f"{LIMITS} of the {' and the '.join(cls.title for cls in owners)}"

    def add(cls: type[ConfigT]) -> type[ConfigT]:
        present = {name for base in cls.__mro__ for name in _annotations(base)}
        for config_class in config_classes:
            hints = typing.get_type_hints(config_class)
            for item in dataclasses.fields(config_class):
                is_limit = item.metadata.get("is_limit", False)
                if item.name in present or not (is_limit or item.name in names):
                    continue
                present.add(item.name)
                # Not a limit of this program, and child processes inherit the environment anyway.
                changes = {"default": None, "is_limit": False, "group": limits_group(item.name)} if is_limit else {}
                cls.__annotations__[item.name] = hints[item.name]
                setattr(cls, item.name, same_option(config_class, item.name, added=True, **changes))
        return cls

    return add


def is_comma_list(config_class: type[Any], name: str) -> bool:
    """Whether the option's text outside a command line is a list separated by commas."""
    item = next(item for item in dataclasses.fields(config_class) if item.name == name)
    return bool(item.metadata["repeatable"]) or item.metadata["parse"] is comma_list


def parse_option(config_class: type[Any], name: str, text: str) -> Any:
    """Parse one option's value outside a command line. Raises ValueError with the reason if it is invalid."""
    item = next(item for item in dataclasses.fields(config_class) if item.name == name)
    kind = _plain_type(typing.get_type_hints(config_class)[name])
    if kind is bool:
        if text.lower() not in ("", "true", "false"):
            raise ValueError(f"{text!r} is neither true nor false")
        return text.lower() != "false"
    if item.metadata["repeatable"]:
        return (text,) if is_json_object(text) else comma_list(text)
    try:
        value = (item.metadata["parse"] or kind)(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a valid {kind.__name__}") from None
    choices = item.metadata["choices"]
    if choices is not None and value not in choices:
        raise ValueError(f"{text!r} is not one of {', '.join(map(str, choices))}")
    problem = _range_problem(item, value)
    if problem:
        raise ValueError(problem)
    return value
