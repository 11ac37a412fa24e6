"""What a bundle is measured on: labelled prompts by kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from mora_serve.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt, the adapters that it is for (none: it is nobody's), and its right answer.

    ``answer`` is empty where only the routing is measured.
    """

    prompt: str
    adapters: tuple[str, ...] = ()
    answer: str = ""


Change = Callable[[Sequence[Case]], Sequence[Case]]


@dataclass(frozen=True)
class PairCases:
    """Prompts for several adapters at once: of combinations trained together, and of others."""

    trained: Sequence[Case] = ()
    held_out: Sequence[Case] = ()

    def both(self) -> list[Case]:
        """All of them."""
        return [*self.trained, *self.held_out]

    def each(self, change: Change) -> PairCases:
        """Both parts changed in one way."""
        return PairCases(change(self.trained), change(self.held_out))


@dataclass(frozen=True)
class FittingData:
    """What routers are fitted on again, to be measured with adapters that the fit has not seen.

    ``examples``: prompts by adapter, the first of which are its card's. ``pairs``: prompts for
    two adapters. ``near`` and ``far``: prompts of no adapter, in the adapters' wording or not.
    ``groups`` are the adapters', by name.
    """

    examples: Mapping[str, Sequence[Case]]
    pairs: Sequence[Case] = ()
    near: Sequence[str] = ()
    far: Sequence[str] = ()
    groups: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Suite:
    """Prompts that no fitting has seen; a part that is empty is not measured.

    ``trained_templates``: new operands in templates of the training. ``kept_templates``: in
    templates that were kept out of it. ``reworded``: new sentences, at least half of whose content
    words are known; ``new_words``: other new sentences. ``pairs`` and ``pairs_kept``: prompts for
    two adapters, in trained and in kept templates. ``three_way``: prompts for three. ``near`` and
    ``far``: prompts of no adapter. ``prompts`` is how many there are a task or pair, ``seed`` what
    they were drawn with. ``fitting`` is what routers are fitted on again.
    """

    prompts: int
    seed: int
    trained_templates: Sequence[Case]
    kept_templates: Sequence[Case]
    reworded: Sequence[Case] = ()
    new_words: Sequence[Case] = ()
    pairs: PairCases = PairCases()
    pairs_kept: PairCases = PairCases()
    three_way: Sequence[Case] = ()
    near: Sequence[Case] = ()
    far: Sequence[Case] = ()
    fitting: FittingData = field(default_factory=lambda: FittingData({}))

    def fewer(self, count: int) -> Suite:
        """With at most ``count`` prompts a task and pair, for methods that take long.

        Of prompts of no adapter as many times ``count`` are left as there are of ``prompts``.
        """

        def some(cases: Sequence[Case]) -> Sequence[Case]:
            return fewer(cases, count)

        nobody = -(-count * max(len(self.near), len(self.far)) // max(1, self.prompts))
        return replace(
            self,
            prompts=min(count, self.prompts),
            trained_templates=some(self.trained_templates),
            kept_templates=some(self.kept_templates),
            reworded=some(self.reworded),
            new_words=some(self.new_words),
            pairs=self.pairs.each(some),
            pairs_kept=self.pairs_kept.each(some),
            three_way=some(self.three_way),
            near=self.near[:nobody],
            far=self.far[:nobody],
        )


def fewer(cases: Sequence[Case], count: int) -> list[Case]:
    """At most ``count`` cases of each set of adapters, the first ones."""
    kept = {i for at in by_adapter(cases).values() for i in at[:count]}
    return [case for i, case in enumerate(cases) if i in kept]


def by_adapter(cases: Sequence[Case]) -> dict[tuple[str, ...], list[int]]:
    """Positions of the cases of each set of adapters, in the order of their first."""
    out: dict[tuple[str, ...], list[int]] = {}
    for i, case in enumerate(cases):
        out.setdefault(case.adapters, []).append(i)
    return out


def texts(cases: Sequence[Case]) -> list[str]:
    """Their prompts."""
    return [case.prompt for case in cases]


def check_adapters(cases: Sequence[Case], names: Sequence[str]) -> None:
    """Raise InvalidArgument for a case of an adapter that is not among ``names``."""
    for case in cases:
        for name in case.adapters:
            if name not in names:
                raise InvalidArgument(
                    f"cases: {name!r} is not an adapter of this bundle; it has {', '.join(names)}",
                    field="cases.adapters",
                )
