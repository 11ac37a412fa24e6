"""Where a mixture is sent."""

from __future__ import annotations

import hashlib
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from mora_serve.cluster.ranking import SLACK, Standing, rank

DIGESTS = [hashlib.sha256(bytes([i])).hexdigest() for i in range(200)]

replicas = st.lists(
    st.tuples(st.integers(0, 30), st.sets(st.sampled_from(DIGESTS[:6])), st.integers(0, 4)),
    min_size=1,
    max_size=6,
).map(lambda rows: [Standing(f"r{i}", q, r, f) for i, (q, r, f) in enumerate(rows)])
mixtures = st.lists(st.sampled_from(DIGESTS[:6]), min_size=1, max_size=3, unique=True)


@given(mixtures, replicas)
def test_every_replica_is_tried_once(wanted: list[str], standings: list[Standing]):
    assert sorted(rank(wanted, standings, 1.25)) == list(range(len(standings)))


@given(mixtures, replicas)
def test_a_loaded_replica_comes_after_all_others(wanted: list[str], standings: list[Standing]):
    limit = 1.25 * sum(r.queue for r in standings) / len(standings) + SLACK
    over = [standings[i].queue > limit for i in rank(wanted, standings, 1.25)]
    assert over == sorted(over)


@given(mixtures, replicas)
def test_the_first_holds_as_many_of_the_adapters_as_any_that_is_not_loaded(
    wanted: list[str], standings: list[Standing]
):
    limit = 1.25 * sum(r.queue for r in standings) / len(standings) + SLACK
    free = [len(set(wanted) & r.resident) for r in standings if r.queue <= limit]
    first = standings[rank(wanted, standings, 1.25)[0]]
    assert len(set(wanted) & first.resident) == max(free)


def test_an_adapter_that_is_nowhere_goes_to_a_free_slot():
    full, free = Standing("r0", 0, DIGESTS[:8]), Standing("r1", 0, DIGESTS[8:10], free=6)
    assert all(rank([d], [full, free], 1.25)[0] == 1 for d in DIGESTS[20:60])


def test_adapters_spread_over_empty_replicas():
    """A tie is broken by a hash; without it all would land on one."""
    standings = [Standing(f"r{i}", 0, ()) for i in range(4)]
    homes = Counter(rank([d], standings, 1.25)[0] for d in DIGESTS)
    assert set(homes) == {0, 1, 2, 3}
    assert max(homes.values()) < 1.5 * len(DIGESTS) / 4


def test_a_new_replica_takes_over_its_share_alone():
    three = [Standing(f"r{i}", 0, ()) for i in range(3)]
    four = [*three, Standing("r3", 0, ())]
    for d in DIGESTS:
        before, after = rank([d], three, 1.25)[0], rank([d], four, 1.25)[0]
        assert after in (before, 3)


def test_nobody_is_asked_where_there_is_nobody():
    assert rank(DIGESTS[:1], [], 1.25) == []
