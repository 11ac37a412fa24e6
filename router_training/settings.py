"""Settings from a YAML file: frozen dataclasses, where every mistake is named with its remedy."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import types
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from mora_serve.errors import InvalidArgument

Settings = TypeVar("Settings")

_NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def read_settings(file: Path, kind: type[Settings]) -> Settings:
    """The settings of a dataclass from a YAML file that maps its fields to values.

    Raises InvalidArgument for a file that cannot be read, and as ``settings_of`` does.
    """
    return settings_of(read_mapping(file), kind)


def read_mapping(file: Path) -> dict[str, Any]:
    """The keys and values of a YAML file. Raises InvalidArgument for one that has none."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise _wrong(file.name, f"it cannot be read ({e.strerror}); give a YAML file") from e
    except (yaml.YAMLError, ValueError, RecursionError) as e:  # e.g. no such day, too deep
        raise _wrong(file.name, f"it is not YAML ({' '.join(str(e).split())})") from e
    if not isinstance(values, dict):
        raise _wrong(file.name, "it has to map keys to values, as in 'out: ./trained'")
    return values


def settings_of(values: Mapping[str, Any], kind: type[Settings], where: str = "") -> Settings:
    """The settings of a dataclass from a mapping; ``where`` comes before the keys in messages.

    Fields are texts, numbers, true or false, one of a ``Literal``, tuples of texts or of other
    dataclasses (a list in the file, or one alone), or mappings of texts to numbers or texts; what
    is left out keeps its default. Raises InvalidArgument for a key that is not known (the nearest
    one is named), a value of another type, or a missing key that has no default.
    """
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(fields)}"
            raise _wrong(f"{where}{key}", f"this key is not known; {hint}")
    for name, f in fields.items():
        if name not in values and f.default is f.default_factory is dataclasses.MISSING:
            raise _wrong(f"{where}{name}", "it is missing; give it")
    return kind(
        **{key: _value(f"{where}{key}", value, hints[key]) for key, value in values.items()}
    )


def check_bounds(settings: object, bounds: Mapping[str, tuple[float, float]]) -> None:
    """Raise InvalidArgument for a field outside its least and greatest value, or not a number."""
    for name, (low, high) in bounds.items():
        if not low <= getattr(settings, name) <= high:
            value = getattr(settings, name)
            raise _wrong(name, f"{value} is not between {low:g} and {high:g}")


def check_unused(settings: Any, keys: Collection[str], where: str) -> None:
    """Raise InvalidArgument for one of these fields that is not as it is left out."""
    for f in dataclasses.fields(settings):
        if f.name in keys and getattr(settings, f.name) != f.default:
            raise _wrong(f.name, f"{where} does not take it; leave it out")


def _value(key: str, value: Any, hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        if value not in arguments:
            raise _wrong(key, f"{value!r} is not one of {', '.join(map(str, arguments))}")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        *others, last = [a for a in arguments if a is not type(None)]
        for one in others:
            with contextlib.suppress(InvalidArgument):
                return _value(key, value, one)
        return _value(key, value, last)
    if origin is tuple:
        items = value if isinstance(value, list) else [value]
        if dataclasses.is_dataclass(arguments[0]):
            return tuple(_value(f"{key}.{i}", item, arguments[0]) for i, item in enumerate(items))
        if not all(isinstance(item, str) for item in items):
            raise _wrong(key, "it has to be a list of texts")
        return tuple(items)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise _wrong(key, f"{value!r} does not map keys to values")
        return settings_of(value, hint, f"{key}.")
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
            raise _wrong(key, f"{value!r} does not map texts to values")
        return {k: _value(f"{key}.{k}", v, arguments[1]) for k, v in value.items()}
    if hint is float and type(value) in (int, str):
        # YAML 1.1 reads 2e-5, without a point, as a text
        with contextlib.suppress(ValueError):
            return float(value)
    if type(value) is not hint:
        raise _wrong(key, f"{value!r} is not {_NAMES[hint]}")
    return value


def _wrong(key: str, why: str) -> InvalidArgument:
    return InvalidArgument(f"{key}: {why}", field=key)
