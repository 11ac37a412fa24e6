"""The LoRA kernels of vLLM and SGLang, taken out of their published wheels.

    python -m benchmarks.lora_peers [FOLDER]

downloads the two wheels with pip and unpacks the few pure-Python files that hold the kernels and
their launches. The rest of those packages is not needed: what these files import from it is stood
in for here (flags at their defaults, a logger, the platform). Nothing of theirs is kept with this
project.

A peer serves one adapter a row. It gets the same numbers as our slots in the layout that it wants,
and the metadata of a step as its own code makes them, with exact counts (in graphs of theirs it may
be padded): the launches that are timed are its own.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.report import ROOT, log
from mora_serve.model.lora import AdapterSlots

FOLDER = ROOT / "benchmarks" / "results" / "tmp" / "lora_peers"
_VLLM = "vllm/lora/ops/triton_ops/"
_SGLANG = "sglang/kernels/ops/lora/dense/"
WHEELS: Mapping[str, tuple[str, ...]] = {
    "vllm==0.33.0": tuple(
        f"{_VLLM}{name}.py"
        for name in (
            "kernel_utils",
            "lora_expand_op",
            "lora_kernel_metadata",
            "lora_shrink_op",
            "utils",
        )
    ),
    "sglang==0.5.23": (
        *(
            f"{_SGLANG}{name}.py"
            for name in ("chunked_sgmv_expand", "chunked_sgmv_shrink", "lora_tuning_config")
        ),
        f"{_SGLANG}csgmv_configs/",
    ),
}
DOWNLOAD_SECONDS = 600  # 360 MB
SGLANG_CHUNK = 16  # rows of a segment, the server's default


class Peer(Protocol):
    """A LoRA implementation over the same adapters as some slots of ours."""

    def fill(self, slots: Sequence[int]) -> None:
        """Lay out a step: one slot a row."""
        ...

    def apply(self, layer: int, site: str, x: Tensor, y: Tensor) -> None:
        """Add the adapters' deltas to y in place."""
        ...


Maker = Callable[[AdapterSlots, int, float], Peer]


def fetch(folder: Path) -> None:
    """Download the wheels and unpack what is needed of them into ``folder``."""
    for wheel, names in WHEELS.items():
        with tempfile.TemporaryDirectory() as scratch:
            log(f"downloading {wheel} ...")
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q"]
            command += ["--retries", "1", "--timeout", "5"]  # seconds without an answer
            subprocess.run([*command, "-d", scratch, wheel], check=True, timeout=DOWNLOAD_SECONDS)
            (path,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(path) as archive:
                wanted = [n for n in archive.namelist() if n.startswith(names)]
                archive.extractall(folder, wanted)


def load(folder: Path) -> Mapping[str, Maker]:
    """The peers by name; each takes slots, the most rows, and the scaling that B holds.

    Raises ImportError when the folder has no kernels, or they ask for what is not stood in for.
    """
    sys.path.insert(0, str(folder))
    try:
        _stand_in_for_vllm(folder)
        _stand_in_for_sglang(folder)
        for name in (*_VLLM_MODULES, *_SGLANG_MODULES):
            importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))
    return {"vllm": Vllm, "sglang": Sglang}


_VLLM_MODULES = tuple(
    f"vllm.lora.ops.triton_ops.{n}"
    for n in ("lora_shrink_op", "lora_expand_op", "lora_kernel_metadata")
)
_SGLANG_MODULES = tuple(
    f"sglang.kernels.ops.lora.dense.chunked_sgmv_{n}" for n in ("shrink", "expand")
)


class Vllm:
    """vLLM: shrink into a zeroed float32 buffer, then expand; as its PunicaWrapperGPU does."""

    def __init__(self, slots: AdapterSlots, rows: int, scaling: float) -> None:
        shrink, expand, metadata = map(sys.modules.__getitem__, _VLLM_MODULES)
        self._shrink, self._expand = shrink.lora_shrink, expand.lora_expand
        self._meta = metadata.LoRAKernelMeta.make(slots.slots, rows, slots.device)
        self._scaling = scaling
        self._weights = [
            {
                site: (
                    [part.a for part in parts],
                    [(part.b / scaling).transpose(1, 2).contiguous() for part in parts],
                )
                for site, parts in sites.items()
            }
            for sites in slots.layers
        ]
        self._rows = 0

    def fill(self, slots: Sequence[int]) -> None:
        """See Peer."""
        self._rows = len(slots)
        self._meta.prepare_tensors(torch.tensor(slots, dtype=torch.int32))

    def apply(self, layer: int, site: str, x: Tensor, y: Tensor) -> None:
        """See Peer."""
        a, b = self._weights[layer][site]
        shape = (len(a), len(x), a[0].shape[1])
        inner = torch.empty(shape, dtype=torch.float32, device=x.device)
        step = self._meta.meta_args(self._rows, True)
        self._shrink(x, a, inner, *step, self._scaling)
        self._expand(inner, b, y, *step, offset_start=0, add_inputs=True)


class Sglang:
    """SGLang's csgmv backend, its default: chunks of sorted rows, shrink then expand."""

    def __init__(self, slots: AdapterSlots, rows: int, scaling: float) -> None:
        shrink, expand = map(sys.modules.__getitem__, _SGLANG_MODULES)
        self._shrink = shrink.chunked_sgmv_lora_shrink_forward
        self._expand = expand.chunked_sgmv_lora_expand_forward
        self._device = slots.device
        self._ranks = torch.tensor(slots.ranks, dtype=torch.int32, device=slots.device)
        self._scalings = torch.full((slots.slots,), scaling, device=slots.device)
        self._weights = [
            {site: self._stacked(parts, scaling) for site, parts in sites.items()}
            for sites in slots.layers
        ]
        self._info: Any = None

    def _stacked(self, parts: Sequence[Any], scaling: float) -> tuple[Any, ...]:
        a = torch.cat([part.a for part in parts], 1)
        b = torch.cat([part.b for part in parts], 2) / scaling
        starts = torch.tensor([*(p.start for p in parts), b.shape[2]], dtype=torch.int32)
        widest = max(part.width for part in parts)
        return a, b.transpose(1, 2).contiguous(), starts, starts.to(self._device), widest

    def fill(self, slots: Sequence[int]) -> None:
        """See Peer; segments of one adapter, at most SGLANG_CHUNK rows each."""
        order = sorted(range(len(slots)), key=slots.__getitem__)
        starts, adapters = [0], []
        for place, row in enumerate(order, 1):
            last = place == len(order) or slots[order[place]] != slots[row]
            if last or place - starts[-1] == SGLANG_CHUNK:
                starts.append(place)
                adapters.append(slots[row])

        def ints(values: Iterable[int]) -> Tensor:
            return torch.tensor(list(values), dtype=torch.int32, device=self._device)

        self._info = SimpleNamespace(
            bs=len(slots),
            use_cuda_graph=False,
            num_segments=len(adapters),
            max_len=SGLANG_CHUNK,
            seg_indptr=ints(starts),
            weight_indices=ints(adapters),
            permutation=ints(order),
            lora_ranks=self._ranks,
            scalings=self._scalings,
        )

    def apply(self, layer: int, site: str, x: Tensor, y: Tensor) -> None:
        """See Peer."""
        a, b, starts, on_device, widest = self._weights[layer][site]
        inner = self._shrink(x, a, self._info, len(starts) - 1)
        self._expand(inner, b, self._info, on_device, widest, y, starts)


def _module(name: str, **content: Any) -> None:
    module = ModuleType(name)
    module.__dict__.update(content)
    sys.modules[name] = module


def _packages(folder: Path, *names: str) -> None:
    """Packages whose own __init__ is left out: only the modules asked for are run."""
    for name in names:
        _module(name, __path__=[str(folder.joinpath(*name.split(".")))])


def _stand_in_for_vllm(folder: Path) -> None:
    _packages(folder, "vllm", "vllm.lora", "vllm.lora.ops", "vllm.lora.ops.triton_ops")
    _packages(folder, "vllm.utils")
    flags = {
        "VLLM_BATCH_INVARIANT": False,
        "VLLM_TUNED_CONFIG_FOLDER": None,
        "VLLM_LORA_ENABLE_DUAL_STREAM": False,
        "VLLM_LORA_DISABLE_PDL": False,
    }
    _module("vllm.envs", **flags)
    sys.modules["vllm"].__dict__["envs"] = sys.modules["vllm.envs"]

    def init_logger(name: str) -> Any:
        logger = logging.getLogger(name)
        return SimpleNamespace(warning_once=logger.debug, info_once=logger.debug)

    _module("vllm.logger", init_logger=init_logger)
    platform = SimpleNamespace(
        is_cuda=torch.cuda.is_available,
        is_device_capability=lambda c: torch.cuda.get_device_capability() == (c // 10, c % 10),
        has_device_capability=lambda c: torch.cuda.get_device_capability() >= (c // 10, c % 10),
    )
    _module("vllm.platforms", current_platform=platform)
    triton = importlib.import_module("triton")
    _module("vllm.triton_utils", triton=triton, tl=importlib.import_module("triton.language"))
    _module("vllm.utils.math_utils", next_power_of_2=triton.next_power_of_2)

    def on_device(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    def no_custom_op(**_: Any) -> None:
        raise AttributeError  # then the functions themselves are used

    _module(
        "vllm.utils.torch_utils",
        async_tensor_h2d=on_device,
        direct_register_custom_op=no_custom_op,
    )


def _stand_in_for_sglang(folder: Path) -> None:
    _packages(folder, "sglang", "sglang.kernels", "sglang.kernels.ops", "sglang.kernels.ops.lora")
    _packages(folder, "sglang.kernels.ops.lora.dense", "sglang.srt", "sglang.srt.lora")
    off = SimpleNamespace(get=lambda: False)
    flags = SimpleNamespace(
        SGLANG_ENABLE_LORA_CSGMV_SPLIT_K=off, SGLANG_ENABLE_DETERMINISTIC_INFERENCE=off
    )
    _module("sglang.srt.environ", envs=flags)
    _module("sglang.srt.lora.utils", LoRABatchInfo=Any)

    def uncached(_: Any) -> Callable[[Any], Any]:
        return lambda kernel: kernel  # saves the launches' time on the host, which graphs have none

    def device_name() -> str:
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"

    _module("sglang.srt.utils", cached_triton_kernel=uncached, get_device_name=device_name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lora_peers", description=__doc__)
    parser.add_argument(
        "folder", type=Path, nargs="?", default=FOLDER, help="where the files are put"
    )
    args = parser.parse_args(argv)
    try:
        fetch(args.folder)
    except (subprocess.SubprocessError, OSError, ValueError) as e:
        log(f"error: {e}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
