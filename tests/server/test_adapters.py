"""AdapterService against a real server: the life of an adapter."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import threading
import uuid
from pathlib import Path

import pytest

from mora_serve import errors
from mora_serve.server.adapters import MAX_UPLOADS
from mora_serve.v1 import adapters_pb2 as pb
from tests.server.conftest import PROMPTS, running, wait_for, write_adapter


def test_a_registered_adapter_is_described(client):
    made = client.register_adapter("rev", "rev")
    assert client.get_adapter("rev") == made
    assert (made.name, made.version, made.rank, made.routable) == ("rev", 1, 4, True)
    assert list(made.card.prompts) == PROMPTS["rev"]
    assert list(made.card.tasks) == ["do-rev"]
    assert len(made.targets) == 7
    assert len(made.digest) == 64
    assert made.size_bytes > 0
    assert not made.verified
    assert made.register_time.seconds > 1_600_000_000


def test_a_card_given_takes_the_place_of_the_directorys(client):
    made = client.register_adapter("rev", "rev", prompts=["one"], tasks=["a", "b"], group="g")
    want = pb.RoutingCard(prompts=["one"], tasks=["a", "b"], group="g")
    assert made.card == want


def test_the_same_content_again_changes_nothing(client):
    first = client.register_adapter("rev", "rev")
    assert client.register_adapter("rev", "rev", prompts=["other"]) == first


def test_other_content_needs_replace(client):
    first = client.register_adapter("a", "rev")
    with pytest.raises(errors.AlreadyExists, match="set replace"):
        client.register_adapter("a", "sum")
    second = client.register_adapter("a", "sum", replace=True)
    assert (second.version, client.get_adapter("a").digest) == (2, second.digest)
    assert second.digest != first.digest


def test_an_upload_is_what_a_directory_is(client, root):
    """The same files give the same digest, whichever way they come."""
    registered = client.register_adapter("a", "rev")
    uploaded = client.upload_adapter("b", root / "adapters/rev")
    assert uploaded.digest == registered.digest
    assert uploaded.card == registered.card


def test_an_update_replaces_the_card_and_keeps_the_weights(client):
    made = client.register_adapter("rev", "rev")
    updated = client.update_adapter("rev", tasks=["backwards"], description="Reverses.")
    assert updated.card == pb.RoutingCard(tasks=["backwards"], description="Reverses.")
    assert (updated.digest, updated.version, updated.routable) == (made.digest, 1, False)
    assert client.route("x", task="backwards").mixture.adapters[0].adapter == "rev"
    with pytest.raises(errors.NotFound):
        client.route("x", task="do-rev")


def test_an_unregistered_adapter_is_gone(client):
    client.register_adapter("rev", "rev")
    client.unregister_adapter("rev")
    with pytest.raises(errors.NotFound):
        client.get_adapter("rev")
    with pytest.raises(errors.NotFound):
        client.generate("x", adapters={"rev": 1.0})
    assert client.register_adapter("rev", "rev").version == 1


def test_pages_hold_every_adapter_once(client):
    """In the order of their names, without example prompts, whatever the page's size."""
    names = sorted(f"a{i}" for i in range(7))
    for name in reversed(names):
        client.register_adapter(name, "rev")
    for size in (1, 2, 7, 8):
        request, seen = pb.ListAdaptersRequest(page_size=size), []
        while True:
            page = client.adapters.ListAdapters(request, **client.carry({}))
            assert len(page.adapters) <= size
            seen += page.adapters
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token
        assert [a.name for a in seen] == names
    assert all(a.prompt_count == 6 and not a.card.prompts for a in client.list_adapters())


def test_a_pinned_adapter_is_brought_to_the_device_and_kept(client, serving):
    client.register_adapter("rev", "rev")
    assert client.pin_adapter("rev").pinned
    wait_for(lambda: client.get_adapter("rev").resident)
    assert not client.pin_adapter("rev", False).pinned


def test_hits_and_misses_are_counted_by_name(configure):
    with running(configure()) as serving, serving.client() as client:
        client.register_adapter("rev", "rev")

        def count(kind):
            name = f"mora_adapter_{kind}_total"
            return serving.server.metrics.registry.get_sample_value(name, {"adapter": "rev"})

        client.generate("x", adapters={"rev": 1.0}, max_tokens=1)
        wait_for(lambda: client.get_adapter("rev").resident)
        assert (count("misses"), count("hits")) == (1, None)
        client.generate("x", adapters={"rev": 1.0}, max_tokens=1)
        assert (count("misses"), count("hits")) == (1, 1)


def test_a_pin_follows_a_replacement(client, root):
    """The new version is brought to the device; the old one may leave it."""
    client.upload_adapter("p", write_adapter(root / "p1", seed=31))
    client.pin_adapter("p")
    wait_for(lambda: client.get_adapter("p").resident)
    new = client.upload_adapter("p", write_adapter(root / "p2", seed=32), replace=True)
    assert new.pinned
    wait_for(lambda: client.get_adapter("p").resident)
    client.unregister_adapter("p")


def test_too_many_pins_are_refused(client, root):
    """Some slots stay for mixtures: 8 in all, 4 of them."""
    for i in range(5):
        client.upload_adapter(f"p{i}", write_adapter(root / f"pin{i}", seed=40 + i))
    for i in range(4):
        client.pin_adapter(f"p{i}")
    with pytest.raises(errors.ResourceExhausted, match="unpin one") as caught:
        client.pin_adapter("p4")
    assert caught.value.field == "pinned"
    assert not client.get_adapter("p4").pinned
    for i in range(4):
        client.pin_adapter(f"p{i}", False)


def test_registered_adapters_and_pins_survive_a_restart(root, tmp_path, configure):
    config = configure(server={"state": str(tmp_path / "state")})
    with running(config) as serving, serving.client() as client:
        made = client.register_adapter("rev", "rev")
        client.pin_adapter("rev")
        before = client.generate("hello", adapters={"rev": 1.0}, max_tokens=8).text
    with running(config) as serving, serving.client() as client:
        wait_for(lambda: client.get_adapter("rev").resident)
        assert client.get_adapter("rev").digest == made.digest
        assert client.generate("hello", adapters={"rev": 1.0}, max_tokens=8).text == before


def send(client, *messages: pb.UploadAdapterRequest) -> pb.Adapter:
    return client._run(client.adapters.UploadAdapter, iter(messages), {}).adapter


HEADER = pb.UploadAdapterRequest(header=pb.UploadHeader(name="up"))


def chunk(file: str, data: bytes = b"{}") -> pb.UploadAdapterRequest:
    return pb.UploadAdapterRequest(chunk=pb.FileChunk(file=file, data=data))


def test_files_may_come_in_pieces_of_any_size(client, root):
    files = [(f.name, f.read_bytes()) for f in sorted((root / "adapters/rev").iterdir())]
    pieces = [chunk(n, d[i : i + 999]) for n, d in files for i in range(0, len(d), 999)]
    assert len(pieces) > 20
    assert send(client, HEADER, *pieces).digest == client.register_adapter("rev", "rev").digest


@pytest.mark.parametrize(
    ("messages", "remedy"),
    [
        ((), "send it first"),
        ((chunk("adapter_config.json"),), "one header first"),
        ((HEADER, HEADER), "one header first"),
        ((HEADER, pb.UploadAdapterRequest()), "one header first"),
        ((HEADER,), "save_pretrained"),
        ((HEADER, chunk("adapter_config.json")), "adapter_model.safetensors"),
        ((HEADER, chunk("adapter_model.bin")), "not opened"),
        ((HEADER, chunk("../x")), "no part of an adapter"),
        ((HEADER, chunk("routing_card.json", b"x" * (5 << 20))), "more than"),
        ((pb.UploadAdapterRequest(header=pb.UploadHeader(name="Bad/Name")),), "name"),
    ],
    ids=[
        *("nothing", "no header", "two headers", "empty message", "no files", "no weights"),
        *("pickle", "a path", "too large", "bad name"),
    ],
)
def test_an_upload_out_of_order_or_beyond_limits_is_refused(client, messages, remedy):
    with pytest.raises(errors.InvalidArgument, match=remedy):
        send(client, *messages)
    assert client.list_adapters() == []


def test_a_broken_upload_leaves_nothing(client, root):
    """The client that stops in the middle has registered nothing."""
    directory = root / "adapters/rev"

    def part():
        yield HEADER
        yield chunk("adapter_config.json", (directory / "adapter_config.json").read_bytes())
        raise ValueError

    with pytest.raises(errors.MoraError):
        client._run(client.adapters.UploadAdapter, part(), {})
    assert client.list_adapters() == []
    client.upload_adapter("up", directory)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts what is open by /proc")
def test_a_refused_upload_holds_its_files_no_longer_than_its_call(client, root):
    """Without waiting for the collector of garbage: a file may be as large as an adapter."""

    def held():
        found = []
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):  # one that was closed meanwhile
                found.append(os.readlink(link))
        return sum("(deleted)" in name for name in found)

    client.upload_adapter("up", root / "adapters/rev")
    gc.collect()
    gc.disable()
    try:
        before = held()
        for _ in range(20):
            with pytest.raises(errors.AlreadyExists):
                client.upload_adapter("up", root / "adapters/sum")
        wait_for(lambda: held() <= before)
    finally:
        gc.enable()


def test_the_client_says_what_a_directory_lacks(client, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({}))
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(errors.InvalidArgument, match="safe_serialization"):
        client.upload_adapter("x", tmp_path)


def uploading(client, end: threading.Event):
    """The future of an upload that says who it is and then nothing until ``end``."""

    def messages():
        yield HEADER
        end.wait(30)

    return client.adapters.UploadAdapter.future(messages(), **client.carry({}))


def test_uploads_beyond_the_places_are_refused_at_once(serving, client, root):
    """Whoever holds a tenant's places keeps nobody waiting, and gives them back."""
    end = threading.Event()
    silent = [uploading(client, end) for _ in range(MAX_UPLOADS // 2)]  # a tenant's half

    def upload():
        return client.upload_adapter("up", root / "adapters/rev")

    def refused():
        try:
            upload()
        except errors.ResourceExhausted:
            return True
        return False

    wait_for(refused)
    with pytest.raises(errors.ResourceExhausted, match="uploads") as caught:
        upload()
    assert caught.value.retry_after >= 0.1
    with serving.client(f"t{uuid.uuid4().hex}") as other:
        other.upload_adapter("up", root / "adapters/rev")
    for call in silent:
        call.cancel()
    end.set()

    def taken():
        with contextlib.suppress(errors.ResourceExhausted):
            return upload()
        return None

    wait_for(taken)


def test_an_upload_that_falls_silent_is_ended(configure):
    with running(configure(engine={"stall_seconds": 0.2})) as serving, serving.client() as client:
        end = threading.Event()

        def messages():
            yield HEADER
            end.wait(30)

        with pytest.raises(errors.ResourceExhausted, match="nothing came") as caught:
            client._run(client.adapters.UploadAdapter, messages(), {})
        assert caught.value.reason == "STREAM_STALLED"
        end.set()


def test_an_upload_that_trickles_is_ended(configure):
    """Though something comes all the time; so a place in line is not held for ever."""
    with running(configure(engine={"stall_seconds": 2.0})) as serving, serving.client() as client:
        end = threading.Event()

        def messages():
            yield HEADER
            while not end.wait(0.01):
                yield chunk("adapter_model.safetensors", b"x")

        with pytest.raises(errors.ResourceExhausted, match="send it over a faster") as caught:
            client._run(client.adapters.UploadAdapter, messages(), {})
        end.set()
        assert caught.value.reason == "UPLOAD_TOO_SLOW"
        assert caught.value.field == ""
