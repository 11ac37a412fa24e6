"""The ranks that share a base: sums and joins of tensors by torch.distributed.

nccl between cards, gloo between processes on a CPU. Nothing listens beyond this machine: ranks find
each other by a file, and their connections are of its loopback address.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mora_serve.engine.failures import DeviceLost
from mora_serve.model.shard import spans

LOOPBACK = "127.0.0.1"


class RankGroup:
    """Rank ``rank`` of ``size``, on its device (see model.shard.Group).

    ``path`` is the file by which they find each other; ``seconds`` how long one waits for the
    others. The constructor waits for all. For one thread at a time.

    ``calls`` counts the sums and joins that were begun, those of a graph as one: ranks that raised
    at the same count can go on, as none waits for another.

    A sum or join raises DeviceLost when another rank is gone or does not come.
    """

    def __init__(
        self, rank: int, size: int, device: torch.device, path: Path, seconds: float
    ) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.calls = 0
        timeout = timedelta(seconds=seconds)
        # The backends themselves: torch's default group is one a process, and gloo would listen
        # on whatever address this machine's name stands for.
        store = dist.FileStore(str(path), size)  # type: ignore[attr-defined]
        self._backend: Any
        if device.type == "cuda":
            os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
            options: Any = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._backend = dist.ProcessGroupNCCL(store, rank, size, options)
        else:
            options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._timeout = timeout
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=LOOPBACK)]
            self._backend = dist.ProcessGroupGloo(store, rank, size, options)

    def sum(self, x: Tensor) -> Tensor:
        """See Group.

        Equal rows give equal bits with two ranks; with more the order of a sum is the backend's.
        """
        x = x.contiguous()
        self._run(lambda: self._backend.allreduce([x]))
        return x

    def join(self, x: Tensor, width: int) -> Tensor:
        """See Group."""
        widths = [s.stop - s.start for s in spans(width, self.size)]
        rows, most = len(x), max(widths)
        mine = x.new_zeros(rows, most)
        mine[:, : x.shape[1]] = x
        parts = x.new_empty(self.size * rows, most)
        self._run(lambda: self._backend._allgather_base(parts, mine))
        pieces = parts.view(self.size, rows, most)
        return torch.cat([p[:, :w] for p, w in zip(pieces, widths, strict=True)], dim=1)

    def all_can(self, able: bool) -> bool:
        """See Group."""
        worst = dist.AllreduceOptions()
        worst.reduceOp = dist.ReduceOp(dist.ReduceOp.MAX)
        x = torch.tensor([not able, self.calls + 1], dtype=torch.int64, device=self.device)
        self._run(lambda: self._backend.allreduce([x], worst))
        unable, self.calls = x.tolist()
        return not unable

    def launched(self) -> None:
        """See Group."""
        self.calls += 1

    def abort(self) -> None:
        """End what waits for the others, from another thread."""
        if self.device.type == "cuda":
            self._backend.abort()

    def _run(self, begin: Callable[[], Any]) -> None:
        self.calls += 1
        try:
            begin().wait()
        except RuntimeError as e:
            raise DeviceLost(
                "engine.tensor_parallel: another rank is gone or does not answer"
            ) from e
