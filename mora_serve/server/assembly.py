"""What a server is made of: the slow part, done on a thread while health says NOT_SERVING."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from mora_serve.adapters.registry import Registry
from mora_serve.adapters.storage import SharedStorage, Storage
from mora_serve.config import Config
from mora_serve.core import DEFAULT_TENANT, SHARED_TENANT
from mora_serve.engine.engine import Engine
from mora_serve.engine.team import Team, load_ranks
from mora_serve.errors import ConfigError, MoraError
from mora_serve.model.loading import Base, Progress
from mora_serve.router.feedback import FeedbackStore
from mora_serve.router.routing import Routing
from mora_serve.router.selection import Selector
from mora_serve.server.poll import Poller
from mora_serve.server.states import EngineStates

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Assembly:
    """The parts that outlive a call. ``engine`` is not started yet; ``feedback`` may be off."""

    config: Config
    base: Base
    registry: Registry
    routing: Routing
    selector: Selector
    engine: Engine
    feedback: FeedbackStore | None
    poller: Poller | None = None

    def close(self) -> None:
        """Stop the engine and let go of the registry and of feedback."""
        if self.poller is not None:
            self.poller.close()
        self.engine.stop()
        self.routing.close()
        self.registry.close()
        if self.feedback is not None:
            self.feedback.close()


def assemble(config: Config) -> Assembly:
    """Load the base, open the registry, make the engine.

    Raises ConfigError for a configuration that cannot be served.
    """
    start = time.monotonic()
    log.info("loading base %s", config.base.model)
    base, team = load_ranks(config, _progress())
    try:
        return _assemble(config, base, team, start)
    except BaseException:
        if team is not None:
            team.close()
        raise


def _assemble(config: Config, base: Base, team: Team | None, start: float) -> Assembly:
    log.info(
        "loaded %s (%s) in %.1f s: %.1f MB of linear weights, %.1f MB besides%s",
        base.name,
        base.shape.model_type,
        time.monotonic() - start,
        base.linear_bytes / 1e6,
        base.other_bytes / 1e6,
        "" if team is None else f", on each of {team.group.size} ranks",
    )
    state = Path(config.server.state) if config.server.state else None
    place = _place(config, state)
    registry = Registry(place, config.adapters, base.shape, base.fingerprint)
    feedback = _feedback(config, state)
    if config.base.model == "demo":
        from mora_serve.demo.bundle import register_bundle

        try:
            # Where keys tell tenants apart, the bundle is for all of them.
            tenant = SHARED_TENANT if config.access.file else DEFAULT_TENANT
            register_bundle(registry, base.shape, config.adapters, tenant)
        except MoraError as e:
            raise ConfigError(
                f"base.model: the bundled adapters do not fit the configuration ({e.message}); "
                "raise its limits, or serve another base",
                field="base.model",
            ) from e
    engine = Engine(base, config, registry.open, team)
    engine.warm_up()
    # The engine does not run yet: states for the stored adapters' keys are computed right here.
    routing = Routing(registry, base.fingerprint, EngineStates(engine))
    if config.router.path:
        _load_router(routing, Path(config.router.path))
    selector = Selector(registry, routing, config)
    poller = None if place is None else Poller(registry, config.server.store_poll_seconds)
    return Assembly(config, base, registry, routing, selector, engine, feedback, poller)


def _place(config: Config, state: Path | None) -> Path | Storage | None:
    if not config.server.store:
        return state
    cache = state / "cache" if state else None
    return SharedStorage(config.server.store, cache, config.server.store_cache_bytes)


def _feedback(config: Config, state: Path | None) -> FeedbackStore | None:
    if not config.router.feedback:
        return None
    log.info("feedback is on: the prompts of task hints are stored")
    return FeedbackStore(state / "feedback" if state else None, config.router.feedback_bytes)


def _load_router(routing: Routing, path: Path) -> None:
    try:
        routing.load(path.read_bytes())
    except OSError as e:
        raise ConfigError(
            f"router.path: the file cannot be read ({e.strerror}); give a router's file",
            field="router.path",
        ) from e
    except MoraError as e:
        raise ConfigError(f"router.path: {e.message}", field="router.path") from e


def _progress() -> Progress:
    """Log a line for each tenth of the layers."""
    told = 0

    def progress(done: int, total: int) -> None:
        nonlocal told
        if (tenth := 10 * done // total) > told:
            told = tenth
            log.info("loading base: %d of %d layers", done, total)

    return progress
