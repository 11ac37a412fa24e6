"""Where a router's training prompts come from: files of labelled ones, or the adapters' cards."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mora_serve.adapters import card
from mora_serve.adapters.card import RoutingCard
from mora_serve.adapters.untrusted import check_name
from mora_serve.config import AdaptersConfig
from mora_serve.errors import InvalidArgument
from router_training.router_data import MIN_PROMPTS, Labelled, joined
from router_training.router_study import JOINED
from router_training.rows import read_objects

ADAPTER_FILE = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class CardedAdapter:
    """A PEFT directory, named after its last part, and its card, empty where it has none."""

    name: str
    directory: Path
    card: RoutingCard


def find_adapters(places: Sequence[Path]) -> list[CardedAdapter]:
    """The adapters of some directories: each is one itself, or holds some.

    Raises InvalidArgument for a place without any, for two of one name, or for a bad card.
    """
    found: dict[str, CardedAdapter] = {}
    for place in places:
        own = [place] if (place / ADAPTER_FILE).is_file() else _children(place)
        if not own:
            raise _wrong(
                "adapters",
                f"{place.name!r} holds no {ADAPTER_FILE}, nor does a directory in it; give PEFT "
                "directories, or one that holds them",
            )
        for directory in own:
            name = check_name(directory.resolve().name, "adapters")
            if name in found:
                raise _wrong("adapters", f"there are two named {name!r}; rename one")
            found[name] = CardedAdapter(name, directory, _card(name, directory))
    return [found[name] for name in sorted(found)]


def _children(place: Path) -> list[Path]:
    return sorted(file.parent for file in place.glob(f"*/{ADAPTER_FILE}"))


def _card(name: str, directory: Path) -> RoutingCard:
    file = directory / card.FILE
    if not file.exists():
        return RoutingCard()
    try:
        return card.parse_card(file.read_bytes(), AdaptersConfig())
    except OSError as e:
        raise _wrong("adapters", f"the card of {name!r} cannot be read ({e.strerror})") from e
    except InvalidArgument as e:
        raise _wrong("adapters", f"the card of {name!r}: {e.message}") from e


def groups_of(adapters: Sequence[CardedAdapter]) -> dict[str, str]:
    """By name, the group that each card gives."""
    return {adapter.name: adapter.card.group for adapter in adapters}


def read_labelled(
    files: Sequence[Path],
    adapters: Sequence[CardedAdapter] = (),
    log: Callable[[str], None] = lambda line: None,
) -> list[Labelled]:
    """Prompts with the adapters that are right for them, from JSONL files.

    A line is ``{"prompt": "...", "adapters": ["..."]}``, or has ``tasks``, which the cards of
    ``adapters`` turn into adapters; with both, as the server exports its feedback, the adapters
    count where all of them are known. Other keys are left alone. Without ``adapters`` every name
    is taken. Lines whose task no adapter serves any more, or several do, are left out, and
    ``log`` gets their number.

    Raises InvalidArgument, naming file and line, for what is no such line or an unknown adapter,
    or where every line is left out.
    """
    labels = _Labels.of(adapters)
    found: list[Labelled] = []
    left_out: list[InvalidArgument] = []
    for file in files:
        for where, prompt, values in _rows(file):
            try:
                found.append(Labelled(prompt, labels.adapters(values, where)))
            except _NoLabel as e:
                left_out.append(e.why)
    if left_out and not found:
        raise left_out[0]
    if left_out:
        log(f"{len(left_out)} rows are left out; the first: {left_out[0].message}")
    return found


class _NoLabel(Exception):
    """A task that cannot be turned into an adapter."""

    def __init__(self, why: InvalidArgument) -> None:
        super().__init__(why.message)
        self.why = why


def _rows(file: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for where, values in read_objects(file, "prompts"):
        prompt = None if values is None else values.get("prompt")
        if values is None or not isinstance(prompt, str) or not prompt.strip():
            raise _wrong(
                "prompts",
                f"{where}: it is no JSON object with a prompt; give "
                '{"prompt": "...", "adapters": ["..."]}',
            )
        yield where, prompt, values


@dataclass(frozen=True)
class _Labels:
    """How a row's names become adapters; no ``names``: any will do."""

    names: frozenset[str]
    tasks: Mapping[str, Sequence[str]]

    @classmethod
    def of(cls, adapters: Sequence[CardedAdapter]) -> _Labels:
        tasks: dict[str, list[str]] = {}
        for adapter in adapters:
            for task in adapter.card.tasks:
                tasks.setdefault(task, []).append(adapter.name)
        return cls(frozenset(adapter.name for adapter in adapters), tasks)

    def adapters(self, values: Mapping[str, Any], where: str) -> tuple[str, ...]:
        names, tasks = (_texts(values, key, where) for key in ("adapters", "tasks"))
        unknown = [name for name in names if self.names and name not in self.names]
        if names and not unknown:
            return tuple(sorted(set(names)))
        if not tasks:
            if unknown:
                raise _unknown("adapter", unknown[0], self.names, where)
            raise _wrong(
                "prompts", f"{where}: it has neither adapters nor tasks; give one of the two"
            )
        return tuple(sorted({self._serving(task, where) for task in tasks}))

    def _serving(self, task: str, where: str) -> str:
        serving = self.tasks.get(task, ())
        if not serving:
            raise _NoLabel(_unknown("task", task, self.tasks, where))
        if len(serving) > 1:
            raise _NoLabel(
                _wrong(
                    "prompts",
                    f"{where}: the task {task!r} is on the cards of {', '.join(serving)}; give "
                    "the row's adapters",
                )
            )
        return serving[0]


def _texts(values: Mapping[str, Any], key: str, where: str) -> list[str]:
    texts = values.get(key) or []
    if not isinstance(texts, list) or not all(isinstance(t, str) and t for t in texts):
        raise _wrong("prompts", f'{where}: {key} have to be a list of names; give ["name"]')
    return texts


def _unknown(kind: str, name: str, known: Collection[str], where: str) -> InvalidArgument:
    near = difflib.get_close_matches(name, known, 1)
    some = sorted(known)[:8]
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(some) or 'none'}"
    return _wrong("prompts", f"{where}: the {kind} {name!r} is on no card of the adapters; {hint}")


def from_cards(adapters: Sequence[CardedAdapter], seed: int = 0) -> list[Labelled]:
    """The prompts on cards, and prompts for two adapters made by joining these.

    Two are joined where their cards give different groups: these say that the adapters do not
    exclude each other. Raises InvalidArgument for a card with too few prompts to learn from.
    """
    singles = {adapter.name: sorted(set(adapter.card.prompts)) for adapter in adapters}
    for name, prompts in singles.items():
        if len(prompts) < MIN_PROMPTS:
            raise _wrong(
                "adapters",
                f"the card of {name!r} has {len(prompts)} distinct prompts; give {MIN_PROMPTS} or "
                "more, or leave the adapter out: it can be registered later",
            )
    groups = groups_of(adapters)
    grouped = {name: prompts for name, prompts in singles.items() if groups[name]}
    labelled = [Labelled(p, (name,)) for name, prompts in singles.items() for p in prompts]
    return labelled + joined(grouped, groups, JOINED, seed)


def enough_to_learn(labelled: Sequence[Labelled]) -> tuple[list[Labelled], dict[str, int]]:
    """The prompts without adapters that have too few of their own, and how many these have.

    Such an adapter is better registered with the router later than learnt from.
    """
    own: dict[str, set[str]] = {name: set() for row in labelled for name in row.adapters}
    for row in labelled:
        if len(row.adapters) == 1:
            own[row.adapters[0]].add(row.prompt)
    few = {name: len(p) for name, p in sorted(own.items()) if len(p) < MIN_PROMPTS}
    return [row for row in labelled if few.keys().isdisjoint(row.adapters)], few


def _wrong(key: str, why: str) -> InvalidArgument:
    return InvalidArgument(f"{key}: {why}", field=key)
