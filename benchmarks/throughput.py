"""Tokens a second of the served system beside transformers and PEFT, on the same 4-bit base.

A Llama of 100M parameters (or any other size by flags) in NF4, prompts of 32 tokens, adapters of
rank 16 on all seven projections. Ours runs in a server process and is asked over gRPC, all
requests at once; the peers run in this process: transformers' ``generate`` for no adapter, PEFT's
mixed batch (one adapter a row) for all-distinct adapters. Ours and the peer take turns, and the
median of the repetitions counts.

    OMP_NUM_THREADS=2 python -m benchmarks.throughput --json
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import memory, oracle, report
from mora_serve.client import Client
from mora_serve.demo.process import ServerProcess


def main() -> None:
    """Measure, print a table, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--requests", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=32000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(Path(folder), args)
    report.log(f"{'':>12} {'requests':>8} {'ours':>8} {'peer':>8} {'ratio':>6}   tokens/s")
    for row in rows:
        report.log(
            f"{row['adapters']:>12} {row['requests']:>8} {row['ours']:>8.1f} {row['peer']:>8.1f} "
            f"{row['ratio']:>6.2f}   {row['peer_name']}"
        )
    report.emit({"rows": rows, "arguments": vars(args), "environment": report.environment()})


def compare(root: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All cells of the table."""
    (root / "base").mkdir()
    sizes = (args.hidden, args.intermediate, args.layers, args.vocabulary)
    memory.write_model(root / "base", memory.llama_config(*sizes))
    peft = peer(root, max(args.requests))
    generator = torch.Generator().manual_seed(0)
    shape = (max(args.requests), args.prompt)
    prompts = torch.randint(4, args.vocabulary, shape, generator=generator)
    flags = {"base.model": root / "base", "adapters.root": root / "adapters"}
    rows = []
    with ServerProcess(flags) as server, Client(server.address, timeout=600.0) as client:
        server.wait_until_ready(client)
        for i in range(max(args.requests)):
            client.register_adapter(f"a{i}", f"a{i}")
        for distinct in (False, True):
            for count in args.requests:
                batch = prompts[:count]
                ours, theirs = in_turn(
                    args.repeat,
                    partial(served, client, batch, distinct, args.tokens),
                    partial(generated, peft, batch, distinct, args.tokens),
                )
                row = {
                    "adapters": "all distinct" if distinct else "none",
                    "requests": count,
                    "ours": count * args.tokens / ours,
                    "peer": count * args.tokens / theirs,
                    "ratio": theirs / ours,
                    "peer_name": "PEFT, mixed batch" if distinct else "transformers generate",
                }
                report.log(str(row))
                rows.append(row)
    return rows


def in_turn(repeat: int, *measured: Callable[[], None]) -> list[float]:
    """Median seconds of each, run A B A B after one warm-up of each."""
    for run in measured:
        run()
    seconds: list[list[float]] = [[] for _ in measured]
    for _ in range(repeat):
        for run, times in zip(measured, seconds, strict=True):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
    return [statistics.median(times) for times in seconds]


def served(client: Client, prompts: torch.Tensor, distinct: bool, tokens: int) -> None:
    """All prompts at once through gRPC; raises unless every answer has ``tokens`` tokens."""

    def ask(i: int) -> int:
        result = client.generate(
            token_ids=prompts[i].tolist(),
            adapters={f"a{i}": 1.0} if distinct else None,
            base=not distinct,
            max_tokens=tokens,
            ignore_eos=True,
            temperature=0.0,
        )
        return len(result.tokens)

    with ThreadPoolExecutor(len(prompts)) as threads:
        counts: Sequence[int] = list(threads.map(ask, range(len(prompts))))
    if any(n != tokens for n in counts):
        raise RuntimeError(f"answers have {counts} tokens, not {tokens}")


@torch.no_grad()
def generated(peft: Any, prompts: torch.Tensor, distinct: bool, tokens: int) -> None:
    """The same work by transformers or PEFT."""
    options = {
        "input_ids": prompts,
        "attention_mask": torch.ones_like(prompts),
        "max_new_tokens": tokens,
        "min_new_tokens": tokens,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    if distinct:
        peft.generate(**options, adapter_names=[f"a{i}" for i in range(len(prompts))])
    else:
        with peft.disable_adapter():
            peft.generate(**options)


def peer(root: Path, count: int) -> Any:
    """The base in 4 bits under transformers, with ``count`` random adapters, each also saved."""
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    fast = torch.cpu._is_avx512_bf16_supported()
    dtype = torch.bfloat16 if fast else torch.float32
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        root / "base", quantization_config=quantization, dtype=dtype
    )
    config = LoraConfig(r=16, lora_alpha=32, target_modules=oracle.PROJECTIONS)
    peft = PeftModel(model, config, adapter_name="a0")
    for i in range(count):
        torch.manual_seed(i)
        if i:
            peft.add_adapter(f"a{i}", config)
        for module in peft.modules():
            if hasattr(module, "lora_B"):
                module.lora_B[f"a{i}"].weight.data.normal_(std=0.01)
        peft.save_pretrained(str(root / "adapters"), selected_adapters=[f"a{i}"])
    return peft.eval()


if __name__ == "__main__":
    main()
