"""The intake over gRPC: stated sums, damaged contents, a disk that is full."""

from __future__ import annotations

import errno
import hashlib
import os

import grpc
import pytest

from mora_serve import errors
from mora_serve.client import requests
from mora_serve.v1 import adapters_pb2 as pb
from tests.server.conftest import configuration, running


def summed(directory) -> str:
    digest = hashlib.sha256()
    for name in requests.UPLOAD_FILES:
        if (directory / name).is_file():
            digest.update((directory / name).read_bytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def strict(root, tmp_path_factory):
    """A client of a server that requires sums, and the server's state."""
    state = tmp_path_factory.mktemp("state")
    sections = {"adapters": {"require_sha256": True}, "server": {"state": str(state)}}
    with running(configuration(root, **sections)) as server, server.client() as client:
        yield client, state


def test_an_adapter_without_its_sum_is_refused_where_one_is_required(strict, root):
    client, _ = strict
    with pytest.raises(errors.InvalidArgument, match=r"^sha256: it is missing") as e:
        client.register_adapter("rev", "rev")
    assert (e.value.field, e.value.reason) == ("sha256", "SHA256_REQUIRED")
    header = pb.UploadAdapterRequest(header=pb.UploadHeader(name="rev"))
    with pytest.raises(grpc.RpcError, match=r"header\.sha256: it is missing"):
        client.adapters.UploadAdapter(iter([header]))


def test_an_adapter_with_another_sum_is_refused(strict, root):
    client, _ = strict
    stated = summed(root / "adapters/sum")
    with pytest.raises(errors.InvalidArgument, match="do not have the SHA-256") as e:
        client.register_adapter("rev", "rev", sha256=stated)
    assert (e.value.field, e.value.reason) == ("sha256", "SHA256_MISMATCH")
    messages = list(requests.upload("rev", root / "adapters/rev", False, {}))
    messages[0].header.sha256 = stated
    with pytest.raises(grpc.RpcError, match=r"header\.sha256: the files do not have"):
        client.adapters.UploadAdapter(iter(messages))
    assert client.list_adapters() == []


def test_a_client_states_the_sum_of_what_it_uploads(strict, root):
    """And a registration is given it, as sha256sum prints it."""
    client, _ = strict
    uploaded = client.upload_adapter("up", root / "adapters/rev")
    stated = summed(root / "adapters/rev")
    assert client.register_adapter("down", "rev", sha256=stated).digest == uploaded.digest
    for name in ("up", "down"):
        client.unregister_adapter(name)


def test_a_full_disk_refuses_registrations_and_lets_adapters_be_removed(strict, root, monkeypatch):
    """The error is typed and names the remedy; afterwards all is as before."""
    client, state = strict
    client.upload_adapter("kept", root / "adapters/sum")
    link = os.link

    def full(source, to, **options):
        if "/log/" in str(to) and list(state.glob("reserve-*")):
            raise OSError(errno.ENOSPC, "No space left on device")
        link(source, to, **options)

    with monkeypatch.context() as m:
        m.setattr(os, "link", full)
        with pytest.raises(errors.ResourceExhausted, match="the disk is full") as e:
            client.upload_adapter("new", root / "adapters/rev")
        assert e.value.reason == "DISK_FULL"
        assert [a.name for a in client.list_adapters()] == ["kept"]
        assert client.generate("x", adapters={"kept": 1.0}, max_tokens=1).tokens
        client.unregister_adapter("kept")
    assert client.list_adapters() == []
    client.upload_adapter("new", root / "adapters/rev")
    client.unregister_adapter("new")


def test_a_server_starts_without_what_is_damaged_and_takes_it_again(configure, root, tmp_path):
    """Asked for it, it says so; the router passes it over; an upload of the same repairs it."""
    config = configure(server={"state": str(tmp_path)})
    with running(config) as server, server.client() as client:
        hurt = client.upload_adapter("hurt", root / "adapters/rev")
        client.upload_adapter("kept", root / "adapters/sum")
    weights = tmp_path / "blobs" / hurt.digest / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with running(config) as server, server.client() as client:
        listed = {a.name: a.routable for a in client.list_adapters()}
        assert listed == {"hurt": False, "kept": True}
        with pytest.raises(errors.FailedPrecondition, match="is damaged") as e:
            client.generate("x", adapters={"hurt": 1.0}, max_tokens=1)
        assert e.value.reason == "ADAPTER_DAMAGED"
        assert client.generate("x", adapters={"kept": 1.0}, max_tokens=1).tokens
        again = client.upload_adapter("hurt", root / "adapters/rev")
        assert (again.version, again.routable) == (1, True)
        assert client.generate("x", adapters={"hurt": 1.0}, max_tokens=1).tokens
