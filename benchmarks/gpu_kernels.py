"""The mixed adapter product on a card, beside the LoRA kernels of vLLM and SGLang, as one JSON.

    python -m benchmarks.lora_peers
    python -m benchmarks.gpu_kernels

The first command downloads the peers' kernels, where there is a network; without them ours are
measured alone.

All sites of layers of the Llama-3.1-8B shape, rank-16 adapters on all seven projections, 1 to 256
rows; every implementation is captured in a CUDA graph over enough layers that no adapter is left in
the cache. Times are medians, in microseconds a layer. What is computed is compared with float32
first: ``within_rounding``, and ``repeats`` when two runs are alike to the bit.

``--interpret`` does that comparison alone on the CPU, in Triton's interpreter on a small shape:
nothing is timed. Without it, exits with 2 where torch sees no CUDA device.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_card, lora_peers
from benchmarks.report import emit, environment, log
from mora_serve.model.int8_slots import Int8Slots
from mora_serve.model.lora import AdapterSlots
from mora_serve.model.shape import SITES, ModelShape

ROWS = (1, 16, 64, 256)
KINDS = ("uniform", "skewed", "distinct")
RANK = 16
SCALING = 2.0  # a power of two: taking it out of B again changes nothing but the exponent
COLD_BYTES = 400 << 20  # of adapters in a graph: several times the cache of a card
RUNS = 9


@dataclass(frozen=True)
class Sizes:
    """What is measured: the model's shape, and the steps."""

    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    kv_heads: int = 8
    rows: tuple[int, ...] = ROWS
    rank: int = RANK
    dtype: str = "bfloat16"
    device: str = "cuda"


# Triton's interpreter cannot multiply bfloat16, and peers do not go round that.
TINY = Sizes(48, 80, 4, 2, (1, 3), 16, "float16", "cpu")


def steps(sizes: Sizes) -> list[tuple[str, int, list[int]]]:
    """(kind, rows, the adapter of each row), adapters numbered from 0."""
    found = []
    for rows in sizes.rows:
        random_ = random.Random(rows + 4)
        weights = [1 / (i + 1) for i in range(rows)]
        drawn = random_.choices(range(rows), weights, k=rows)
        numbers = {adapter: i for i, adapter in enumerate(dict.fromkeys(drawn))}
        of_kind = {
            "uniform": [0] * rows,
            "skewed": [numbers[adapter] for adapter in drawn],
            "distinct": list(range(rows)),
        }
        kinds = KINDS if rows > 1 else ("distinct",)
        found += [(kind, rows, of_kind[kind]) for kind in kinds]
    return found


def measure(sizes: Sizes, peers: Path) -> dict[str, Any]:
    """All steps; see the module. No times without a card, no peers without their folder."""
    makers: Mapping[str, lora_peers.Maker] = {}
    failed: dict[str, str] = {}
    try:
        makers = lora_peers.load(peers)
    except Exception as e:  # whatever their code raises, it is theirs
        failed["peers"] = f"{type(e).__name__}: {e}"
    rows = []
    for kind, count, adapters in steps(sizes):
        row = _Step(sizes, adapters).measure(makers, failed)
        rows.append({"kind": kind, "rows": count, "adapters": len(set(adapters)), **row})
        log(_line(rows[-1]))
    result: dict[str, Any] = {
        "rows": rows,
        "peers_failed": failed,
        "within_rounding": all(row["within_rounding"] for row in rows),
        "repeats": all(row["repeats"] for row in rows),
        "peers_agree": sorted({name for row in rows for name in row["peers_agree"]}),
    }
    ratios = [row["times_faster"] for row in rows if row.get("times_faster")]
    if ratios and len(ratios) == len(rows):
        result["least_times_faster"] = min(ratios)
    return result


class _Step:
    """The adapters of one step in all layers that are measured, and its inputs."""

    def __init__(self, sizes: Sizes, adapters: Sequence[int]) -> None:
        self.adapters, self.sizes = list(adapters), sizes
        self.cuda = sizes.device == "cuda"
        self.device, self.dtype = torch.device(sizes.device), getattr(torch, sizes.dtype)
        count = max(adapters) + 1
        shape = self._shape(1)
        one = sum(sum(shape.projection(p)) for s in SITES.values() for p in s)
        self.adapter_bytes = one * sizes.rank * self.dtype.itemsize * count
        self.layers = 1
        if self.cuda:
            self.layers = max(2, min(32, -(-COLD_BYTES // self.adapter_bytes)))
        shape = self._shape(self.layers)
        self.slots = AdapterSlots(shape, count, sizes.rank, self.dtype, self.device)
        self.slots.ranks[:] = [sizes.rank] * count
        torch.manual_seed(count)
        for part in self.slots.parts():
            part.a.normal_(0, part.a.shape[2] ** -0.5)
            part.b.normal_(0, sizes.rank**-0.5).mul_(SCALING)
        self.inputs = {
            site: (
                torch.randn(len(adapters), parts[0].a.shape[2]).to(self.device, self.dtype),
                torch.randn(len(adapters), sum(p.width for p in parts)).to(self.device, self.dtype),
            )
            for site, parts in self.slots.layers[0].items()
        }

    def _shape(self, layers: int) -> ModelShape:
        s = self.sizes
        head = s.hidden // s.heads
        sizes = (s.hidden, s.intermediate, layers, s.heads, s.kv_heads, head)
        return ModelShape("llama", 32, *sizes, 64, 1e-6)

    def measure(
        self, makers: Mapping[str, lora_peers.Maker], failed: dict[str, str]
    ) -> dict[str, Any]:
        """One row of the result; what a peer fails with is noted in ``failed``."""
        times: dict[str, float] = {}
        result = self._ours(times)
        result["peers_agree"] = agree = []
        for name, make in makers.items():
            try:
                peer = make(self.slots, len(self.adapters), SCALING)
                peer.fill(self.adapters)
                if self._within(self._outputs(peer.apply)):
                    agree.append(name)
                else:
                    failed[name] = f"another result at {len(self.adapters)} rows"
                if self.cuda:
                    times[name] = self._time(peer.apply)
            except Exception as e:  # whatever their code raises, it is theirs
                failed[name] = f"{type(e).__name__}: {e}"
        if self.cuda:
            result["microseconds"] = times
            if makers and all(name in times for name in makers):
                best = min(times[name] for name in makers)
                result["times_faster"] = best / times[f"tiles_of_{result['tile_rows']}"]
        return result

    def _ours(self, times: dict[str, float]) -> dict[str, Any]:
        """Our product with each size of tiles, checked and timed."""
        # Not before now: Triton reads whether to interpret as kernels are defined.
        from mora_serve.model.kernels.mixed_lora import KernelAdapters, MixtureBuffers
        from mora_serve.model.kernels.mixtures import TILE_ROWS, best_tile_rows

        rows = len(self.adapters)
        mixtures = [((adapter, 1.0),) for adapter in self.adapters]
        buffers = MixtureBuffers(rows, 2, self.slots.slots, self.device)
        ours = KernelAdapters(self.slots, buffers)
        chosen = best_tile_rows(rows, self.slots.slots)
        result: dict[str, Any] = {
            "tile_rows": chosen,
            "layers": self.layers,
            "adapter_bytes": self.adapter_bytes,
            "within_rounding": True,
            "repeats": True,
        }

        def check(adapters: KernelAdapters, name: str) -> None:
            first, second = self._outputs(adapters.apply), self._outputs(adapters.apply)
            result["within_rounding"] &= self._within(first)
            result["repeats"] &= all(torch.equal(first[site], second[site]) for site in first)
            if self.cuda:
                times[name] = self._time(adapters.apply)

        for tile_rows in TILE_ROWS:
            ours.fill(mixtures, [1] * rows, tile_rows)
            check(ours, f"tiles_of_{tile_rows}")
        if self.cuda:
            ours.fill(mixtures, [1] * rows, chosen)
            if torch.cuda.get_device_capability() >= (9, 0):
                check(KernelAdapters(self.slots, buffers, early=True), "early_launches")
            small = Int8Slots.of(self._shape(self.layers), self.slots)
            times["int8"] = self._time(KernelAdapters(small, buffers).apply)
            if self.slots.slots > 1:
                pairs = [((a, 0.7), ((a + 1) % self.slots.slots, 0.3)) for a in self.adapters]
                ours.fill(pairs, [1] * rows)
                times["two_adapters_a_row"] = self._time(ours.apply)
        return result

    def _outputs(self, apply: Callable[..., Any]) -> dict[str, Any]:
        """The first layer's y of every site."""
        outputs = {}
        for site, (x, y) in self.inputs.items():
            outputs[site] = y.clone()
            apply(0, site, x, outputs[site])
        return outputs

    def _within(self, outputs: dict[str, Any]) -> bool:
        """Two roundings of 16 bits (the inner product, y) of the magnitudes that are added."""
        for site, (x, y) in self.inputs.items():
            want, size = y.float(), y.float().abs()
            for part in self.slots.layers[0][site]:
                out = slice(part.start, part.start + part.width)
                h = torch.einsum("nk,nrk->nr", x.float(), part.a[self.adapters].float())
                b = part.b[self.adapters].float()
                want[:, out] += torch.einsum("nr,nro->no", h, b)
                size[:, out] += torch.einsum("nr,nro->no", h.abs(), b.abs())
            worst = ((outputs[site].float() - want).abs() / size).max().item()
            if not worst <= 3 * torch.finfo(self.dtype).eps:
                return False
        return True

    def _time(self, apply: Callable[..., Any]) -> float:
        """Microseconds a layer: all sites of all layers in one CUDA graph, the median of RUNS."""
        from mora_serve.model.kernels.capture import captured

        def work() -> None:
            for layer in range(self.layers):
                for site, (x, y) in self.inputs.items():
                    apply(layer, site, x, y)

        kept = {site: y.clone() for site, (_, y) in self.inputs.items()}
        work()
        graph = captured(work)
        times: list[float] = []
        for _ in range(RUNS + 2):
            for site, (_, y) in self.inputs.items():
                y.copy_(kept[site])  # sums must stay finite: what is added is added each time
            start, end = (
                torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                for _ in range(2)
            )
            torch.cuda.synchronize()
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / self.layers)
        for site, (_, y) in self.inputs.items():
            y.copy_(kept[site])
        return statistics.median(times[2:])


def _line(row: dict[str, Any]) -> str:
    head = f"{row['kind']:<9} {row['rows']:>4} rows {row['adapters']:>4} adapters"
    times = row.get("microseconds")
    if times is None:
        return f"{head}  within rounding: {row['within_rounding']}, repeats: {row['repeats']}"
    return head + "  " + "  ".join(f"{name} {value:.1f}" for name, value in times.items())


def table(result: dict[str, Any]) -> str:
    """The times as a Markdown table, microseconds a layer."""
    names = list(dict.fromkeys(name for row in result["rows"] for name in row["microseconds"]))
    lines = [
        "| step | rows | adapters | " + " | ".join(names) + " | times faster |",
        "|---|---|---|" + "---|" * (len(names) + 1),
    ]
    for row in result["rows"]:
        times = [row["microseconds"].get(name) for name in names]
        cells = ["-" if t is None else f"{t:.1f}" for t in times]
        faster = row.get("times_faster")
        cells.append("-" if faster is None else f"{faster:.2f}")
        lines.append(
            f"| {row['kind']} | {row['rows']} | {row['adapters']} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_kernels", description=__doc__)
    parser.add_argument(
        "--peers", type=Path, default=lora_peers.FOLDER, help="folder of benchmarks.lora_peers"
    )
    parser.add_argument("--fetch", action="store_true", help="download the peers if not there")
    parser.add_argument("--interpret", action="store_true", help="check on the CPU, time nothing")
    parser.add_argument("--out", type=Path, help="write the JSON here, and a table beside it (.md)")
    args = parser.parse_args(argv)
    if not gpu_card.found(args.interpret):
        return 2
    if args.fetch and not args.peers.exists():
        lora_peers.main([str(args.peers)])  # where there is no network ours are measured alone
    result = {**environment(), "interpreted": args.interpret}
    if args.interpret:
        result |= measure(TINY, args.peers)
    else:
        result |= {"device": torch.cuda.get_device_name(), **measure(Sizes(), args.peers)}
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
        if not args.interpret:
            args.out.with_suffix(".md").write_text(table(result))
    emit(result)
    return 0 if result["within_rounding"] and result["repeats"] else 1


if __name__ == "__main__":
    sys.exit(main())
