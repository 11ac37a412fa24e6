"""Other ranks that bring the same adapters into the same slots, as far as loading needs to know."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor

from mora_serve.adapters.validate import ValidatedAdapter

Total = Callable[[Tensor], Tensor]  # numbers [n] of this rank -> their sums over all ranks


class Followers(Protocol):
    """They do what is done inside a context meanwhile, and have done it at its end.

    A context raises where one of them could not, DeviceLost where one is gone. All calls are the
    loading thread's.
    """

    def converting(self, digest: str, adapter: ValidatedAdapter) -> AbstractContextManager[Total]:
        """An adapter is converted inside. Until the next one they hold it; see ``keep``.

        Inside all or none add up numbers, by what the context gives, once at most.
        """
        ...

    def keep(self, digest: str) -> None:
        """Hold what was converted last until it is dropped."""
        ...

    def drop(self, digest: str) -> None:
        """Hold it no longer."""
        ...

    def forget(self, digest: str) -> None:
        """Hold it no longer, nor the scales that DoRA has of it."""
        ...

    def filling(self, slot: int, digest: str) -> AbstractContextManager[None]:
        """What they hold of an adapter is written into a slot."""
        ...


class _Alone:
    """There are no others."""

    def converting(self, digest: str, adapter: ValidatedAdapter) -> AbstractContextManager[Total]:
        return nullcontext(lambda numbers: numbers)

    def keep(self, digest: str) -> None:
        pass

    def drop(self, digest: str) -> None:
        pass

    def forget(self, digest: str) -> None:
        pass

    def filling(self, slot: int, digest: str) -> AbstractContextManager[None]:
        return nullcontext()


ALONE: Followers = _Alone()
