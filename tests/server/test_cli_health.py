"""``mora-serve health``, with which containers and Kubernetes ask a server how it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trustme

from mora_serve.cli import main
from mora_serve.demo.process import free_port
from tests.server.conftest import Running, configuration, running


def test_a_server_that_serves_is_healthy(serving: Running, capsys: pytest.CaptureFixture[str]):
    assert main(["health", "--address", serving.server.address]) == 0
    assert capsys.readouterr().out == "serving\n"
    assert main(["health", "--json", "--address", serving.server.address]) == 0
    assert json.loads(capsys.readouterr().out) == {"status": "SERVING"}


def test_one_that_has_begun_to_stop_is_not(root: Path, capsys: pytest.CaptureFixture[str]):
    with running(configuration(root)) as serving:
        serving.loop.call_soon_threadsafe(serving.server._health.end)
        assert main(["health", "--timeout", "0.5", "--address", serving.server.address]) == 1
    assert "not ready after 0.5 seconds" in capsys.readouterr().err


def test_where_nobody_listens_nothing_is_healthy(capsys: pytest.CaptureFixture[str]):
    assert main(["health", "--timeout", "0.5", "--address", f"127.0.0.1:{free_port()}"]) == 1
    assert "not ready" in capsys.readouterr().err


def test_it_needs_no_key(root: Path, tmp_path: Path):
    file = tmp_path / "access.toml"
    keys = ["key", "new", "--id", "a", "--tenant", "acme", "--role", "generate"]
    assert main([*keys, "--file", str(file)]) == 0
    with running(configuration(root, access={"file": str(file)})) as serving:
        assert main(["health", "--address", serving.server.address]) == 0
        assert main(["info", "--address", serving.server.address]) == 1


def test_a_certificate_for_the_services_name_does_on_loopback(root: Path, tmp_path: Path):
    """As in a pod, whose certificate names the Service."""
    authority = trustme.CA()
    made = authority.issue_cert("mora-serve.models.svc")
    cert, key, ca = (tmp_path / name for name in ("tls.crt", "tls.key", "ca.crt"))
    cert.write_bytes(b"".join(p.bytes() for p in made.cert_chain_pems))
    made.private_key_pem.write_to_path(key)
    authority.cert_pem.write_to_path(ca)
    config = configuration(root, server={"tls_cert": str(cert), "tls_key": str(key)})
    with running(config) as serving:
        ask = ["health", "--timeout", "3", "--address", serving.server.address, "--tls-ca", str(ca)]
        assert main([*ask, "--tls-name", "mora-serve.models.svc"]) == 0
        assert main(["health", "--timeout", "1", *ask[3:]]) == 1
        assert main(["health", "--timeout", "1", *ask[3:], "--tls-name", "other.svc"]) == 1
