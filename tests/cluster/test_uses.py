"""What is used most lately."""

from __future__ import annotations

from mora_serve.cluster.uses import HALVED_AFTER, Uses


def test_the_most_used_come_first():
    uses = Uses()
    for digest, count in (("a", 2), ("b", 5), ("c", 1)):
        for _ in range(count):
            uses.add([digest])
    assert uses.most(2) == ["b", "a"]


def test_what_is_used_no_longer_is_forgotten():
    uses = Uses()
    for _ in range(HALVED_AFTER):
        uses.add(["old"])
    for _ in range(20 * HALVED_AFTER):
        uses.add(["new"])
    assert uses.most(2) == ["new"]
