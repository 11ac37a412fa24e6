"""Memory of loading a 16-bit model and quantising it: bytes a parameter, and the peak on the way.

Writes a random Llama of the asked shape in bf16 to a temporary directory, shard by shard, then
loads it. Anonymous memory is sampled from the kernel every 5 ms; pages of the mapped files do not
count, since the kernel can drop them. What stays is read once more at the end, after the C library
was asked to give free memory back (malloc_trim, where there is one; the peak is sampled without).
Taking away the embedding, head, norms and rope tables leaves what the linear layers really hold.

    python -m benchmarks.memory --json
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType

import torch
from safetensors.torch import save_file

from benchmarks import families, report
from mora_serve.config import BaseConfig
from mora_serve.model.decoder import Decoder
from mora_serve.model.loading import load_base
from mora_serve.model.shape import PROJECTIONS, ModelShape, projection_path, shape_from_config


class PeakAnonymous:
    """Samples this process's anonymous resident memory while it is entered; bytes."""

    def __init__(self) -> None:
        self.start = self.peak = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakAnonymous:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, anonymous_bytes())


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("the kernel does not report RssAnon")


def give_back() -> None:
    """Return what Python and the C library have freed but kept to the kernel (glibc only)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def unquantised_bytes(decoder: Decoder) -> int:
    """Embedding, head, norms and rope tables; tied tensors once."""
    tensors = [decoder.norm, decoder.cos, decoder.sin]
    for layer in decoder.layers:
        norms = (layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm)
        tensors += [norm for norm in norms if norm is not None]
    tables = {id(w): w.nbytes for w in (decoder.embedding, decoder.head)}
    return sum(tables.values()) + sum(t.nbytes for t in tensors)


def llama_config(hidden: int, intermediate: int, layers: int, vocabulary: int) -> dict[str, object]:
    """The configuration of a Llama with heads of 64 and four query heads a key/value head."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": max(1, hidden // 256),
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def write_model(directory: Path, config: dict[str, object]) -> int:
    """Write a random bf16 model as transformers reads it, a shard a layer; its size in bytes."""
    shape = shape_from_config(config)
    (directory / "config.json").write_text(json.dumps(config))
    families.byte_tokenizer(directory)
    places: dict[str, str] = {}
    size = 0

    def save(tensors: dict[str, torch.Tensor]) -> int:
        name = f"model-{len(places):05d}.safetensors"
        save_file(tensors, str(directory / name), metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, name))
        return sum(t.nbytes for t in tensors.values())

    for i in range(shape.layers):
        prefix = f"model.layers.{i}"
        tensors = {
            f"{projection_path(i, p)}.weight": _random(*shape.projection(p)) for p in PROJECTIONS
        }
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = torch.ones(shape.hidden_size, dtype=torch.bfloat16)
        size += save(tensors)
    size += save(
        {
            "model.embed_tokens.weight": _random(shape.vocab_size, shape.hidden_size),
            "lm_head.weight": _random(shape.vocab_size, shape.hidden_size),
            "model.norm.weight": torch.ones(shape.hidden_size, dtype=torch.bfloat16),
        }
    )
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


def _random(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, dtype=torch.bfloat16) * 0.02


def main() -> None:
    """Write, load, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--vocabulary", type=int, default=32000)
    args = parser.parse_args()
    config = llama_config(args.hidden, args.intermediate, args.layers, args.vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        report.log("writing a random model ...")
        size = write_model(Path(folder), config)
        # What loading imports, before the baseline: a tiny model goes through the same code.
        with tempfile.TemporaryDirectory() as small:
            sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1}
            heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 320}
            write_model(Path(small), {**config, **sizes, **heads})
            load_base(BaseConfig(small, device="cpu"))
        report.log(f"loading {size / 1e9:.2f} GB ...")
        started = time.monotonic()
        give_back()
        with PeakAnonymous() as memory:
            base = load_base(BaseConfig(folder, device="cpu"))
        seconds = time.monotonic() - started
        give_back()
        resident = anonymous_bytes() - memory.start
    shape: ModelShape = base.shape
    linear = resident - unquantised_bytes(base.decoder)
    report.emit(
        {
            "parameters": size // 2,
            "linear_parameters": shape.linear_parameters,
            "bytes_per_linear_parameter": base.linear_bytes / shape.linear_parameters,
            "resident_bytes_per_linear_parameter": linear / shape.linear_parameters,
            "sixteen_bit_bytes": size,
            "peak_anonymous_bytes": memory.peak - memory.start,
            "peak_ratio": (memory.peak - memory.start) / size,
            "resident_ratio": resident / size,
            "seconds": seconds,
            "dtype": str(base.decoder.dtype),
            "environment": report.environment(),
        }
    )


if __name__ == "__main__":
    main()
