"""The library as Python finds it, and its team of threads."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mora_serve.model.memory import Arena
from mora_serve.model.native import library
from mora_serve.model.native.library import Native
from mora_serve.model.native.weight import NativeLinear, tiled
from mora_serve.model.quant import DenseWeight, Linear
from tests.server.conftest import wait_for

Team = Callable[[int], Native]


@pytest.fixture
def fresh() -> Iterator[None]:
    """The library is looked for anew, in the test and after it."""
    library.library.cache_clear()
    yield
    library.library.cache_clear()


def test_structures_are_those_of_c(team: Team) -> None:
    """As large as the compiler makes them."""
    lib = team(1).lib
    assert [lib.mora_layout(i) for i in range(len(library.layout()))] == library.layout()


@pytest.mark.usefixtures("team", "fresh")
def test_a_library_of_other_sources_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It would read past the structures: torch computes, and the log says why."""
    monkeypatch.setattr(library, "PHASES", (*library.PHASES, "one more"))
    with caplog.at_level(logging.WARNING, library.__name__):
        assert library.targets(torch.float32) == []
        assert library.targets(torch.bfloat16) == []
    assert [r.message.count("install mora-serve again") for r in caplog.records] == [1]
    with pytest.raises(ValueError, match="no native path"):
        Native(torch.float32, 1)


def test_unknown_targets_are_refused() -> None:
    """By name."""
    with pytest.raises(ValueError, match="'sse9'"):
        Native(torch.float32, 1, "sse9")


def product(native: Native) -> torch.Tensor:
    """A product in 32 units of work."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2048, 96, generator=generator).to(native.dtype)
    x = torch.randn(5, 96, generator=generator).to(native.dtype)
    linear = NativeLinear(Linear((tiled(DenseWeight(weight), native, Arena()),)))
    y = torch.full((5, 2048), float("nan"))
    native.product(linear.struct, x, y)
    return y


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 9])
def test_many_short_runs_from_several_callers(team: Team, threads: int) -> None:
    """Callers wait for each other, more threads than cores are no harm, nothing gets lost."""
    native, want = team(threads), product(team(1))
    assert native.threads == threads
    wrong: list[tuple[int, int]] = []

    def call(caller: int) -> None:
        wrong.extend((caller, i) for i in range(40) if not torch.equal(product(native), want))

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
        assert not caller.is_alive()
    assert wrong == []


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts threads in /proc")
def test_teams_come_and_go(team: Team) -> None:
    """Their threads end with them."""
    native = team(1)

    def alive() -> int:
        with Path("/proc/self/status").open() as status:
            return next(int(line.split()[1]) for line in status if line.startswith("Threads:"))

    product(native)
    gc.collect()  # teams of other tests
    before = alive()
    for threads in (1, 2, 5, 8, 3):
        one = Native(native.dtype, threads, native.target)
        assert torch.equal(product(one), product(native))
        assert alive() == before + threads - 1
        del one
        wait_for(lambda: alive() == before)  # the system counts a joined thread a moment longer
