"""How long a request would wait and take, from what the engine has measured lately.

The engine is seen as one worker whose seconds all requests share: a prompt token costs what it has
added to the steps it was in, a token of an answer its part of a step. Requests rarely make all the
tokens they may, and find some of their prompt in the cache; both are learnt as shares. So is by how
much the waits that were foretold were wrong. Nothing here reads a clock, and no estimate walks over
requests.
"""

from __future__ import annotations

from dataclasses import dataclass

GAIN = 0.1  # weight of the newest step
MEMORY = 0.95  # what a request's lengths still count when the next one has ended
OUTLIER = 4.0  # a step counts as at most this many times what was expected
MOST_WRONG = 3.0  # times that waits are corrected by, up or down


@dataclass(frozen=True, slots=True)
class Load:
    """What the engine has to do: requests and tokens, as they are now.

    ``places`` is how many requests can run at the same time, ``ahead`` how many of those that wait
    go before the request in question. Output tokens are those that requests may still make.
    """

    places: int
    running: int = 0
    running_prompt: int = 0
    running_output: int = 0
    waiting: int = 0
    waiting_prompt: int = 0
    waiting_output: int = 0
    ahead: int = 0


@dataclass(frozen=True, slots=True)
class Expected:
    """Seconds from now until a request gets its place, its first token, and its last."""

    place: float
    first_token: float
    end: float


class Forecast:
    """Learns from steps and from requests that ended; expects nothing before the first step."""

    def __init__(self) -> None:
        self._alone: dict[int, float] = {}  # bits of the number of decodes -> seconds of a step
        self._period: float | None = None  # seconds of a step in which answers grow
        self._prompt_seconds = self._prompt_tokens = 0.0  # added by recent chunks
        self._asked = self._computed = 0.0  # prompt tokens of recent requests, and those not cached
        self._allowed = self._made = 0.0  # output tokens of recent requests
        self._foretold = self._waited = 0.0  # seconds of recent waits, uncorrected

    @property
    def known(self) -> bool:
        """Whether anything has been measured."""
        return self._period is not None

    @property
    def settled(self) -> bool:
        """Whether requests have ended, so that how much they make of what they may is known."""
        return self.known and self._allowed > 0

    def stepped(self, decodes: int, prompt_tokens: int, seconds: float) -> None:
        """A step took ``seconds`` for so many answers' tokens and prompt tokens."""
        if self._period is not None:
            seconds = min(
                seconds, OUTLIER * max(self._period, self._of_step(decodes, prompt_tokens))
            )
        if self._period is None:
            self._period = seconds
        elif decodes:
            self._period += GAIN * (seconds - self._period)
        alone = self._alone_seconds(decodes)
        if prompt_tokens:
            if decodes and alone is None:  # nothing better yet: by tokens
                alone = seconds * decodes / (decodes + prompt_tokens)
            added = max(0.0, seconds - (alone or 0.0))
            self._prompt_seconds = (1 - GAIN) * self._prompt_seconds + added
            self._prompt_tokens = (1 - GAIN) * self._prompt_tokens + prompt_tokens
        elif decodes:
            size = decodes.bit_length()
            before = self._alone.get(size, seconds)
            self._alone[size] = before + GAIN * (seconds - before)

    def started(self, prompt_tokens: int, cached: int) -> None:
        """A request got its place and found ``cached`` of its prompt's tokens in the cache."""
        self._asked = MEMORY * self._asked + prompt_tokens
        self._computed = MEMORY * self._computed + prompt_tokens - cached

    def waited(self, foretold: float, seconds: float) -> None:
        """A request waited ``seconds`` that was to wait so long, ``uncorrected``."""
        if foretold:
            self._foretold = MEMORY * self._foretold + foretold
            self._waited = MEMORY * self._waited + seconds

    def ended(self, allowed: int, made: int) -> None:
        """A request ended by itself, with ``made`` of the tokens it might have made."""
        self._allowed = MEMORY * self._allowed + allowed
        self._made = MEMORY * self._made + made

    def expected(self, prompt: int, output: int, load: Load) -> Expected:
        """For a request with a prompt and at most so many tokens to make, after those ahead."""
        wait = self.uncorrected(prompt, output, load) * self._correction
        first_token = wait + self._prompt(prompt) + (self._period or 0.0)
        return Expected(wait, first_token, first_token + self._answer(output))

    def service(self, prompt: int, output: int) -> float:
        """Seconds from a request's place to its end, beside as many others as lately."""
        return self._prompt(prompt) + (self._period or 0.0) + self._answer(output)

    def uncorrected(self, prompt: int, output: int, load: Load) -> float:
        """Seconds until a place is free: the work ahead, less what those beside then still have.

        In a full batch these have half of their work still to do, in the mean.
        """
        if load.running + load.ahead < load.places:
            return 0.0
        size = max(load.running, 1)
        running = self._work(load.running_prompt, load.running_output, size)
        if load.waiting:
            line = self._work(load.waiting_prompt, load.waiting_output, size)
            each = line / load.waiting
        else:
            each = self._work(prompt, output, size)
        beside = (load.places - 1) / 2 * each
        return max(self._period or 0.0, running + load.ahead * each - beside)

    def _work(self, prompt: float, output: float, running: int) -> float:
        """Seconds of the whole engine for so many tokens, in steps of ``running`` requests."""
        step = self._alone_seconds(running) or self._period or 0.0
        return self._prompt(prompt) + self._share_made * output * step / running

    def _prompt(self, tokens: float) -> float:
        fresh = self._computed / self._asked if self._asked else 1.0
        cost = self._prompt_seconds / self._prompt_tokens if self._prompt_tokens else 0.0
        return fresh * tokens * cost

    def _answer(self, output: int) -> float:
        return max(0.0, self._share_made * output - 1) * (self._period or 0.0)

    @property
    def _correction(self) -> float:
        if not self._foretold:
            return 1.0
        return min(MOST_WRONG, max(1 / MOST_WRONG, self._waited / self._foretold))

    @property
    def _share_made(self) -> float:
        return self._made / self._allowed if self._allowed else 1.0

    def _of_step(self, decodes: int, prompt_tokens: int) -> float:
        cost = self._prompt_seconds / self._prompt_tokens if self._prompt_tokens else 0.0
        return (self._alone_seconds(decodes) or 0.0) + prompt_tokens * cost

    def _alone_seconds(self, decodes: int) -> float | None:
        """Of a step without prompt tokens: as measured with the most similar number of answers."""
        if not decodes:
            return None
        size = decodes.bit_length()
        nearest = min(self._alone, key=lambda other: (abs(other - size), other), default=None)
        return None if nearest is None else self._alone[nearest]
