"""The console: a page in the browser that shows what the server does and lets one try it.

Its files are static and carry no data; what they show they ask for with the key of whoever looks.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

from starlette.responses import Response

from mora_serve.errors import MoraError
from mora_serve.http import errors
from mora_serve.router.arrays import Floats
from mora_serve.router.key_map import KeyMap

_KINDS = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
# Nothing from elsewhere, nothing inline, and in nobody's frame.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


@cache
def _files() -> dict[str, tuple[bytes, str]]:
    folder = resources.files("mora_serve.http") / "static"
    return {
        file.name: (file.read_bytes(), _KINDS[file.name.rpartition(".")[2]])
        for file in folder.iterdir()
        if file.name.rpartition(".")[2] in _KINDS
    }


def file(name: str) -> Response:
    """One of the console's files. Raises NotFound for another name."""
    found = _files().get(name)
    if found is None:
        error: MoraError = errors.no_such_path()
        raise error
    data, kind = found
    return Response(data, media_type=kind, headers=_HEADERS)


def map_object(drawn: KeyMap | None) -> dict[str, Any]:
    """A map of keys as JSON; without a router an empty one."""
    if drawn is None:
        return {"adapters": [], "share": 0.0, "text": None}
    return {
        "adapters": [
            {"name": name, "point": _rounded(point), "prototypes": [_rounded(p) for p in own]}
            for name, point, own in zip(drawn.names, drawn.points, drawn.prototypes, strict=True)
        ],
        "share": round(drawn.share, 4),
        "text": None if drawn.text is None else _rounded(drawn.text),
    }


def _rounded(point: Floats) -> list[float]:
    return [round(float(value), 4) for value in point]
