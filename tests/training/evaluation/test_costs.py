"""Costs: what exactly is timed."""

from __future__ import annotations

from router_training.evaluation.cases import Case, FittingData
from router_training.evaluation.costs import join_ms, timed_fit

DATA = FittingData({"a": [Case("one", ("a",))]})
CARDS = {"a": ["one"], "b": ["two", "three"]}


class Watched:
    """A method that notes what it is given."""

    def __init__(self):
        self.fits, self.registered = [], []

    def __call__(self, data):
        self.fits.append(data)
        return self

    def register(self, cards):
        self.registered.append(dict(cards))
        return f"scorer {len(self.registered)}"


def test_one_fitting_is_timed_up_to_a_router_with_all_adapters():
    """Both are given back."""
    method = Watched()
    fitted, scorer, seconds = timed_fit(method, DATA, CARDS)
    assert (fitted, scorer) == (method, "scorer 1")
    assert (method.fits, method.registered) == ([DATA], [CARDS])
    assert seconds >= 0


def test_one_newcomer_is_registered_at_a_time():
    """With its card's prompts, under a name that no fitting has; nothing is fitted."""
    method = Watched()
    assert join_ms(method, CARDS) > 0
    assert [list(cards.values()) for cards in method.registered] == [[["one"]], [["two", "three"]]]
    assert not any(name in CARDS for cards in method.registered for name in cards)
    assert not method.fits
