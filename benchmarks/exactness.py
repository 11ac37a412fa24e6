"""Logits and greedy tokens against transformers + PEFT, family by family.

One batch holds every kind of adapter and mixture at once. Unquantised fp32: the error of the
logits relative to how far the adapters move them, and 64 greedy tokens through the engine. As
DoRA switches the batched form of the adapters' products off, the cases without it run once more
in that form; and once more through scheduler and pages, prompts in several chunks beside the
others' decode steps, where the logits of every sampled position are compared. Prompts are three
times as long as Mistral's sliding window, so that its masks cut. NF4: logits against
transformers + bitsandbytes. bf16 (one family): logits against the fp32 reference.

    python -m benchmarks.exactness --json
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import families, oracle, report
from benchmarks.local import LocalEngine
from mora_serve.config import AdaptersConfig, BaseConfig, Config, EngineConfig
from mora_serve.core import SamplingParams, TokenOut
from mora_serve.engine.forward import Forward, Logits
from mora_serve.engine.scheduler import Chunk
from mora_serve.engine.sequence import Sequence as Running
from mora_serve.model.attention import DenseCausal
from mora_serve.model.lora import PooledAdapters, plan_mixtures

MIXTURES: Mapping[str, Mapping[str, float]] = {
    "base": {},
    **{name: {name: 1.0} for name in oracle.VARIANTS},
    "cat-2": {"rank-8": 1.0, "rank-64": 0.5},
    "cat-2-negative": {"rank-4": 0.7, "rank-16": -0.6},
    "cat-3": {"rank-1": 0.8, "feed-forward": 1.2, "attention": -0.5},
    "cat-4": {"rank-2": 0.5, "rank-32": 0.4, "one-layer": -1.1, "rank-8": 0.3},
    "hand-rslora": {"rslora": 0.8, "rank-8": -0.4},
    "hand-dora-2": {"dora": 0.9, "dora-2": 0.5},
    "hand-all-kinds": {"dora": 0.5, "rslora": 0.5, "patterns": -0.7, "rank-64": 0.4},
}
NO_DORA = [n for n, m in MIXTURES.items() if not any(a.startswith("dora") for a in m)]
BF16_FAMILY = "llama3"
SHORT = 8  # tokens a case where the batched form is compared


def main() -> None:
    """Measure every family and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--families", nargs="*", default=sorted(families.FAMILIES))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=72, help="tokens; beyond Mistral's window")
    args = parser.parse_args()
    rows = {}
    for family in args.families:
        started = time.monotonic()
        rows[family] = measure(family, args.prompt, args.tokens)
        report.log(f"{family}: {rows[family]} in {time.monotonic() - started:.0f} s")
    report.emit(
        {
            "families": rows,
            "cases": len(MIXTURES),
            "cases_without_dora": len(NO_DORA),
            "max_error": max(r["error"] for r in rows.values()),
            "max_error_batched": max(r["batched_error"] for r in rows.values()),
            "max_error_paged": max(r["paged_error"] for r in rows.values()),
            "min_chunked_prompts": min(r["chunked_prompts"] for r in rows.values()),
            "min_movement": min(r["movement"] for r in rows.values()),
            "greedy_different": sum(r["greedy_different"] for r in rows.values()),
            "max_nf4_error": max(r["nf4_error"] for r in rows.values()),
            "bf16_error": rows.get(BF16_FAMILY, {}).get("bf16_error"),
            "environment": report.environment(),
        }
    )


def measure(family: str, length: int, tokens: int) -> dict[str, Any]:
    """One family: worst error over the cases, least movement, answers that differ."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = families.make_base(family, root / "base")
        peft = oracle.make_adapters(copy.deepcopy(model), root / "adapters")
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(4, 320, (len(MIXTURES), length), generator=generator)
        want = {n: reference(peft, n, ids[i]) for i, n in enumerate(MIXTURES)}
        plain = {n: reference(peft, "base", ids[i]) for i, n in enumerate(MIXTURES)}
        row: dict[str, Any] = {}
        with local_engine(root, "none") as engine:
            got, _ = mixed_logits(engine, ids, list(MIXTURES))
            row["error"] = max(error(got[n], want[n], plain[n]) for n in MIXTURES)
            row["movement"] = min(
                float((want[n] - plain[n]).norm() / plain[n].norm())
                for n in MIXTURES
                if n != "base"
            )
            short = torch.stack([ids[i, :SHORT] for i, n in enumerate(MIXTURES) if n in NO_DORA])
            got, batched = mixed_logits(engine, short, NO_DORA)
            if not batched:
                raise RuntimeError("the cases without DoRA did not run in the batched form")
            row["batched_error"] = max(
                error(got[n], want[n][:SHORT], plain[n][:SHORT]) for n in NO_DORA
            )
            answers = engine.generate(
                [
                    (ids[i].tolist(), mixture, SamplingParams(tokens, ignore_eos=True))
                    for i, mixture in enumerate(MIXTURES.values())
                ]
            )
        row["different"] = [
            name
            for i, (name, mixture) in enumerate(MIXTURES.items())
            if answers[i] != greedy_reference(peft, mixture, ids[i].tolist(), tokens)
        ]
        row["greedy_different"] = len(row["different"])
        row |= paged(root, peft, ids, tokens)
        row["nf4_error"] = nf4_error(root, ids)
        if family == BF16_FAMILY:
            with local_engine(root, "none", dtype="bf16") as engine:
                got, _ = mixed_logits(engine, ids, list(MIXTURES))
            row["bf16_error"] = max(
                float((got[n] - want[n]).norm() / want[n].norm()) for n in MIXTURES
            )
        return row


def error(got: Tensor, want: Tensor, plain: Tensor) -> float:
    """Distance to the reference, relative to the adapters' movement (the base's: to its norm)."""
    moved = (want - plain).norm()
    return float((got - want).norm() / (moved if moved > 0 else want.norm()))


def paged(root: Path, peft: Any, ids: Tensor, tokens: int) -> dict[str, Any]:
    """Logits of every sampled position, from the real scheduler, runner and paged attention.

    Twice: all cases, and those without DoRA. The reference reads the tokens that the engine chose.
    """
    worst, chunked = 0.0, []
    limits = EngineConfig(max_batch=64, step_tokens=32, page_size=8)
    rows = dict(zip(MIXTURES, ids, strict=True))
    for cases in (list(MIXTURES), NO_DORA):
        with local_engine(root, "none", limits=limits) as engine:
            capture = Capture(engine)
            answers = engine.generate(
                [
                    (rows[n].tolist(), MIXTURES[n], SamplingParams(tokens, ignore_eos=True))
                    for n in cases
                ]
            )
        for i, (name, answer) in enumerate(zip(cases, answers, strict=True), 1):
            sequence = torch.tensor(rows[name].tolist() + answer[:-1])
            sampled = slice(ids.shape[1] - 1, None)
            got = torch.stack(capture.logits[f"r{i}"])
            want = reference(peft, name, sequence)[sampled]
            worst = max(worst, error(got, want, reference(peft, "base", sequence)[sampled]))
        chunked.append(sum(n > 1 for n in capture.chunks.values()))
    return {"paged_error": worst, "chunked_prompts": min(chunked)}


class Capture:
    """Keeps, a request, the logits it was sampled from and in how many chunks its prompt went."""

    def __init__(self, engine: LocalEngine) -> None:
        self.logits: dict[str, list[Tensor]] = {}
        self.chunks: dict[str, int] = {}
        runner = engine.engine.runner
        run = runner.run
        runner.forward = recorded = Recorded(runner.forward)

        def captured(batch: Sequence[Chunk]) -> list[tuple[Running, TokenOut | None]]:
            for chunk in batch:
                request = chunk.sequence.request
                if chunk.start < len(request.prompt):
                    self.chunks[request.id] = self.chunks.get(request.id, 0) + 1
            results = run(batch)
            for (sequence, _), row in zip(results, recorded.logits, strict=True):
                self.logits.setdefault(sequence.request.id, []).append(row)
            return results

        runner.run = captured  # type: ignore[method-assign]


class Recorded:
    """A forward (see engine/forward.py) that keeps the logits of its newest step."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self.reads_whole_pages = forward.reads_whole_pages
        self.torch_threads = forward.torch_threads
        self.logits: list[Tensor] = []

    def prepare(self) -> None:
        """As the forward does."""
        self._forward.prepare()

    def __call__(self, batch: Sequence[Chunk], slot: Callable[[str], int]) -> Logits | None:
        out = self._forward(batch, slot)
        self.logits = [] if out is None else list(out.values.clone())
        return out


def local_engine(
    root: Path,
    quantization: Any,
    dtype: Any = "fp32",
    limits: EngineConfig = EngineConfig(max_batch=64, step_tokens=512),  # noqa: B008 - frozen
) -> LocalEngine:
    """An engine over the base and adapters under ``root``, its thread not started."""
    config = Config(
        BaseConfig(str(root / "base"), quantization=quantization, dtype=dtype, device="cpu"),
        limits,
        AdaptersConfig(slots=len(oracle.VARIANTS) + 4, max_rank=64),
    )
    engine = LocalEngine(config)
    for name in oracle.VARIANTS:
        engine.register(name, root / "adapters", name)
    return engine


@torch.no_grad()
def mixed_logits(
    engine: LocalEngine, ids: Tensor, cases: Sequence[str]
) -> tuple[dict[str, Tensor], bool]:
    """All cases in one forward, row i of ``ids`` with the i-th: [length, vocabulary] each.

    Also says whether the adapters' products ran in their batched form.
    """
    length = ids.shape[1]
    pool, decoder = engine.engine.pool, engine.base.decoder
    engine.make_resident(list(oracle.VARIANTS))
    mixtures = [
        tuple((pool.slot(engine.digests[n]), w) for n, w in MIXTURES[case].items())
        for case in cases
    ]
    plan = plan_mixtures(pool.slots, mixtures, [length] * len(cases))
    assert plan is not None
    hidden = decoder.hidden(
        ids.flatten(),
        torch.arange(length).repeat(len(cases)),
        DenseCausal(len(cases), length, engine.base.shape.sliding_window),
        PooledAdapters(pool.slots, plan),
    )
    logits = decoder.logits(hidden).view(len(cases), length, -1)
    return dict(zip(cases, logits, strict=True)), plan.padded is not None


@torch.no_grad()
def reference(peft: Any, name: str, ids: Tensor) -> Tensor:
    """What transformers and PEFT say of a case for ids [length]: [length, vocabulary].

    The base, one adapter, ``cat``, or the formula by hand.
    """
    ids, mixture = ids[None], MIXTURES[name]
    logits: Tensor
    if not mixture:
        with peft.disable_adapter():
            logits = peft(input_ids=ids).logits
    elif name.startswith("cat-"):
        logits = oracle.cat_logits(peft, mixture, ids)
    elif name.startswith("hand-"):
        with oracle.by_hand(peft, mixture) as model:
            logits = model(input_ids=ids).logits
    else:
        peft.set_adapter(name)
        logits = peft(input_ids=ids).logits
    return logits[0]


def greedy_reference(
    peft: Any, mixture: Mapping[str, float], prompt: list[int], count: int
) -> list[int]:
    """Greedy tokens by transformers, the mixture by PEFT's own forward or by hand."""
    if len(mixture) == 1:
        peft.set_adapter(next(iter(mixture)))
        return oracle.greedy(peft, prompt, count)
    with oracle.by_hand(peft, mixture) as model:
        return oracle.greedy(model, prompt, count)


@torch.no_grad()
def nf4_error(root: Path, ids: Tensor) -> float:
    """Relative error of NF4 logits against transformers + bitsandbytes, base and one adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(
        root / "base", quantization_config=quantization, dtype=torch.float32
    ).eval()
    # Before the first pass: where bitsandbytes repacks the weights in that pass (AVX512-BF16), an
    # adapter that PEFT adds later gets wrong answers (measured: off by half).
    peft = PeftModel.from_pretrained(model, str(root / "adapters" / "rank-8")).eval()
    adapted = peft(input_ids=ids).logits
    with peft.disable_adapter():
        plain = peft(input_ids=ids).logits
    with local_engine(root, "nf4") as engine:
        got, _ = mixed_logits(engine, ids, list(MIXTURES))
    names = list(MIXTURES)
    errors = [
        (got[n] - want[names.index(n)]).norm() / want[names.index(n)].norm()
        for n, want in (("base", plain), ("rank-8", adapted))
    ]
    return float(max(errors))


if __name__ == "__main__":
    main()
