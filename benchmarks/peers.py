"""The peers: transformers and PEFT on the same 4-bit base and the same adapters' files.

Each runs at its best here: weights in NF4 through bitsandbytes' fused product where the processor
has AVX512-BF16, bf16 arithmetic, inference mode, and whichever is faster of a dynamic and a static
cache, of sdpa and eager attention, and of adapters in bf16 and in fp32 (``settle`` measures it).
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.oracle import generated
from benchmarks.turns import Work
from benchmarks.workload import Mixtures, Run, Workload
from mora_serve.engine.runner import allowed_cores

SETTLE_STEPS = 8


@dataclass(frozen=True)
class Mode:
    """How ``generate`` runs: its key/value cache and its attention."""

    cache: str
    attention: str


# Without a mask, as a dynamic cache is read, transformers' sdpa asks torch for grouped-query
# attention, which is slow on the CPU in bf16; eager attention repeats the keys instead.
MODES = (Mode("dynamic", "sdpa"), Mode("dynamic", "eager"), Mode("static", "sdpa"))


class Clock:
    """A streamer of ``generate``: notes each step's time and tokens."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.times: list[float] = []
        self.tokens: list[list[int]] = []
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompts first, then with the next token of each row."""
        if self._prompt:
            self._prompt = False
            return
        self.times.append(time.perf_counter() - self.start)
        self.tokens.append(value.flatten().tolist())

    def end(self) -> None:
        """Nothing is left to note."""

    def has(self, steps: int | None, rows: int) -> torch.Tensor:
        """Whether all rows have that many tokens, as a stopping criterion says it: bool [rows]."""
        return torch.full((rows,), steps is not None and len(self.times) >= steps)

    def run(self) -> Run:
        """What was noted, by request."""
        answers = [list(ids) for ids in zip(*self.tokens, strict=True)]
        return Run(answers, [self.times] * len(answers))


class Peers:
    """transformers with and without PEFT's adapters, on files that ``Workload`` wrote.

    Models are loaded when they are first asked. They compute on as many threads as ours.
    """

    def __init__(self, root: Path, workload: Workload, adapters: Sequence[str]) -> None:
        quieten()
        torch.set_num_threads(allowed_cores())
        self.workload = workload
        self.adapters = list(adapters)
        self.settings: dict[str, Any] = {}
        self._modes: dict[tuple[str, int], Mode] = {}  # by kind and number of requests
        self._steps: int | None = None  # where to stop before the end of the answer
        self._root = root

    @cached_property
    def _plain(self) -> Any:
        return load(self._root / "base")

    @cached_property
    def _peft(self) -> Any:
        return with_adapters(load(self._root / "base"), self._root / "adapters", self.adapters)

    def generate(self, prompts: Sequence[Sequence[int]], _: Mixtures, tokens: int) -> Run:
        """transformers' ``generate`` on the whole batch, without adapters."""
        return self._generate(self._plain, "none", prompts, tokens)

    def mixed_batch(self, prompts: Sequence[Sequence[int]], mixtures: Mixtures, tokens: int) -> Run:
        """PEFT's mixed batch: an adapter a row (``adapter_names``), not merged."""
        names = [name for (name,) in mixtures]
        return self._generate(self._peft, "mixed", prompts, tokens, adapter_names=names)

    def one_active(self, prompts: Sequence[Sequence[int]], mixtures: Mixtures, tokens: int) -> Run:
        """PEFT with one adapter set for the whole batch, not merged."""
        ((name,),) = {tuple(m) for m in mixtures}
        self._peft.set_adapter(name)
        return self._generate(self._peft, "mixed", prompts, tokens)

    def one_after_another(
        self, prompts: Sequence[Sequence[int]], mixtures: Mixtures, tokens: int
    ) -> Run:
        """PEFT's ``set_adapter``, then one request; the others wait for their turn."""
        start = time.perf_counter()
        answers, times = [], []
        for prompt, mixture in zip(prompts, mixtures, strict=True):
            waited = time.perf_counter() - start
            alone = self.one_active([prompt], [mixture], tokens)
            answers.append(alone.tokens[0])
            times.append([waited + t for t in alone.times[0]])
        return Run(answers, times)

    def continuous(self, prompts: Sequence[Sequence[int]], _: Mixtures, tokens: int) -> Run:
        """transformers' own continuous batching (``generate_batch``), without adapters.

        Raises RuntimeError when it gives up on a request.
        """
        from transformers import GenerationConfig
        from transformers.generation import ContinuousBatchingConfig

        page = 32
        pages = -(-(len(prompts[0]) + tokens) // page)
        self._plain.set_attn_implementation("sdpa")
        with torch.no_grad():  # its thread writes to tensors: inference mode forbids that
            start = time.perf_counter()
            outputs = self._plain.generate_batch(
                [list(prompt) for prompt in prompts],
                generation_config=GenerationConfig(
                    max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
                ),
                continuous_batching_config=ContinuousBatchingConfig(
                    page_size=page,
                    num_blocks=(pages + 1) * len(prompts),
                    max_batch_tokens=max(512, len(prompts)),
                    allow_block_sharing=False,
                ),
                record_timestamps=True,
            )
        found = list(outputs.values())
        failed = [o.error for o in found if o.error or len(o.timestamps) != tokens]
        if failed or len(found) != len(prompts):
            raise RuntimeError(f"continuous batching: {failed[:1] or 'answers are missing'}")
        times = [[t - start for t in o.timestamps] for o in found]
        return Run([o.generated_tokens for o in found], times)

    def settle(self, counts: Sequence[int], kinds: Sequence[str] = ("none", "mixed")) -> None:
        """Choose a mode for each number of requests, and the adapters' type for the largest.

        ``kinds``: ``none`` for ``generate``, ``mixed`` for PEFT. The time of a whole answer
        decides, reckoned from its prompt's and the median step in its middle; ``settings`` tells
        what was measured, in milliseconds a token.
        """
        half = self.workload.tokens // 2
        later = replace(self.workload, prompt=self.workload.prompt + half)
        measured: dict[str, float] = {}
        distinct = [{name: 1.0} for name in self.adapters]

        def step(name: str, run: Work, wanted: Mixtures) -> float:
            got = run(later.prompts(len(wanted), -1), wanted, half)
            whole = max(got.first_token) + self.workload.tokens * statistics.median(got.gaps)
            measured[f"{name}, {len(wanted)} requests"] = 1e3 * whole / self.workload.tokens
            return whole

        self._steps = SETTLE_STEPS
        if "mixed" in kinds:
            seconds = {}
            for dtype in (torch.bfloat16, torch.float32):
                self._cast(dtype)
                wanted = distinct[: max(counts)]
                seconds[dtype] = step(f"mixed, adapters in {dtype}", self.mixed_batch, wanted)
            self._cast(dtype := min(seconds, key=seconds.__getitem__))
            self.settings["adapters_dtype"] = str(dtype)
        for kind, count in itertools.product(kinds, counts):
            run = self.generate if kind == "none" else self.mixed_batch
            wanted = [{}] * count if kind == "none" else distinct[:count]
            by_mode = {}
            for mode in MODES:
                self._modes[kind, count] = mode
                by_mode[mode] = step(f"{kind}, {mode.cache} cache, {mode.attention}", run, wanted)
            self._modes[kind, count] = min(by_mode, key=by_mode.__getitem__)
        self._steps = None
        self.settings["step_ms"] = measured
        self.settings["chosen"] = {
            f"{kind}, {n} requests": asdict(mode) for (kind, n), mode in self._modes.items()
        }

    @torch.inference_mode()
    def _generate(
        self,
        model: Any,
        kind: str,
        prompts: Sequence[Sequence[int]],
        tokens: int,
        **options: Any,
    ) -> Run:
        ids = torch.tensor(prompts)
        known = {n: mode for (k, n), mode in self._modes.items() if k == kind}
        nearest = min(known, key=lambda n: abs(n - len(prompts)), default=0)
        mode = known.get(nearest, MODES[0])
        (model.get_base_model() if kind == "mixed" else model).set_attn_implementation(
            mode.attention
        )
        if mode.cache == "static":
            options |= {"cache_implementation": "static", "disable_compile": True}
        clock = Clock()
        generated(
            *(model, ids, tokens),
            streamer=clock,
            stopping_criteria=[lambda *_: clock.has(self._steps, len(prompts))],
            **options,
        )
        return clock.run()

    def _cast(self, dtype: torch.dtype) -> None:
        for name, parameter in self._peft.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)


def load(directory: Path) -> Any:
    """A base in NF4 under transformers, in bf16 where the processor computes in it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
    return AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=quantization, dtype=dtype
    ).eval()


def with_adapters(model: Any, directory: Path, names: Sequence[str]) -> Any:
    """A PeftModel of ``model`` with adapters from their folders."""
    from peft import PeftModel

    peft = PeftModel.from_pretrained(model, str(directory / names[0]), adapter_name=names[0])
    for name in names[1:]:
        peft.load_adapter(str(directory / name), adapter_name=name)
    return peft.eval()


def quieten() -> None:
    """No progress bars and warnings of the libraries among a measurement's own lines."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def notes() -> list[str]:
    """What a reader has to know of the peers here."""
    found = ["PEFT cannot mix two adapters in a row of a batch: mixtures have no peer"]
    if importlib.util.find_spec("kernels") is None:
        found.append(
            "bitsandbytes says that it failed to load gemm_4bit_forward: another kernel for the "
            "same product, which the package `kernels` downloads from the Hugging Face hub. It is "
            "not installed, so bitsandbytes uses the fused product of its own library "
            "(gemv_4bit_inference_cpu_nf4_bf16 with AVX512-BF16)"
        )
    if not torch.cpu._is_avx512_bf16_supported():
        found.append("without AVX512-BF16 bitsandbytes dequantises before each product, in fp32")
    return found
