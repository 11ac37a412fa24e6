"""Files of an upload: caps hold while they arrive."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.adapters.files import CARD, CONFIG, WEIGHTS
from mora_serve.config import AdaptersConfig
from mora_serve.errors import InvalidArgument
from mora_serve.server.upload import Upload

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


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("empty", [True, False])
def test_both_files_are_needed(missing, empty):
    with Upload(dataclasses.replace(LIMITS)) as upload:
        upload.write(CONFIG if missing == WEIGHTS else WEIGHTS, b"{}")
        if empty:
            upload.write(missing, b"")
        with pytest.raises(InvalidArgument, match=missing):
            upload.files()
