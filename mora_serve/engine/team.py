"""Tensor parallelism on one machine: this process is rank 0, and a worker process each other rank.

Rank 0 has the scheduler, the sampler and the callers. It tells the workers what each step computes;
what they compute meets in sums and joins (see model/shard.py), so that no step needs an answer.

Nothing waits for ever. A worker that ends, or that raises where rank 0 does not, is a part of the
device that is gone: the engine fails, and with it the server. Where every rank raised at the same
place, the step alone has failed. Workers end with this process, however it does: the pipe of their
orders breaks.
"""

from __future__ import annotations

import logging
import pickle
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import TypeVar

from mora_serve.config import Config
from mora_serve.engine import orders
from mora_serve.engine.failures import DeviceLost
from mora_serve.engine.group import RankGroup
from mora_serve.engine.team_loads import TeamLoads
from mora_serve.engine.worker_process import WorkerProcess, hang_up, start
from mora_serve.errors import ConfigError
from mora_serve.model.decoder import Decoder
from mora_serve.model.files import read_config, resolve
from mora_serve.model.loading import Base, Progress, load_base, rank_device, storage_of
from mora_serve.model.pooling import States, pool_states
from mora_serve.model.shard import Shard

log = logging.getLogger(__name__)

R = TypeVar("R")

HELLO_SECONDS = 120.0  # for a worker's imports
LOAD_SECONDS = 1800.0  # for a worker to load its part of the base after rank 0 has
SERVE_SECONDS = 1800.0  # for its slots and pages, and to compile and time kernels the first time
SETTLE_SECONDS = 5.0  # between an exception on one rank and the same on all others
END_SECONDS = 2.0  # for a worker to end by itself
LEAST_SECONDS = 60.0  # that ranks wait for each other; a step's time is the watchdog's matter
LONGEST_SECONDS = 1800.0  # where engine.step_seconds is 0


def load_ranks(config: Config, progress: Progress | None = None) -> tuple[Base, Team | None]:
    """The base, and the team that has the rest of it; None where this process has all of it.

    Raises ConfigError as ``load_base`` does, and when a worker cannot start.
    """
    if config.engine.tensor_parallel == 1:
        return load_base(config.base, progress), None
    team = Team(config)
    try:
        return team.load(progress), team
    except BaseException:
        team.close()
        raise


class Team:
    """The ranks that share a base, from rank 0.

    ``group`` are they as rank 0's decoder needs them, ``followers`` as its adapters do. Steps and
    states are told by one thread at a time.

    Raises ConfigError where the base or the machine does not suit so many ranks.
    """

    def __init__(self, config: Config) -> None:
        self.settle_seconds = SETTLE_SECONDS
        self._config = config
        ranks = config.engine.tensor_parallel
        device = rank_device(config.base.device, 0, ranks)
        directory = resolve(config.base.model, config.base.revision)
        hf, shape = read_config(directory)
        quantised = storage_of(config.base.quantization, hf) == "nf4"
        Shard.of(shape, 0, ranks, quantised=quantised)
        base = replace(config.base, model=str(directory))
        seconds = max(LEAST_SECONDS, config.engine.step_seconds or LONGEST_SECONDS)
        self._news = threading.Condition()
        self._refused: ConfigError | None = None
        self._lost: DeviceLost | None = None
        self._failed: Callable[[], object] | None = None
        self._closing = False
        self._folder = Path(tempfile.mkdtemp(prefix="mora-serve-"))
        self._workers: list[WorkerProcess] = []
        self._group: RankGroup | None = None
        log.info("starting %d more ranks", ranks - 1)
        try:
            self._workers += [start(rank) for rank in range(1, ranks)]
            self.followers = TeamLoads({w.rank: w.loads for w in self._workers}, self._lose)
            threading.Thread(target=self._listen, name="ranks", daemon=True).start()
            self._answers(orders.Hello, HELLO_SECONDS)
            path = self._folder / "ranks"
            for w in self._workers:
                w.orders.send(
                    orders.Begin(
                        replace(config, base=base),
                        w.rank,
                        ranks,
                        str(rank_device(config.base.device, w.rank, ranks)),
                        str(path),
                        seconds,
                        log.getEffectiveLevel(),
                    )
                )
            self._group = self._join(lambda: RankGroup(0, ranks, device, path, seconds))
        except BaseException:
            self.close()
            raise

    @property
    def group(self) -> RankGroup:
        """See the class."""
        assert self._group is not None  # noqa: S101 - made in the constructor
        return self._group

    def load(self, progress: Progress | None = None) -> Base:
        """Load rank 0's part of the base, and wait for the others to have loaded theirs."""

        def check(done: int, total: int) -> None:
            self._check()
            if progress is not None:
                progress(done, total)

        base = load_base(self._config.base, check, self.group)
        mine = orders.Loaded(base.fingerprint, str(base.decoder.dtype))
        for answer in self._answers(orders.Loaded, LOAD_SECONDS):
            if answer != mine:
                raise ConfigError(
                    "base.model: ranks of engine.tensor_parallel have loaded different models; "
                    "its files have changed meanwhile: start again",
                    field="base.model",
                )
        return base

    def serve(self, order: orders.Serve) -> None:
        """Have every worker make slots, key/value pages and forward like rank 0's."""
        self.tell(order)
        self._answers(orders.Serving, SERVE_SECONDS)

    def watch(self, failed: Callable[[], object]) -> None:
        """Call ``failed``, once and on any thread, when a rank is gone."""
        with self._news:
            self._failed = failed
            lost = self._lost
        if lost is not None:
            log.critical("%s", lost.message)
            failed()

    def tell(self, order: object) -> None:
        """Send an order to every worker. Raises DeviceLost where one is gone."""
        self._check()
        data = pickle.dumps(order, pickle.HIGHEST_PROTOCOL)
        for worker in self._workers:
            try:
                worker.orders.send_bytes(data)
            except OSError as e:
                raise self._lose(f"the process of rank {worker.rank} has ended") from e

    @contextmanager
    def together(self, order: object) -> Iterator[None]:
        """Send an order, do rank 0's part of it inside.

        What is raised inside comes out as it is where all ranks can go on, else as DeviceLost; so
        is a rank that was lost meanwhile, as what was computed without it is nothing.
        """
        self.tell(order)
        try:
            yield
            self._check()
        except DeviceLost as e:
            raise self._lose(self._who_ended() or e.message.removeprefix(_FIELD)) from e
        except Exception:
            self._settle()
            raise

    def pool_states(self, decoder: Decoder, texts: Sequence[Sequence[int]], depth: int) -> States:
        """``pooling.pool_states`` by all ranks."""
        with self.together(orders.Pool(texts, depth)):
            return pool_states(decoder, texts, depth)

    def close(self) -> None:
        """End the workers."""
        with self._news:
            self._closing = True
        for worker in self._workers:
            hang_up(worker.orders)
        until = time.monotonic() + END_SECONDS
        for worker in self._workers:
            try:
                worker.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
            worker.loads.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _join(self, join: Callable[[], RankGroup]) -> RankGroup:
        """Meet the others, who may fail before they come."""
        joined: Future[RankGroup] = Future()

        def work() -> None:
            try:
                joined.set_result(join())
            except Exception as e:
                joined.set_exception(e)

        threading.Thread(target=work, name="join", daemon=True).start()
        while True:
            self._check()
            try:
                return joined.result(0.1)
            except TimeoutError:
                continue
            except RuntimeError as e:  # of one that came and went: it says why
                with self._news:
                    self._news.wait_for(lambda: self._refused or self._lost, END_SECONDS)
                self._check()
                raise self._lose("the ranks cannot meet") from e

    def _settle(self) -> None:
        """After an exception here: hear from all ranks that they have come to the same place."""
        self.tell(orders.Settle())
        answers = self._answers(orders.Settled, self.settle_seconds)
        if any(a.calls != self.group.calls for a in answers):
            raise self._lose("a step has raised at different places on different ranks")
        for worker in self._workers:
            worker.raised = None

    def _answers(self, kind: type[R], seconds: float) -> list[R]:
        """Every worker's answer of a kind. Raises what ended one, DeviceLost when it takes long."""
        until = time.monotonic() + seconds
        with self._news:
            while True:
                self._check()
                silent = [w.rank for w in self._workers if kind not in w.answers]
                if not silent:
                    return [w.answers.pop(kind) for w in self._workers]
                left = until - time.monotonic()
                if left <= 0:
                    raise self._lose(f"rank {silent[0]} has not answered in {seconds:g} s")
                self._news.wait(left)

    def _check(self) -> None:
        with self._news:
            if self._refused is not None:
                raise self._refused
            if self._lost is not None:
                raise self._lost

    def _listen(self) -> None:
        """To all workers, until they have ended."""
        there = {worker.orders: worker for worker in self._workers}
        while there:
            for connection in wait(list(there), 1.0):
                worker = there[connection]  # type: ignore[index]
                try:
                    self._take(worker, worker.orders.recv())
                except (EOFError, OSError):
                    del there[worker.orders]
                    self._ended(worker)
            now = time.monotonic()
            for worker in there.values():
                if worker.raised is not None and now - worker.raised > self.settle_seconds:
                    self._lose(f"a step has raised on rank {worker.rank} alone")

    def _take(self, worker: WorkerProcess, message: object) -> None:
        if isinstance(message, orders.LogLine):
            lines = logging.getLogger(message.name)
            lines.log(message.level, "rank %d: %s", worker.rank, message.text)
            return
        with self._news:
            if isinstance(message, orders.Refused):
                self._refused = ConfigError(message.message, field=message.field)
            elif isinstance(message, orders.Raised):
                worker.raised = time.monotonic()
            else:
                worker.answers[type(message)] = message
            self._news.notify_all()

    def _ended(self, worker: WorkerProcess) -> None:
        with self._news:
            if self._closing or self._refused is not None:
                return
        self._lose(self._who_ended() or f"the process of rank {worker.rank} has ended")

    def _who_ended(self) -> str:
        """Which process, and how. A connection that breaks is noticed before its process's end."""
        until = time.monotonic() + END_SECONDS
        while time.monotonic() < until:
            for worker in self._workers:
                if (status := worker.process.poll()) is not None:
                    return f"the process of rank {worker.rank} has ended with status {status}"
            time.sleep(0.01)
        return ""

    def _lose(self, why: str) -> DeviceLost:
        """The ranks cannot go on together: end the workers, so that nobody waits for them."""
        with self._news:
            if self._lost is not None:
                return self._lost
            self._lost = lost = DeviceLost(f"{_FIELD}{why}; start the server again")
            failed, closing = self._failed, self._closing
            self._news.notify_all()
        for worker in self._workers:
            worker.process.kill()
        if self._group is not None:
            self._group.abort()
        if failed is not None and not closing:
            log.critical("%s", lost.message)
            failed()
        return lost


_FIELD = "engine.tensor_parallel: "
