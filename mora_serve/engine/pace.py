"""How many prompt tokens a step may take so that running streams keep their pace.

Every running stream waits for the whole step, the prompt chunks in it included. So the seconds
that chunks add to a step are limited to a multiple of what the step takes without them. Both are
estimated from the steps as they are measured: nothing here reads a clock.
"""

from __future__ import annotations

MIN_TOKENS = 16  # a prompt gets as many a step whatever runs: a page

GAIN = 0.2  # weight of the newest measurement
OUTLIER = 4.0  # a measurement counts as at most this many times what was expected
GROWTH = 2.0  # a limit is at most this many times the largest recent chunks, however cheap


class StepPace:
    """Limits the prompt tokens of steps in which streams run.

    ``pace`` is how many times as long as a step without prompt tokens a step may take, 0 for no
    limit; ``most`` is the largest limit in tokens, ``least`` the smallest.

    A token's seconds are those of the latest chunks together, divided by their tokens. As the
    chunks become as large as the limit allows, the limit settles where the added seconds are the
    allowed ones, be the cost of a chunk proportional to its tokens or not.
    """

    def __init__(self, pace: float, most: int, least: int = MIN_TOKENS) -> None:
        self._pace = pace
        self._most, self._least = most, min(least, most)
        self._alone: dict[int, float] = {}  # bits of the number of decodes -> seconds of a step
        self._added = self._tokens = 0.0  # seconds, and the prompt tokens that took them
        self._largest = 0.0  # prompt tokens of a recent step

    def observe(self, decodes: int, prompt_tokens: int, seconds: float) -> None:
        """Learn from a step: its streams, its prompt tokens, how long it took."""
        if not decodes:
            return
        alone = self._seconds(decodes)
        if not prompt_tokens:
            size = decodes.bit_length()
            before = self._alone.get(size, seconds)
            self._alone[size] = before + GAIN * (min(seconds, OUTLIER * before) - before)
        elif alone is not None:
            added = max(0.0, seconds - alone)
            if self._tokens:
                added = min(added, OUTLIER * max(alone, prompt_tokens * self._added / self._tokens))
            self._added = (1 - GAIN) * self._added + added
            self._tokens = (1 - GAIN) * self._tokens + prompt_tokens
            self._largest = max(prompt_tokens, (1 - GAIN) * self._largest)

    def limit(self, decodes: int, prompts: int) -> int:
        """Prompt tokens for the next step, in which ``decodes`` streams run.

        ``prompts`` are the requests that wait for their first token and could be in the step.
        Where they are more than the streams, the streams give way in proportion: a batch of
        requests that arrives together is not spread over many steps for the sake of the first.
        0 until a step without prompt tokens has been measured, that is for one step.
        """
        if not self._pace or not decodes:
            return self._most
        alone = self._seconds(decodes)
        if alone is None:
            return 0
        allowed = (self._pace - 1) * alone * max(1.0, prompts / decodes)
        limit = GROWTH * self._largest
        if allowed * self._tokens < limit * self._added:
            limit = allowed * self._tokens / self._added
        return int(min(self._most, max(self._least, limit))) if allowed else self._least

    def _seconds(self, decodes: int) -> float | None:
        """Of a step without prompt tokens: as measured with the most similar number of streams."""
        size = decodes.bit_length()
        nearest = min(self._alone, key=lambda other: (abs(other - size), other), default=None)
        return None if nearest is None else self._alone[nearest]
