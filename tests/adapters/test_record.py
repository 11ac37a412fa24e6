"""The registry's state: what a change leads to, and what it leaves as it was."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from mora_serve.adapters.card import RoutingCard
from mora_serve.adapters.record import AdapterRecord, Change, Key, RouterRecord, State

keys = st.tuples(st.sampled_from(("t", "u")), st.sampled_from("abcd"))
tasks = st.lists(st.sampled_from(("do", "undo", "redo")), max_size=3).map(tuple)


def record(key: Key, done: tuple[str, ...] = (), version: int = 1) -> AdapterRecord:
    tenant, name = key
    return AdapterRecord(
        tenant, name, version, "ab" * 32, 4, False, False, ("q_proj",), 1, 10, 0.0, False,
        RoutingCard(tasks=done, prompts=("x",)),
    )  # fmt: skip


@st.composite
def histories(draw: st.DrawFn) -> list[Change]:
    """Registrations, replacements, removals and routers, each of which can follow the last."""
    present: dict[Key, AdapterRecord] = {}
    changes = []
    for revision in range(1, draw(st.integers(0, 12)) + 1):
        key, before = draw(keys), None
        before = present.get(key)
        kind = draw(st.sampled_from(("put", "put", "remove", "router")))
        if kind == "router":
            router = RouterRecord(draw(st.text("0f", min_size=1, max_size=2)), ("r",))
            changes.append(Change(revision, router=router))
        elif kind == "put":
            present[key] = record(key, draw(tasks), revision)
            changes.append(Change(revision, before, present[key]))
        else:
            changes.append(Change(revision, present.pop(key, None)))
    return changes


@given(histories())
def test_a_state_reached_step_by_step_is_the_one_made_at_once(changes: list[Change]) -> None:
    """With the same indexes in the same order; the states before it stay as they were."""
    states = [State()]
    for change in changes:
        states.append(states[-1].after(change))
    for state in states:
        whole = State.of(state.revision, reversed(state.adapters.values()), state.router)
        assert state == whole
        for by_name in state.by_tenant.values():
            assert list(by_name) == sorted(by_name)
    assert states[0] == State()


@given(histories())
def test_a_state_comes_back_from_its_snapshot_and_from_its_log(changes: list[Change]) -> None:
    state = replayed = State()
    for change in changes:
        state = state.after(change)
        logged = json.loads(json.dumps(change.to_json()))
        if logged != {"remove": None}:  # the log has no such change
            replayed = replayed.after(replayed.change_from_json(replayed.revision + 1, logged))
    assert replayed.by_task == state.by_task
    assert State.from_json(state.revision, json.loads(json.dumps(state.to_json()))) == state


@given(histories(), histories())
def test_what_differs_between_two_states_leads_from_one_to_the_other(first, second) -> None:
    """As for a reader that finds a snapshot instead of the changes that it missed."""
    before = later = State()
    for change in first:
        before = before.after(change)
    for change in second:
        later = later.after(change)
    reached = before
    for change in before.changes_to(later):
        reached = reached.after(change)
    assert (reached.adapters, reached.by_tenant) == (later.adapters, later.by_tenant)
    assert reached.by_task == later.by_task
