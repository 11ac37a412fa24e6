"""Cross-fitting: every adapter is new once, and the fit has never seen it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router_training.evaluation.cases import FittingData, texts
from router_training.evaluation.held_out import cross_fit, split, without


def test_every_adapter_is_left_out_of_one_fit(method, data, cases):
    """No prompt of it reaches that fit, alone or in a pair; only its examples are registered."""
    fits, cards = [], []

    def watched(part):
        fits.append(part)
        fitted = method(part)

        class Watched:
            def register(self, given):
                cards.append((part, given))
                return fitted.register(given)

        return Watched()

    found = cross_fit(watched, data, cases, (1, 8), folds=3, draws=2)
    left_out = [set(data.examples) - set(part.examples) for part in fits]
    assert sorted(name for names in left_out for name in names) == sorted(data.examples)
    for part, names in zip(fits, left_out, strict=True):
        assert not any(names & set(case.adapters) for case in part.pairs)
    for part, shown in cards:
        assert set(shown) == set(data.examples)
        for name, prompts in shown.items():
            assert len(prompts) == (16 if name in part.examples else len(prompts))
            assert len(prompts) in (1, 8, 16)
            assert set(prompts) <= set(texts(data.examples[name]))
    assert set(found.figures["by_adapter"]) == set(data.examples)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12), st.integers(1, 6), st.integers())
def test_folds_spread_the_adapters_of_a_group(groups, folds, seed):
    """Every adapter is in one fold; of no group has a fold two more than another."""
    own = {f"adapter-{i}": group for i, group in enumerate(groups)}
    found = split(FittingData(dict.fromkeys(own, ()), groups=own), folds, seed)
    assert sorted(name for part in found for name in part) == sorted(own)
    for group in set(groups):
        counts = [sum(own[name] == group for name in part) for part in found]
        assert max(counts) - min(counts) <= 1


def test_more_examples_help(method, data, cases):
    """The means by count are those of its adapters, and 16 examples beat one."""
    found = cross_fit(method, data, cases, (1, 16), folds=3, draws=2)
    by_count = found.figures["by_count"]
    assert by_count["16"]["mean"] == found.figures["top1"]
    assert by_count["16"]["mean"] >= by_count["1"]["mean"]
    for row in by_count.values():
        assert row["lowest_draw"] <= row["mean"] <= row["highest_draw"]
        assert row["least_adapter"] <= row["mean"]
    scored, own = found.joined()
    assert sorted(texts(own)) == sorted(texts(cases))
    assert len(scored.ranking) == len(cases)


def test_data_without_an_adapter_has_nothing_of_it(data):
    """What belongs to nobody stays."""
    part = without(data, ["json"])
    assert "json" not in part.examples
    assert any("json" in case.adapters for case in data.pairs)
    assert not any("json" in case.adapters for case in part.pairs)
    assert (part.near, part.far) == (data.near, data.far)
