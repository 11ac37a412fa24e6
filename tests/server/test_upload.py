"""Files of an upload: caps hold while they arrive."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.adapters.files import CARD, CONFIG, WEIGHTS
from mora_serve.config import AdaptersConfig
from mora_serve.errors import InvalidArgument, ResourceExhausted
from mora_serve.server.upload import Upload, steadily
from mora_serve.v1 import adapters_pb2 as pb

LIMITS = AdaptersConfig(max_bytes=100)


@given(st.binary(min_size=1, max_size=100), st.binary(min_size=1), st.integers(1, 9))
def test_files_arrive_whole_however_they_are_cut(weights, config, size):
    with Upload(LIMITS) as upload:
        for name, data in ((WEIGHTS, weights), (CONFIG, config)):
            for i in range(0, len(data), size):
                upload.write(name, data[i : i + size])
        got_config, got_weights, card = upload.files()
        assert (got_config, got_weights[:], card) == (config, weights, None)


def test_a_card_is_optional():
    with Upload(LIMITS) as upload:
        for name in (CONFIG, WEIGHTS, CARD):
            upload.write(name, b"{}")
        assert upload.files()[2] == b"{}"


def test_a_file_is_refused_when_it_grows_too_large():
    """At the chunk that goes beyond the limit, before that is written."""
    with Upload(LIMITS) as upload:
        upload.write(WEIGHTS, b"x" * 60)
        with pytest.raises(InvalidArgument, match="101 bytes are more than the 100"):
            upload.write(WEIGHTS, b"x" * 41)
        upload.write(WEIGHTS, b"x" * 40)


@pytest.mark.parametrize(
    "name", ["adapter_model.bin", "../adapter_config.json", "/etc/passwd", "", "README.md"]
)
def test_other_files_are_refused(name):
    with Upload(LIMITS) as upload, pytest.raises(InvalidArgument):
        upload.write(name, b"")


def test_a_refused_chunk_is_named_as_in_the_request():
    with Upload(LIMITS) as upload:
        for name, data in (("x", b""), ("a.bin", b""), (WEIGHTS, b"x" * 101)):
            with pytest.raises(InvalidArgument, match=r"^chunk\.file: ") as caught:
                upload.write(name, data)
            assert caught.value.field == "chunk.file"


def test_chunks_of_a_file_come_in_a_row():
    with Upload(LIMITS) as upload:
        upload.write(CONFIG, b"a")
        upload.write(WEIGHTS, b"b")
        with pytest.raises(InvalidArgument, match="in a row"):
            upload.write(CONFIG, b"c")


@pytest.mark.parametrize("before", [b"", b"x"])
def test_a_chunk_without_data_is_refused(before):
    """Any number of them would make no file larger, and so meet no limit."""
    with Upload(LIMITS) as upload:
        if before:
            upload.write(WEIGHTS, before)
        with pytest.raises(InvalidArgument, match=r"^chunk\.data: it is empty; send") as caught:
            upload.write(WEIGHTS, b"")
        assert (caught.value.field, caught.value.reason) == ("chunk.data", "EMPTY_CHUNK")


async def arrived(
    monkeypatch: pytest.MonkeyPatch, seconds: float, size: int, count: int, work: float = 0
) -> int:
    """How many chunks of ``size`` get through that come every so many ``seconds`` of a clock."""
    clock, got = 100.0, 0
    monkeypatch.setattr("mora_serve.server.upload.time.monotonic", lambda: clock)

    async def messages() -> AsyncIterator[pb.UploadAdapterRequest]:
        nonlocal clock
        for _ in range(count):
            clock += seconds
            yield pb.UploadAdapterRequest(chunk=pb.FileChunk(file=WEIGHTS, data=b"x" * size))

    with contextlib.suppress(ResourceExhausted):
        async for _ in steadily(messages(), 60.0, 1000):
            got += 1
            clock += work
    return got


async def test_an_upload_has_to_bring_so_many_bytes_a_second_in_the_mean(monkeypatch):
    """A byte every 59 s would hold a place for as long as the largest adapter has bytes."""
    assert await arrived(monkeypatch, seconds=59, size=1, count=1000) == 3
    assert await arrived(monkeypatch, seconds=1, size=500, count=1000) == 240
    assert await arrived(monkeypatch, seconds=1, size=1000, count=1000) == 1000
    assert await arrived(monkeypatch, seconds=59, size=59_000, count=1000) == 1000


async def test_an_upload_is_not_blamed_for_the_time_that_the_server_takes(monkeypatch):
    assert await arrived(monkeypatch, seconds=0.1, size=100, count=1000, work=30) == 1000


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
def test_both_files_are_needed(missing):
    with Upload(dataclasses.replace(LIMITS)) as upload:
        upload.write(CONFIG if missing == WEIGHTS else WEIGHTS, b"{}")
        with pytest.raises(InvalidArgument, match=missing):
            upload.files()
