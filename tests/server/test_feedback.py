"""Feedback of a real server: what is kept of task hints, who gets it, and what it costs nobody."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from mora_serve import errors
from mora_serve.cli import main
from mora_serve.client import AsyncClient
from mora_serve.config import LEAST_FEEDBACK_BYTES
from mora_serve.core import AdapterWeight, Decision, Mixture, Source
from mora_serve.metrics import Metrics
from mora_serve.router.features import PooledHidden
from mora_serve.router.feedback import FeedbackStore, Position
from mora_serve.router.states import State
from mora_serve.server import feedback
from mora_serve.server import router as router_module
from mora_serve.v1.generation_pb2 import Prompt
from tests.server.conftest import CONTEXT, OUTLASTING, PROMPTS, configuration, running, wait_for
from tests.server.test_app import scrape
from tests.server.test_router import router_file

__all__ = ["router_file"]  # a fixture

ONE = {"max_tokens": 1}
WRITTEN = "mora_feedback_rows_written_total"
DROPPED = "mora_feedback_rows_dropped_total{%s}"


def exported(client, **options):
    return [row for part in client.export_feedback(**options) for row in part.rows]


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def keeping(root, router_file, state):
    """A server that keeps feedback, with a router."""
    config = configuration(root, router={"feedback": True}, server={"state": str(state)})
    with running(config) as serving:
        with serving.client() as client:
            client.load_router(data=router_file)
        yield serving


@pytest.fixture
def client(keeping, request):
    """A client whose tenant has rev and sum."""
    tenant = f"t{abs(hash(request.node.name))}"
    with keeping.client(tenant) as client:
        for name in PROMPTS:
            client.register_adapter(name, name)
        yield client


class TestWhatIsKept:
    def test_a_prompt_with_its_tasks_and_what_answered(self, client, keeping):
        before = datetime.now(UTC)
        prompt = "reverse the word plate"
        got = client.generate(prompt, task=["do-sum", "do-rev", "do-sum"], **ONE)
        (row,) = exported(client)
        assert (row.prompt, row.tasks) == (prompt, ["do-sum", "do-rev"])
        assert list(row.adapters) == [a.adapter for a in got.decision.mixture.adapters]
        alone = client.route(prompt)
        assert alone.source is Source.ROUTER
        assert row.routed_adapters == [a.adapter for a in alone.mixture.adapters] == ["rev"]
        assert row.router_digest == client.get_router().digest
        assert row.base_fingerprint == client.server_info().base.fingerprint
        accepted = row.accept_time.ToDatetime(UTC)
        assert before <= accepted <= datetime.now(UTC)

    def test_a_stream_is_kept_as_an_answer_is(self, client):
        with client.stream("add the numbers 1 and 2", task="do-sum", **ONE) as stream:
            list(stream)
        assert [r.prompt for r in exported(client)] == ["add the numbers 1 and 2"]

    def test_the_text_is_what_the_router_goes_by(self, client, keeping):
        """Of a chat the last user turn; of token ids their text."""
        turns = [("user", "one"), ("assistant", "2"), ("user", "three")]
        client.generate(messages=turns, task="do-rev", **ONE)
        ids = keeping.server._assembly.base.tokenizer.encode("four")
        client.generate(token_ids=ids, task="do-rev", **ONE)
        assert [r.prompt for r in exported(client)] == ["three", "four"]

    def test_where_the_router_abstains_none_is_named(self, client):
        client.generate("xyzzy qqq 0x7f", task="do-rev", **ONE)
        (row,) = exported(client)
        assert (row.adapters, row.routed_adapters) == (["rev"], [])
        assert row.router_digest

    def test_what_the_server_chose_among_a_task_s_adapters_is_no_label(self, client, keeping):
        """Else a router would learn from its own picks."""
        client.update_adapter("sum", tasks=["do-rev"], prompts=PROMPTS["sum"])
        assert client.generate("reverse the word plate", task="do-rev", **ONE).decision.candidates
        (row,) = exported(client)
        assert (row.tasks, row.adapters, row.routed_adapters) == (["do-rev"], [], ["rev"])

    def test_only_task_hints_that_were_accepted(self, client):
        """Not other selections, not Route, not what is refused, nor the router's own choice."""
        for options in ({}, {"base": True}, {"adapters": {"rev": 1.0}}, {"candidates": ["rev"]}):
            client.generate("reverse the word moon", **options, **ONE)
        client.generate("reverse it", task="unknown", fallback_to_router=True, **ONE)
        client.route("reverse the word moon", task="do-rev")
        with pytest.raises(errors.NotFound):
            client.generate("x", task="unknown", **ONE)
        with pytest.raises(errors.InvalidArgument):
            client.generate("x", task="do-rev", max_tokens=10_000)
        with pytest.raises(errors.InvalidArgument):  # by the engine
            client.generate(token_ids=[5] * CONTEXT, task="do-rev", **ONE)
        assert exported(client) == []

    def test_what_is_accepted_is_kept_however_it_ends(self, client):
        stream = client.stream("hello", task="do-rev", **OUTLASTING)
        stream.cancel()
        assert [r.prompt for r in exported(client)] == ["hello"]


class TestExport:
    def test_a_tenant_gets_its_own_rows(self, client, keeping):
        client.generate("mine", task="do-rev", **ONE)
        with keeping.client("stranger") as stranger:
            assert exported(stranger) == []

    def test_it_goes_on_from_a_cursor(self, client):
        client.generate("one", task="do-rev", **ONE)
        (part,) = client.export_feedback()
        (empty,) = client.export_feedback(part.cursor)
        assert (list(empty.rows), empty.cursor) == ([], part.cursor)
        client.generate("two", task="do-rev", **ONE)
        assert [r.prompt for r in exported(client, cursor=part.cursor)] == ["two"]

    def test_it_begins_at_a_time(self, client):
        client.generate("one", task="do-rev", **ONE)
        (first,) = exported(client)
        client.generate("two", task="do-rev", **ONE)
        later = first.accept_time.ToDatetime(UTC) + timedelta(milliseconds=1)
        assert [r.prompt for r in exported(client, since=later)] == ["two"]
        assert len(exported(client, since=first.accept_time.ToDatetime(UTC))) == 2
        assert exported(client, since=later + timedelta(days=1)) == []

    async def test_the_asyncio_client_has_it_too(self, client, keeping):
        client.generate("one", task="do-rev", **ONE)
        address, tenant = keeping.server.address, client._tenant
        async with AsyncClient(address, tenant=tenant, timeout=30) as other:
            parts = [part async for part in other.export_feedback()]
            assert parts == list(client.export_feedback())
            with pytest.raises(errors.InvalidArgument, match="cursor"):
                async for _ in other.export_feedback("none"):
                    pass

    def test_parts_are_made_off_the_event_loop(self, client, monkeypatch):
        threads, made = [], router_module.row_message

        def watched(row):
            threads.append(threading.current_thread().name)
            return made(row)

        monkeypatch.setattr(router_module, "row_message", watched)
        client.generate("one", task="do-rev", **ONE)
        assert [r.prompt for r in exported(client)] == ["one"]
        assert [name.startswith("feedback-read") for name in threads] == [True]

    def test_many_rows_come_in_parts(self, client, keeping):
        """Together they are all rows, in order; any part's cursor goes on from there."""
        client.generate("first", task="do-rev", **ONE)
        assert len(exported(client)) == 1
        prompts = [f"{i} {'long ' * 2000}" for i in range(100)]
        store = keeping.server._assembly.feedback
        (kept,) = store.read(Position(), client._tenant).rows
        store.append([dataclasses.replace(kept, prompt=prompt) for prompt in prompts])
        parts = list(client.export_feedback())
        assert len(parts) > 2
        assert [r.prompt for part in parts for r in part.rows] == ["first", *prompts]
        after = exported(client, cursor=parts[1].cursor)
        assert after == [r for part in parts[2:] for r in part.rows]


def test_it_is_off_by_default(tmp_path, configure):
    """Then nothing is written, and the caller learns how to switch it on."""
    with running(configure(server={"state": str(tmp_path)})) as serving, serving.client() as client:
        client.register_adapter("rev", "rev")
        client.generate("hello", task="do-rev", **ONE)
        with pytest.raises(errors.FailedPrecondition, match=r"set router\.feedback") as caught:
            exported(client)
        assert caught.value.field == "router.feedback"
        assert scrape(serving)[WRITTEN] == 0
    assert not (tmp_path / "feedback").exists()
    assert not any(b"hello" in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())


def test_rows_survive_a_restart(configure, tmp_path):
    """Those too that were accepted right before the end."""
    config = configure(router={"feedback": True}, server={"state": str(tmp_path)})
    for i in range(2):
        with running(config) as serving, serving.client() as client:
            if not i:
                client.register_adapter("rev", "rev")
            client.generate(f"hello {i}", task="do-rev", **ONE)
    with running(config) as serving, serving.client() as client:
        assert [r.prompt for r in exported(client)] == ["hello 0", "hello 1"]


def test_without_a_router_the_first_of_a_task_s_adapters_is_no_label_either(configure):
    with running(configure(router={"feedback": True})) as serving, serving.client() as client:
        for name in PROMPTS:
            client.register_adapter(name, name, tasks=["do"])
        client.generate("hello", task="do", **ONE)
        (row,) = exported(client)
        assert (row.tasks, row.adapters) == (["do"], [])


def test_without_a_state_rows_last_as_long_as_the_server(configure):
    with running(configure(router={"feedback": True})) as serving, serving.client() as client:
        client.register_adapter("rev", "rev")
        client.generate("hello", task="do-rev", **ONE)
        (row,) = exported(client)
        assert (row.prompt, row.router_digest, row.routed_adapters) == ("hello", "", [])


class TestTheDisk:
    """Requests do not notice what the disk does; metrics do."""

    @pytest.fixture
    def own(self, configure, tmp_path):
        """A server whose state the test may spoil, its client, and the directory of the rows."""
        config = configure(router={"feedback": True}, server={"state": str(tmp_path)})
        with running(config) as serving, serving.client() as client:
            client.register_adapter("rev", "rev")
            yield serving, client, tmp_path / "feedback"

    def test_a_disk_that_refuses_costs_rows_and_nothing_else(self, own):
        serving, client, directory = own
        shutil.rmtree(directory)
        for i in range(5):
            assert client.generate(f"lost {i}", task="do-rev", **ONE).tokens
        wait_for(lambda: scrape(serving)[DROPPED % "disk"] == 5)
        directory.mkdir()
        client.generate("kept", task="do-rev", **ONE)
        assert [r.prompt for r in exported(client)] == ["kept"]
        assert scrape(serving)[WRITTEN] == 1

    def test_a_disk_that_hangs_costs_rows_and_nothing_else(self, own, monkeypatch):
        """As it does for a process that waits for another one's write: an export gives what is
        there, and what waits is bounded.
        """
        serving, client, directory = own
        recorder = serving.server._feedback
        client.generate("before", task="do-rev", **ONE)
        assert recorder.flush(20)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            client.generate("hangs", task="do-rev", **ONE)
            wait_for(lambda: not recorder._waiting)
            monkeypatch.setattr(feedback, "QUEUE_BYTES", 5000)
            for i in range(9):
                assert client.generate(f"waits {i}", task="do-rev", **ONE).tokens
            assert len(recorder._waiting) == 4
            assert scrape(serving)[DROPPED % "queue"] == 5
            assert [r.prompt for r in exported(client)] == ["before"]
        finally:
            os.close(descriptor)
        kept = ["before", "hangs", *(f"waits {i}" for i in range(4))]
        assert [r.prompt for r in exported(client)] == kept


class TestCommand:
    """``mora-serve feedback export``."""

    @pytest.fixture
    def run(self, keeping, client):
        def run(*argv: object) -> int:
            where = ("--address", keeping.server.address, "--tenant", client._tenant)
            return main(["feedback", "export", *map(str, argv), *where])

        return run

    def test_rows_are_training_data(self, run, client, tmp_path, capsys):
        """One JSON object a line: prompt, tasks, adapters."""
        client.generate("reverse the word plate", task="do-rev", **ONE)
        client.generate("日本", task=["do-rev", "do-sum"], **ONE)
        file = tmp_path / "rows.jsonl"
        assert run(file) == 0
        assert [json.loads(line) for line in file.read_text().splitlines()] == [
            {"prompt": "reverse the word plate", "tasks": ["do-rev"], "adapters": ["rev"]},
            {"prompt": "日本", "tasks": ["do-rev", "do-sum"], "adapters": ["rev", "sum"]},
        ]
        told = capsys.readouterr()
        assert told.out == ""
        assert "2 rows; for 1 of them the router would have picked" in told.err
        assert list(tmp_path.iterdir()) == [file]

    def test_a_row_without_a_label_has_its_tasks_alone(self, run, client, tmp_path, capsys):
        client.update_adapter("sum", tasks=["do-rev"], prompts=PROMPTS["sum"])
        client.generate("xyzzy qqq 0x7f", task="do-rev", **ONE)
        assert run(tmp_path / "rows.jsonl") == 0
        row = json.loads((tmp_path / "rows.jsonl").read_text())
        assert row == {"prompt": "xyzzy qqq 0x7f", "tasks": ["do-rev"]}
        assert "1 rows; for 0 of them" in capsys.readouterr().err

    def test_it_goes_on_where_it_was(self, run, client, tmp_path, capsys):
        client.generate("one", task="do-rev", **ONE)
        assert run(tmp_path / "a.jsonl", "--json") == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["rows"], told["file"]) == (1, str(tmp_path / "a.jsonl"))
        client.generate("two", task="do-rev", **ONE)
        assert run("-", "--cursor", told["cursor"]) == 0
        (line,) = capsys.readouterr().out.splitlines()
        assert json.loads(line)["prompt"] == "two"
        assert run("-", "--since", "2999-01-01") == 0
        assert capsys.readouterr().out == ""

    def test_a_failure_leaves_the_file_that_was_there(self, run, tmp_path, capsys):
        (tmp_path / "old.jsonl").write_text("old")
        assert run(tmp_path / "old.jsonl", "--cursor", "none") == 1
        assert "cursor: it is none" in capsys.readouterr().err
        assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]

    def test_a_file_that_cannot_be_written_is_explained(self, run, tmp_path, capsys):
        assert run(tmp_path / "none/rows.jsonl") == 2
        assert "cannot be written" in capsys.readouterr().err

    @pytest.mark.parametrize("name", ["", "."])
    def test_a_directory_is_explained(self, run, client, tmp_path, monkeypatch, capsys, name):
        monkeypatch.chdir(tmp_path)
        assert run(name or tmp_path) == 2
        told = capsys.readouterr().err
        assert "cannot be written: Is a directory" in told
        assert "Traceback" not in told
        assert list(tmp_path.iterdir()) == []

    def test_only_its_owner_can_read_the_file(self, run, client, tmp_path):
        """Prompts are in it; also where it takes the place of one that others could read."""
        (file := tmp_path / "rows.jsonl").write_text("old")
        file.chmod(0o644)
        for path in (file, tmp_path / "new.jsonl"):
            assert run(path) == 0
            assert path.stat().st_mode & 0o777 == 0o600

    def test_a_device_is_written_to_and_stays(self, run, client):
        client.generate("one", task="do-rev", **ONE)
        assert run("/dev/null") == 0
        assert not Path("/dev/null").is_file()


def unneeded(texts: Sequence[str]) -> list[None]:
    """States of a router that needs none."""
    return [None] * len(texts)


@pytest.mark.parametrize("error", [errors.Unavailable("engine: it stops"), ValueError("a fault")])
def test_a_router_that_cannot_be_asked_takes_nothing_else_along(error, tmp_path, caplog):
    """The label is kept where the router only has no time; a fault costs that row alone."""
    store, metrics = FeedbackStore(tmp_path, LEAST_FEEDBACK_BYTES), Metrics("test")
    decision = Decision(Mixture((AdapterWeight("rev", 1.0, "d"),)), Source.TASK, (), "r")

    def routed(tenant: str, text: str, state: State | None) -> Decision:
        if text == "bad":
            raise error
        return decision

    recorder = feedback.FeedbackRecorder(
        store, lambda p: p.text, unneeded, routed, lambda *hint: False, "base", metrics
    )
    for text in ("good", "bad", "again"):
        recorder.add("t", ("do",), Prompt(text=text), decision)
    recorder.close()
    rows = {r.prompt: r for r in store.read(Position(), "t").rows}
    assert (rows["good"].routed, rows["again"].router_digest) == (("rev",), "r")
    if isinstance(error, errors.MoraError):
        assert (rows["bad"].adapters, rows["bad"].routed, rows["bad"].router_digest) == (
            ("rev",),
            (),
            "",
        )
    else:
        assert "bad" not in rows
        label = {"reason": "error"}
        dropped = metrics.registry.get_sample_value("mora_feedback_rows_dropped_total", label)
        assert dropped == 1
        assert "a fault" in caplog.text


def test_rows_are_routed_together_and_written_as_soon_as_they_are(tmp_path):
    """Not with the whole queue: a base that runs beside is asked once for many rows."""
    store, metrics = FeedbackStore(tmp_path, LEAST_FEEDBACK_BYTES), Metrics("test")
    decision = Decision(Mixture((AdapterWeight("rev", 1.0, "d"),)), Source.TASK)
    hidden = PooledHidden(1, 2)
    asked: list[int] = []
    written: list[int] = []
    go_on = threading.Event()

    def states(texts: Sequence[str]) -> list[State | None]:
        assert go_on.wait(20)
        asked.append(len(texts))
        written.append(len(store.read(Position(), "t").rows))
        return [State(text, hidden, np.full(2, int(text), np.float32)) for text in texts]

    def routed(tenant: str, text: str, state: State | None) -> Decision:
        assert state is not None
        assert (state.text, state.pooled[0]) == (text, int(text))
        return decision

    recorder = feedback.FeedbackRecorder(
        store, lambda p: p.text, states, routed, lambda *hint: False, "base", metrics
    )
    recorder.add("t", ("do",), Prompt(text="0"), decision)
    wait_for(lambda: not recorder._waiting)
    for i in range(1, 151):
        recorder.add("t", ("do",), Prompt(text=str(i)), decision)
    go_on.set()
    recorder.close()
    assert (asked, written) == ([1, 64, 64, 22], [0, 1, 65, 129])
    rows = store.read(Position(), "t").rows
    assert [(r.prompt, r.routed) for r in rows] == [(str(i), ("rev",)) for i in range(151)]


@pytest.mark.parametrize("error", [errors.Unavailable("it stops"), RuntimeError("it stops")])
def test_rows_are_kept_where_the_base_gives_no_states(error, tmp_path, caplog):
    """Unrouted; and whatever went wrong, the next rows are written, another tenant's too."""
    store, metrics = FeedbackStore(tmp_path, LEAST_FEEDBACK_BYTES), Metrics("test")
    decision = Decision(Mixture((AdapterWeight("rev", 1.0, "d"),)), Source.TASK)

    def states(texts: Sequence[str]) -> list[State | None]:
        raise error

    def routed(tenant: str, text: str, state: State | None) -> Decision:
        raise AssertionError  # it would ask the base for each row

    recorder = feedback.FeedbackRecorder(
        store, lambda p: p.text, states, routed, lambda *hint: False, "base", metrics
    )
    for tenant in ("t", "other"):
        recorder.add(tenant, ("do",), Prompt(text="hello"), decision)
        assert recorder.flush(5.0)
        (row,) = store.read(Position(), tenant).rows
        assert (row.adapters, row.routed, row.router_digest) == (("rev",), (), "")
    recorder.close()
    assert "it stops" in caplog.text
