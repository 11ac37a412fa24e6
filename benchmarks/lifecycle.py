"""An adapter replaced under a running stream, and an abstention beside the base, on the demo.

A real server in this process, asked over gRPC. The figures count what has to hold: the running
stream ends as the old version alone would have, the next request answers as the new version alone
would have, and finds none of the old one's keys and values; an abstention and BaseOnly, computed
in the same steps, agree in every token and every bit of their log-probabilities.

    python -m benchmarks.lifecycle --json
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
from typing import Any

from benchmarks import report
from benchmarks.hot_registration import Recorder
from mora_serve.client import AsyncClient
from mora_serve.client.connection import Result
from mora_serve.config import AdaptersConfig, Config, EngineConfig, ServerConfig
from mora_serve.core import Source, TokenOut
from mora_serve.demo.bundle import bundle_path, read_examples
from mora_serve.server.app import MoraServer

LONG = 160
PAIRS, MOST_PAIRS = 20, 200
BESIDE, LONG_PROMPT = 4, "and on and on it goes, " * 8
REVERSE = {"reverse": 1.0}
NAME = "changing"


def main() -> None:
    """Run both scenes and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.parse_args()
    report.emit({**asyncio.run(measure()), "environment": report.environment()})


async def measure() -> dict[str, Any]:
    """Both scenes on one server."""
    config = Config(
        adapters=AdaptersConfig(root=str(bundle_path() / "adapters")),
        engine=EngineConfig(step_pace=0),  # or two prompts beside streams may take turns
        server=ServerConfig(port=0, metrics_port=-1),
    )
    with Recorder() as recorder:
        async with MoraServer(config) as server, AsyncClient(server.address) as client:
            return {**await replaced(client), **await abstained(client, recorder)}


async def replaced(client: AsyncClient) -> dict[str, Any]:
    """Replace an adapter in the middle of a stream that uses it."""
    prompt = "write the word 'stone' as I asked you to, please, and then go on and on with it"

    async def alone(name: str, tokens: int) -> Result:
        return await client.generate(
            prompt, adapters={name: 1.0}, max_tokens=tokens, ignore_eos=True
        )

    old = [t.id for t in (await alone("reverse", LONG)).tokens]
    new = [t.id for t in (await alone("uppercase", 32)).tokens]
    await client.register_adapter(NAME, "reverse")
    tokens: list[int] = []
    after: Result | None = None
    async with await client.stream(
        prompt, adapters={NAME: 1.0}, max_tokens=LONG, ignore_eos=True
    ) as stream:
        async for delta in stream:
            tokens += [t.id for t in delta.tokens]
            if after is None and len(tokens) >= LONG // 4:
                await client.register_adapter(NAME, "uppercase", replace=True)
                after = await alone(NAME, 32)
                replaced_at = len(tokens)
        running_digest = stream.decision.mixture.adapters[0].digest
    if after is None:
        raise RuntimeError("the stream ended before the adapter was replaced")
    # The prompt is in the cache for the old version under either name, and for the new one.
    unseen = f"unseen: {prompt}"
    await client.generate(unseen, adapters={"reverse": 1.0}, max_tokens=4)
    fresh = await client.generate(unseen, adapters={NAME: 1.0}, max_tokens=4)
    again = await client.generate(unseen, adapters={NAME: 1.0}, max_tokens=4)
    return {
        "replaced_at_token": replaced_at,
        "running_stream_kept_the_old_version": tokens == old,
        "next_request_had_the_new_version": [t.id for t in after.tokens] == new,
        "versions_differ": old[:32] != new
        and running_digest != after.decision.mixture.adapters[0].digest,
        "cached_tokens_of_the_old_version": fresh.usage.cached_tokens,
        "cached_tokens_of_the_same_version": again.usage.cached_tokens,
    }


async def abstained(client: AsyncClient, recorder: Recorder) -> dict[str, Any]:
    """Ask what no adapter fits, and the base alone, at the same time, beside an adapter.

    Only pairs that shared every step, the prompt's included, are compared: the bits of a product
    depend on the shape of its batch. A routed request comes a moment after one that is not: long
    prompts beside them make a step in which both arrive, and pairs are asked until enough have
    shared theirs.
    """
    prompt = next(e.prompt for e in read_examples(bundle_path()) if e.kind == "abstain")
    shared = differ = abstentions = asked = 0
    for i in range(MOST_PAIRS):
        if shared == PAIRS:
            break
        asked += 1
        # A new beginning each time, so that no prefix is found in the cache.
        text = f"{i} {prompt}"

        async def ask(kind: str, text: str = text, **options: Any) -> Result:
            return await client.generate(
                text, max_tokens=24, ignore_eos=True, logprobs=5, request_id=kind, **options
            )

        busy = [
            asyncio.create_task(ask(f"other-{j}", f"{i} {j} {LONG_PROMPT}", adapters=REVERSE))
            for j in range(BESIDE)
        ]
        await asyncio.sleep(0.005)
        first = len(recorder.steps)
        routed, base = await asyncio.gather(ask("routed"), ask("base", base=True))
        await asyncio.gather(*busy)
        abstentions += routed.decision.source is Source.ABSTAINED
        names = [{r.partition("#")[0] for r in got} for _, got in recorder.steps[first:]]
        if sum({"routed", "base"} <= got for got in names) == len(base.tokens):
            shared += 1
            differ += _bits(routed) != _bits(base)
    return {
        "abstentions": abstentions,
        "pairs": asked,
        "pairs_in_one_batch": shared,
        "pairs_that_differ": differ,
    }


def _bits(result: Result) -> list[tuple[object, ...]]:
    tokens: list[TokenOut] = list(result.tokens)
    return [dataclasses.astuple(t) for t in tokens]


if __name__ == "__main__":
    main()
