"""What callers give, checked: the names of keyword arguments, and values against a message."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, get_args, get_type_hints

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from mora_serve.adapters.untrusted import quoted
from mora_serve.errors import InvalidArgument

P = ParamSpec("P")
T = TypeVar("T")
M = TypeVar("M", bound=Message)

# C++ type of a field -> what to give
_WANTED = {
    FieldDescriptor.CPPTYPE_UINT32: "positive whole number below 2^32",
    FieldDescriptor.CPPTYPE_UINT64: "positive whole number below 2^64",
    FieldDescriptor.CPPTYPE_FLOAT: "number",
    FieldDescriptor.CPPTYPE_BOOL: "truth value",
    FieldDescriptor.CPPTYPE_STRING: "text",
    FieldDescriptor.CPPTYPE_MESSAGE: "datetime",  # the only one that is given as a value
}


def strict(method: Callable[P, T]) -> Callable[P, T]:
    """``method``, its ``**options`` held to the TypedDict that they are annotated with.

    The method raises TypeError for another name, and says which known one is nearest.
    """
    (options,) = get_args(get_type_hints(method)["options"])
    own = [p for p in inspect.signature(method).parameters if p not in ("self", "options")]
    known = [*own, *options.__annotations__]

    @functools.wraps(method)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        for name in kwargs:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
                raise TypeError(
                    f"{method.__name__}() got an unexpected keyword argument {name!r}; {hint}"
                )
        return method(*args, **kwargs)

    return checked


def invalid(field: str, value: object, remedy: str) -> InvalidArgument:
    """The error for a value that its field cannot hold."""
    return InvalidArgument(f"{field}: {quoted(value)} cannot be sent; give {remedy}", field=field)


def filled(kind: type[M], at: str, **values: Any) -> M:
    """A message with these values; a text is one value where a list is meant, None is unset.

    Raises InvalidArgument for a value that its field cannot hold; ``at`` is where the message
    stands in the request.
    """
    message = kind()
    for name, value in values.items():
        field = kind.DESCRIPTOR.fields_by_name[name]
        given = [value] if field.is_repeated and isinstance(value, str) else value
        try:
            message.MergeFrom(kind(**{name: given}))
        except (TypeError, ValueError):
            path = f"{at}.{name}" if at else name
            wanted = _WANTED[field.cpp_type]
            remedy = f"a list, each a {wanted}" if field.is_repeated else f"a {wanted}"
            raise invalid(path, value, remedy) from None
    return message
