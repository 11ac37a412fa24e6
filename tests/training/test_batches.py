"""How many batches are drawn at a time."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from router_training.batches import BUCKETS, COPIES, bucketed, distinct_buckets


@given(st.integers(1, 5000), st.integers(1, 500))
def test_no_row_is_drawn_often_among_batches_that_are_sorted_together(distinct, rows):
    """As many batches as that allows, one at least; rounds are a whole number of draws."""
    buckets = distinct_buckets(distinct, rows)
    assert BUCKETS % buckets == 0
    assert buckets == 1 or buckets * rows <= COPIES * distinct
    assert buckets == BUCKETS or 2 * buckets * rows > COPIES * distinct


def test_a_batch_of_few_rows_is_not_one_row_over_and_over():
    """Ten rows of ten lengths, in batches of eight."""
    rng = random.Random(0)

    def mean(buckets):
        batches = bucketed(lambda: rng.randrange(10), int, 8, rng, buckets)
        return sum(len(set(next(batches))) for _ in range(160)) / 160

    assert mean(BUCKETS) < 2
    assert mean(distinct_buckets(10, 8)) > 2.5
