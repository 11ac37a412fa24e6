"""Prompts for the router from files and cards, and what is said of those that cannot be used."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.errors import InvalidArgument
from router_training.router_data import Labelled
from router_training.sources import (
    enough_to_learn,
    find_adapters,
    from_cards,
    groups_of,
    read_labelled,
)


def adapter(root, name, **card):
    directory = root / name
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text("{}")
    if card:
        (directory / "routing_card.json").write_text(json.dumps(card))
    return directory


@pytest.fixture
def adapters(tmp_path):
    """rev and sum serve a task each, two adapters serve shout, and one has no card."""
    adapter(tmp_path, "rev", tasks=["reverse"], group="op", prompts=["turn it round"])
    adapter(tmp_path, "sum", tasks=["add"], group="op")
    adapter(tmp_path, "loud-1", tasks=["shout"], group="style")
    adapter(tmp_path, "loud-2", tasks=["shout"], group="style")
    adapter(tmp_path, "plain")
    return find_adapters([tmp_path])


def labelled(tmp_path, adapters, *rows, **options):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return read_labelled([file], adapters, **options)


def test_adapters_are_found_one_by_one_and_under_a_root(tmp_path, adapters):
    assert [a.name for a in adapters] == ["loud-1", "loud-2", "plain", "rev", "sum"]
    assert groups_of(adapters)["plain"] == ""
    one = find_adapters([tmp_path / "rev"])
    assert [(a.name, a.card.prompts) for a in one] == [("rev", ("turn it round",))]


def test_places_without_adapters_and_names_given_twice_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidArgument, match=r"adapters: 'empty' holds no adapter_config\.json"):
        find_adapters([tmp_path / "empty"])
    adapter(tmp_path / "a", "same")
    adapter(tmp_path / "b", "same")
    with pytest.raises(InvalidArgument, match="two named 'same'"):
        find_adapters([tmp_path / "a", tmp_path / "b"])


def test_a_bad_card_is_named(tmp_path):
    adapter(tmp_path, "rev", promts=["x"])
    with pytest.raises(InvalidArgument, match=r"the card of 'rev'.*'prompts'"):
        find_adapters([tmp_path])


def test_rows_name_adapters_or_the_tasks_of_their_cards(tmp_path, adapters):
    rows = labelled(
        tmp_path,
        adapters,
        {"prompt": "a", "adapters": ["sum", "rev", "sum"]},
        {"prompt": "b", "tasks": ["reverse"]},
        {"prompt": "c", "tasks": ["add", "reverse"], "note": 1},
        "",
    )
    assert [row.adapters for row in rows] == [("rev", "sum"), ("rev",), ("rev", "sum")]
    assert [row.prompt for row in rows] == ["a", "b", "c"]


def test_exported_feedback_is_read_as_it_is(tmp_path, adapters):
    """The adapters that answered count, for which of two served the task is known then; the
    tasks do where the server knew the adapter by another name."""
    rows = labelled(
        tmp_path,
        adapters,
        {"prompt": "a", "tasks": ["shout"], "adapters": ["loud-2"]},
        {"prompt": "b", "tasks": ["add"], "adapters": ["sum-v7"]},
    )
    assert [row.adapters for row in rows] == [("loud-2",), ("sum",)]


def test_without_adapters_any_name_is_one(tmp_path):
    rows = labelled(tmp_path, [], {"prompt": "a", "adapters": ["whatever"]})
    assert rows == [Labelled("a", ("whatever",))]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2: it is no JSON object with a prompt"),
        ("[]", "line 2: it is no JSON object with a prompt"),
        ({"prompt": " ", "adapters": ["rev"]}, "line 2: it is no JSON object with a prompt"),
        ({"prompt": "a"}, "line 2: it has neither adapters nor tasks"),
        ({"prompt": "a", "adapters": "rev"}, "line 2: adapters have to be a list of names"),
        ({"prompt": "a", "tasks": [3]}, "line 2: tasks have to be a list of names"),
        ({"prompt": "a", "adapters": ["rav"]}, "line 2: the adapter 'rav'.*did you mean 'rev'"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_by_file_and_line(tmp_path, adapters, row, message):
    with pytest.raises(InvalidArgument, match=f"prompts: rows.jsonl, {message}"):
        labelled(tmp_path, adapters, {"prompt": "fine", "adapters": ["rev"]}, row)


@pytest.mark.parametrize(
    ("task", "why"),
    [
        ("revers", "line 1: the task.*did you mean 'reverse'"),
        ("shout", "line 1: the task 'shout' is on the cards of loud-1"),
    ],
)
def test_rows_of_tasks_that_tell_no_adapter_are_left_out_and_counted(tmp_path, adapters, task, why):
    """Exported feedback outlives adapters; without any other row, the first is the error."""
    stale, fine = {"prompt": "a", "tasks": [task]}, {"prompt": "b", "adapters": ["rev"]}
    with pytest.raises(InvalidArgument, match=f"prompts: rows.jsonl, {why}"):
        labelled(tmp_path, adapters, stale)
    lines: list[str] = []
    rows = labelled(tmp_path, adapters, stale, fine, stale, log=lines.append)
    assert [row.prompt for row in rows] == ["b"]
    assert len(lines) == 1
    assert re.match(f"2 rows are left out; the first: prompts: rows.jsonl, {why}", lines[0])


def test_a_file_that_cannot_be_read_is_named_without_its_directory(tmp_path):
    with pytest.raises(InvalidArgument, match=r"missing\.jsonl: it cannot be read") as raised:
        read_labelled([tmp_path / "missing.jsonl"])
    assert str(tmp_path) not in raised.value.message


def carded(root, **groups):
    for name, group in groups.items():
        adapter(root, name, group=group, prompts=[f"{name} the word {i}" for i in range(12)])
    return find_adapters([root])


def test_cards_give_their_prompts_and_pairs_across_groups(tmp_path):
    """Only adapters whose groups say that they may run together are joined."""
    found = from_cards(carded(tmp_path, rev="op", sum="op", loud="style", odd=""))
    alone = [row for row in found if len(row.adapters) == 1]
    assert len(alone) == 4 * 12
    pairs = {frozenset(row.adapters) for row in found if len(row.adapters) == 2}
    assert pairs == {frozenset({"rev", "loud"}), frozenset({"sum", "loud"})}
    prompts = {row.prompt: row.adapters[0] for row in alone}
    for row in found:
        if len(row.adapters) == 2:
            parts = {own for prompt, own in prompts.items() if prompt in row.prompt}
            assert parts >= set(row.adapters)


def test_a_card_with_few_prompts_is_named(tmp_path):
    adapter(tmp_path, "rev", prompts=["a", "b", "b"])
    with pytest.raises(InvalidArgument, match="the card of 'rev' has 2 distinct prompts; give 10"):
        from_cards(find_adapters([tmp_path]))


@given(counts=st.dictionaries(st.sampled_from("abcde"), st.integers(1, 20)))
def test_adapters_with_too_few_prompts_are_left_out_with_all_that_names_them(counts):
    """Whatever is left can be learnt from: nothing left out has 10 prompts, all others do."""
    rows = [Labelled(f"{n}{i}", (n,)) for n, count in counts.items() for i in range(count)]
    rows += [Labelled(f"{a}+{b}", (a, b)) for a in counts for b in counts if a < b]
    kept, few = enough_to_learn(rows)
    assert few == {n: count for n, count in counts.items() if count < 10}
    assert kept == [row for row in rows if not set(row.adapters) & set(few)]
