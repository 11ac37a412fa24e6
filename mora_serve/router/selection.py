"""From what a caller asks for to the mixture that runs: names, weights, versions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from mora_serve.adapters.record import AdapterRecord
from mora_serve.adapters.registry import Registry
from mora_serve.config import Config
from mora_serve.core import AdapterWeight, Candidate, Decision, Mixture, Source
from mora_serve.errors import FailedPrecondition, InvalidArgument, NotFound
from mora_serve.router.decide import REPORTED
from mora_serve.router.routing import Routing
from mora_serve.router.states import Asked, State

MAX_WEIGHT = 3.4028234663852886e38  # the largest 32-bit float


@dataclass(frozen=True, slots=True)
class TaskHint:
    """One adapter for each task; where several are registered for one, the router ranks them.

    Without a router the first by name runs. ``fallback_to_router``: where a task is unknown,
    the router picks among all adapters.
    """

    tasks: tuple[str, ...]
    fallback_to_router: bool = False


@dataclass(frozen=True, slots=True)
class AutoRoute:
    """The router picks: by ``text`` if given, among ``candidates`` if given.

    ``max_adapters`` 0 takes the server's default.
    """

    text: str = ""
    candidates: tuple[str, ...] = ()
    max_adapters: int = 0


@dataclass(frozen=True, slots=True)
class BaseOnly:
    """The base without adapters."""


Selection = TaskHint | Mixture | AutoRoute | BaseOnly


class Selector:
    """Decides which mixture runs. Any thread may call it.

    It takes about a millisecond. With a router on hidden states ``decide`` waits for a step of the
    engine where it is not given the state that ``ask`` asked for.
    """

    def __init__(self, registry: Registry, routing: Routing, config: Config) -> None:
        self._registry = registry
        self._routing = routing
        self._max_mixture = config.adapters.max_mixture
        self._max_routed = min(config.router.max_adapters, config.adapters.max_mixture)

    @property
    def asks_the_base(self) -> bool:
        """Whether the router in use needs the base's state of a prompt."""
        return self._routing.hidden is not None

    def ask(self, tenant: str, selection: Selection, text: str) -> Asked | None:
        """Ask the base for the state that ``decide`` needs of a prompt; None where it needs none.

        Raises what ``Routing.ask`` raises, and, before the base is asked, what ``decide`` raises
        for a selection that nothing can be decided for.
        """
        if isinstance(selection, AutoRoute):
            self._check_auto(tenant, selection)
            return self._routing.ask(selection.text or text, tenant)
        if not isinstance(selection, TaskHint):
            return None
        self._check_tasks(selection.tasks)
        try:
            ranked = self.ranks(tenant, selection.tasks)
        except NotFound:
            ranked = selection.fallback_to_router
        return self._routing.ask(text, tenant) if ranked else None

    def ranks(self, tenant: str, tasks: Iterable[str]) -> bool:
        """Whether one of the tasks has several adapters, so that a hint is not all that decides.

        Raises NotFound for a task that the tenant does not have.
        """
        return any(len(self._registry.by_task(tenant, task)) > 1 for task in tasks)

    def decide(
        self, tenant: str, selection: Selection, text: str, state: State | None = None
    ) -> Decision:
        """The decision for a prompt whose text to route by is ``text``; all weights have digests.

        An empty mixture is the base. AutoRoute abstains where no adapter fits, and where no
        router is loaded: the decision then has no router digest. ``state`` is what ``ask`` gave.

        Raises InvalidArgument for a weight that is not a finite 32-bit number, an adapter named
        twice, no task, or more adapters than ``adapters.max_mixture``; NotFound, with the nearest
        names, for an adapter, version or task that the tenant does not have; FailedPrecondition
        for an adapter of another base; and what ``Routing.route`` raises.
        """
        if isinstance(selection, Mixture):
            return self._explicit(tenant, selection)
        if isinstance(selection, TaskHint):
            return self._by_task(tenant, selection, text, state)
        if isinstance(selection, AutoRoute):
            return self._routed(tenant, selection, text, state)
        return Decision(Mixture(), Source.BASE)

    def _explicit(self, tenant: str, mixture: Mixture) -> Decision:
        self._check_count(len(mixture.adapters), "mixture.adapters")
        seen: set[str] = set()
        resolved = []
        for i, a in enumerate(mixture.adapters):
            field = f"mixture.adapters[{i}]"
            if a.adapter in seen:
                raise InvalidArgument(
                    f"{field}.adapter: {a.adapter!r} is named twice; add its weights up",
                    field=f"{field}.adapter",
                )
            if not (math.isfinite(a.weight) and abs(a.weight) <= MAX_WEIGHT):
                raise InvalidArgument(
                    f"{field}.weight: {a.weight} is not a finite 32-bit number; "
                    "give one, such as 1.0",
                    field=f"{field}.weight",
                )
            seen.add(a.adapter)
            record = self._get(tenant, a.adapter, f"{field}.adapter", a.digest, f"{field}.digest")
            resolved.append(AdapterWeight(record.name, a.weight, record.digest))
        whole = Mixture(tuple(resolved))
        for _, weight in whole.merged():  # names may share a content, whose weights add up
            if not abs(weight) <= MAX_WEIGHT:
                raise InvalidArgument(
                    f"mixture.adapters: the weights of one content add up to {weight}, more than "
                    "a 32-bit float holds; lower them",
                    field="mixture.adapters",
                )
        return Decision(whole, Source.EXPLICIT if resolved else Source.BASE)

    def _by_task(self, tenant: str, hint: TaskHint, text: str, state: State | None) -> Decision:
        tasks = self._check_tasks(hint.tasks)
        chosen: list[AdapterRecord] = []
        candidates: set[Candidate] = set()
        digest = ""
        for i, task in enumerate(tasks):
            try:
                records = {r.name: r for r in self._registry.by_task(tenant, task)}
            except NotFound as e:
                if hint.fallback_to_router:
                    return self._routed(tenant, AutoRoute(), text, state)
                raise e.at(f"task.tasks[{i}]") from None
            names = list(records)
            if len(names) > 1:
                routed = self._routing.route(tenant, text, names, 1, state)
                ranked = [c for c in routed.choice.candidates if c.adapter in records]
                candidates |= set(ranked)
                digest = routed.router_digest
                names = [c.adapter for c in ranked] or names
            chosen.append(records[names[0]])
        best = sorted(candidates, key=lambda c: (-c.score, c.adapter))[:REPORTED]
        return Decision(_at_weight_one(chosen), Source.TASK, tuple(best), digest)

    def _routed(self, tenant: str, auto: AutoRoute, text: str, state: State | None) -> Decision:
        most = self._check_auto(tenant, auto)
        names = frozenset(auto.candidates) or None
        choice, digest = self._routing.route(tenant, auto.text or text, names, most, state)
        # The index masks by tenant and by name; the registry has the last word on both.
        present = {c.adapter: self._present(tenant, c.adapter, names) for c in choice.candidates}
        chosen = [record for name in choice.adapters if (record := present[name]) is not None]
        source = Source.ROUTER if chosen else Source.ABSTAINED
        candidates = tuple(c for c in choice.candidates if present[c.adapter] is not None)
        return Decision(_at_weight_one(chosen), source, candidates, digest)

    def _check_tasks(self, named: Iterable[str]) -> tuple[str, ...]:
        """The tasks of a hint, each once."""
        tasks = tuple(dict.fromkeys(named))
        if not tasks:
            raise InvalidArgument("task.tasks: it is empty; name a task", field="task.tasks")
        self._check_count(len(tasks), "task.tasks")
        return tasks

    def _check_auto(self, tenant: str, auto: AutoRoute) -> int:
        """The most adapters that the router may pick."""
        most = auto.max_adapters or self._max_routed
        if not 1 <= most <= self._max_mixture:
            raise InvalidArgument(
                f"auto.max_adapters: {most} is not between 0, the server's default, and "
                f"adapters.max_mixture ({self._max_mixture})",
                field="auto.max_adapters",
            )
        for i, name in enumerate(auto.candidates):
            self._get(tenant, name, f"auto.candidates[{i}]")
        return most

    def _get(
        self, tenant: str, name: str, field: str, digest: str = "", digest_field: str = ""
    ) -> AdapterRecord:
        try:
            return self._registry.get(tenant, name, digest)
        except (NotFound, FailedPrecondition) as e:
            raise e.at(digest_field if e.field == "digest" else field) from None

    def _present(
        self, tenant: str, name: str, names: frozenset[str] | None
    ) -> AdapterRecord | None:
        if names is not None and name not in names:
            return None
        try:
            return self._registry.get(tenant, name)
        except (NotFound, FailedPrecondition):  # it went while the router looked
            return None

    def _check_count(self, count: int, field: str) -> None:
        if count > self._max_mixture:
            raise InvalidArgument(
                f"{field}: {count} are more than adapters.max_mixture "
                f"({self._max_mixture}); name fewer",
                field=field,
            )


def _at_weight_one(records: Iterable[AdapterRecord]) -> Mixture:
    """Each adapter once."""
    distinct = {r.name: r for r in records}.values()
    return Mixture(tuple(AdapterWeight(r.name, 1.0, r.digest) for r in distinct))
