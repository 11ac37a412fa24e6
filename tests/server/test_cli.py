"""``mora-serve adapters`` against a real server: what it does with an adapter's card."""

from __future__ import annotations

import pytest

from mora_serve.cli import main


@pytest.fixture
def run(serving, client):
    """Runs a command line as the tenant of ``client``; returns its exit status."""

    def run(*argv: object) -> int:
        where = ("--address", serving.server.address, "--tenant", client._tenant)
        return main(["adapters", *map(str, argv), *where])

    return run


@pytest.fixture(params=["register", "upload"])
def add(request, root):
    """Either way of registering ``rev``, as the first words of a command line."""
    return request.param, "rev", "rev" if request.param == "register" else root / "adapters/rev"


def test_another_card_for_content_that_is_there_is_refused(run, add, client, capsys):
    assert run(*add, "--task", "old") == 0
    before = client.get_adapter("rev")
    capsys.readouterr()
    assert run(*add, "--task", "new") == 1
    shown = capsys.readouterr()
    assert "already" in shown.err
    assert "adapters update" in shown.err
    assert "--replace" in shown.err
    assert shown.out == ""
    assert client.get_adapter("rev") == before


def test_with_replace_the_content_takes_over_the_card(run, add, client):
    assert run(*add, "--task", "old", "--prompt", "one") == 0
    before = client.get_adapter("rev")
    assert run(*add, "--task", "new", "--replace") == 0
    after = client.get_adapter("rev")
    assert (after.card.tasks, after.card.prompts) == (["new"], [])
    assert (after.version, after.digest) == (before.version, before.digest)


def test_the_same_again_is_no_error(run, add, client):
    card = ("--task", "a", "--prompt", "one", "--description", "Reverses.", "--group", "g")
    assert run(*add, *card) == 0
    before = client.get_adapter("rev")
    assert run(*add, *card) == 0
    assert run(*add) == 0
    assert run(*add, "--replace") == 0
    assert client.get_adapter("rev") == before


def test_update_replaces_the_whole_card(run, client, tmp_path, capsys):
    made = client.register_adapter("rev", "rev")
    (tmp_path / "more.txt").write_text("one\n\ntwo\n")
    assert run("update", "rev", "--prompts", tmp_path / "more.txt", "--description", "New.") == 0
    assert "New." in capsys.readouterr().out
    updated = client.get_adapter("rev")
    assert (updated.card.prompts, updated.card.tasks) == (["one", "two"], [])
    assert (updated.version, updated.digest) == (made.version, made.digest)


def test_update_needs_an_adapter(run, capsys):
    assert run("update", "none", "--task", "a") == 1
    assert "not registered" in capsys.readouterr().err
