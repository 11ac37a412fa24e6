"""How many adapter slots and key/value pages there are: as configured, or what memory there is for.

On the CPU memory is taken as it is first written, so unset sizes have plain defaults. On a card all
is taken at start: slots and pages share what loading the base has left, less what a step works in.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from mora_serve.config import DEFAULT_SLOTS, Config
from mora_serve.errors import ConfigError
from mora_serve.model import footprint
from mora_serve.model.shape import PROJECTIONS, ModelShape

log = logging.getLogger(__name__)

CPU_KV_BYTES = 1 << 30
SLOT_SHARE = 0.25  # of a card's free memory, that slots take at most where their number is not set
GRAPH_BYTES = 256 << 20  # captured graphs, and the libraries' own


@dataclass(frozen=True)
class Sizes:
    """Adapter slots, and pages of the cache with page 0, which pads page tables."""

    slots: int
    pages: int


def slot_bytes(shape: ModelShape, max_rank: int, itemsize: int, dtype: str = "auto") -> int:
    """A and B of one adapter of the largest rank on all projections, and its DoRA scales."""
    dora = footprint.dora_bytes(shape, itemsize)
    return footprint.slot_bytes(shape, max_rank, itemsize, dtype) + dora


def page_bytes(shape: ModelShape, page_size: int, itemsize: int) -> int:
    """Keys and values of all layers."""
    return page_size * footprint.kv_token_bytes(shape, itemsize)


def workspace_bytes(shape: ModelShape, rows: int, sampled: int, itemsize: int) -> int:
    """What a step of so many rows, ``sampled`` of them sampled, allocates at most beside them.

    Activations of one layer, one weight dequantised and copied, the logits with what sampling
    makes of them in float32 and float64.
    """
    heads = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    width = 6 * shape.hidden_size + 2 * heads + 3 * 2 * shape.intermediate_size
    largest = max(math.prod(shape.projection(p)) for p in PROJECTIONS)
    logits = sampled * shape.vocab_size * (itemsize + 4 * 4 + 2 * 8)
    return rows * width * itemsize + 2 * 2 * largest * itemsize + logits


def choose_sizes(
    shape: ModelShape, config: Config, max_context: int, itemsize: int, free: int | None = None
) -> Sizes:
    """Slots and pages for a configuration; ``free`` are a card's free bytes, None on the CPU.

    The cache holds no more pages than ``max_batch`` requests ever need. Raises ConfigError where
    the card has no room for what is asked, or for one page a request.
    """
    engine, adapters = config.engine, config.adapters
    slot = slot_bytes(shape, adapters.max_rank, itemsize, adapters.dtype)
    page = page_bytes(shape, engine.page_size, itemsize)
    needed = engine.max_batch * -(-max_context // engine.page_size)
    set_pages = engine.kv_pages or min(needed, max(1, engine.kv_bytes // page))
    given = engine.kv_pages > 0 or engine.kv_bytes > 0
    if free is None:
        pages = set_pages if given else min(needed, max(1, CPU_KV_BYTES // page))
        return _told(Sizes(adapters.slots or DEFAULT_SLOTS, pages + 1), slot, page)
    sampled = min(engine.step_tokens, engine.max_batch)
    work = workspace_bytes(shape, engine.step_tokens, sampled, itemsize) + GRAPH_BYTES
    room = int(free * engine.memory_fraction) - work
    least = engine.max_batch + 1
    kept = (set_pages + 1 if given else least) * page  # for pages, whatever slots take
    slots = adapters.slots
    if not slots:
        affordable = min(int(room * SLOT_SHARE), room - kept) // slot
        slots = max(adapters.max_mixture, min(engine.max_batch, affordable))
    if slots * slot + kept > room:
        raise ConfigError(
            f"adapters.slots: {slots} slots of rank {adapters.max_rank} take "
            f"{slots * slot / 1e9:.1f} GB and {'the' if given else 'the fewest'} key/value pages "
            f"{kept / 1e9:.1f} GB, but the device has {max(0, room) / 1e9:.1f} GB for both "
            f"({free / 1e9:.1f} GB free, engine.memory_fraction of it, less {work / 1e9:.1f} GB to "
            "work in); lower adapters.slots, adapters.max_rank, engine.kv_bytes or "
            "engine.max_batch, or take a card with more memory",
            field="adapters.slots",
        )
    pages = set_pages if given else min(needed, (room - slots * slot) // page - 1)
    return _told(Sizes(slots, pages + 1), slot, page)


def _told(sizes: Sizes, slot: int, page: int) -> Sizes:
    log.info(
        "%d adapter slots in %.0f MB, %d pages in %.0f MB",
        *(sizes.slots, sizes.slots * slot / 1e6, sizes.pages, sizes.pages * page / 1e6),
    )
    return sizes
