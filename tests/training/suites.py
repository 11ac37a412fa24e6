"""Smaller suites for tests."""

from __future__ import annotations

from dataclasses import replace


def among(suite, names):
    """Without the prompts of any other adapter; prompts of no adapter stay."""

    def own(cases):
        return [case for case in cases if set(case.adapters) <= set(names)]

    kinds = ("trained_templates", "kept_templates", "reworded", "new_words", "three_way")
    return replace(
        suite,
        **{kind: own(getattr(suite, kind)) for kind in kinds},
        pairs=suite.pairs.each(own),
        pairs_kept=suite.pairs_kept.each(own),
    )
