"""Many replicas on Ray Serve, behind the same API (the extra ``ray``).

    serve run mora_serve.cluster:app server.state=/shared/mora cluster.replicas=2

A gateway speaks gRPC as a single server does, and routes; the replicas run the engine. All of them
share the adapter store, ``server.state``. See deploy/ray/ for a Serve configuration and KubeRay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def app(args: Mapping[str, Any]) -> Any:
    """The application, for ``serve run`` and ``serve deploy``; see ``deploying.build``."""
    from mora_serve.cluster.deploying import build  # imports ray

    return build(args)
