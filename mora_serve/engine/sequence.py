"""A request while the engine works on it."""

from __future__ import annotations

from dataclasses import dataclass, field

from mora_serve.core import Request
from mora_serve.engine.kv_cache import PrefixChain
from mora_serve.engine.text import TextStream


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens, pages and progress of one request; compared and hashed by identity.

    ``tokens`` is the prompt and what was generated, ``output`` the generated part alone.
    ``computed`` counts the leading tokens whose keys and values are in ``pages``.
    ``weights`` are (digest, weight) of the distinct adapters with a non-zero weight.
    ``charged`` counts the leading tokens that fairness has already accounted for.
    Times are ``time.monotonic()`` seconds, None until they happen.
    """

    request: Request
    text: TextStream
    tokens: list[int] = field(init=False)
    output: list[int] = field(init=False, default_factory=list)
    prompt_length: int = field(init=False)
    computed: int = field(init=False, default=0)
    pages: list[int] = field(init=False, default_factory=list)
    mixture_key: bytes = field(init=False)
    digests: tuple[str, ...] = field(init=False)
    weights: tuple[tuple[str, float], ...] = field(init=False)
    chain: PrefixChain = field(init=False)
    cached_tokens: int = field(init=False, default=0)
    preemptions: int = field(init=False, default=0)
    admitted: float | None = field(init=False, default=None)
    first_token: float | None = field(init=False, default=None)
    order: int = field(init=False, default=-1)  # position among all that were ever added
    charged: int = field(init=False, default=0)
    skips: int = field(init=False, default=0)  # admissions that passed it for want of a slot
    loading: bool = field(init=False, default=False)  # its adapters had slots, not yet held

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        self.prompt_length = len(self.tokens)
        self.mixture_key = self.request.mixture.key()
        self.weights = self.request.mixture.merged()
        self.digests = tuple(digest for digest, _ in self.weights)
        self.chain = PrefixChain(self.request.tenant, self.mixture_key)

    @property
    def pending(self) -> int:
        """Tokens still to be computed; 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def remaining(self) -> int:
        """Tokens that may still be generated."""
        return self.request.sampling.max_tokens - len(self.output)

    def append(self, token: int) -> None:
        """Add one generated token."""
        self.tokens.append(token)
        self.output.append(token)
