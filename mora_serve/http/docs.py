"""The API as one page: made here of its OpenAPI description, without scripts or other files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from typing import Any

_STYLE = """\
:root{color-scheme:light dark;font:16px/1.5 system-ui,sans-serif}
body{max-width:60rem;margin:2rem auto;padding:0 1rem}
code,pre{font-family:ui-monospace,monospace;font-size:.9em}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;vertical-align:top;padding:.3rem .6rem;border-bottom:1px solid #8884}
"""


def page(spec: dict[str, Any]) -> str:
    """The page of an OpenAPI description."""
    info = spec["info"]
    title = escape(f"{info['title']} {info['version']}")
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
        f"<meta name=viewport content='width=device-width'><style>{_STYLE}</style>"
        f"<h1>{title}</h1><p>{_prose(info.get('description', ''))}</p>"
        "<p>The whole description: <a href=openapi.json>openapi.json</a>.</p>"
        f"{''.join(_operations(spec))}<h2>Objects</h2>{''.join(_schemas(spec))}"
    )


def _operations(spec: dict[str, Any]) -> Iterator[str]:
    for path, methods in spec["paths"].items():
        for method, operation in methods.items():
            yield f"<h2><code>{method.upper()} {escape(path)}</code></h2>"
            yield f"<p>{_prose(operation.get('summary', ''))}</p>"
            content = operation.get("requestBody", {}).get("content", {})
            for kind, body in content.items():
                name = body["schema"].get("$ref", "").rpartition("/")[2]
                link = f"<a href='#{escape(name)}'>{escape(name)}</a>"
                yield f"<p>Body: <code>{escape(kind)}</code>, {link}</p>"


def _schemas(spec: dict[str, Any]) -> Iterator[str]:
    for name, schema in spec.get("components", {}).get("schemas", {}).items():
        if not schema.get("properties"):
            continue
        yield f"<h3 id='{escape(name)}'><code>{escape(name)}</code></h3>"
        yield f"<p>{_prose(schema.get('description', ''))}</p>"
        yield "<table><tr><th>field<th>type<th>meaning</tr>"
        required = schema.get("required", ())
        for field, detail in schema["properties"].items():
            mark = " (required)" if field in required else ""
            yield (
                f"<tr><td><code>{escape(field)}</code>{mark}<td>{_type(detail)}"
                f"<td>{_prose(detail.get('description', ''))}</tr>"
            )
        yield "</table>"


def _type(detail: dict[str, Any]) -> str:
    if ref := detail.get("$ref"):
        name = escape(ref.rpartition("/")[2])
        return f"<a href='#{name}'>{name}</a>"
    if options := detail.get("anyOf") or detail.get("oneOf"):
        return " or ".join(_type(option) for option in options)
    if "const" in detail:
        return f"<code>{escape(json.dumps(detail['const']))}</code>"
    if detail.get("type") == "array":
        return f"list of {_type(detail.get('items', {}))}"
    return escape(str(detail.get("type", "any")))


def _prose(text: str) -> str:
    """Text in which backquotes mark code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(parts))
