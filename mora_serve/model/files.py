"""A base's files before any weight is read: where they are, what its configuration says.

Nothing here imports torch, so that what asks for a shape alone is quick.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mora_serve.errors import ConfigError
from mora_serve.model.shape import ModelShape, shape_from_config

CONFIG = ("config.json",)
ALL = ("*.json", "*.safetensors", "*.jinja")  # of a hub's files


def resolve(model: str, revision: str = "main", patterns: Sequence[str] = ALL) -> Path:
    """The directory of a model: a local one, the bundled demo's, or a hub id's snapshot.

    Of the hub only files of these ``patterns`` are fetched. Raises ConfigError.
    """
    if model == "demo":
        from mora_serve.demo.bundle import bundle_path

        return bundle_path() / "base"
    if (path := Path(model)).is_dir():
        return path
    from huggingface_hub import snapshot_download

    try:
        snapshot = snapshot_download(
            model,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=["consolidated*", "*/*"],  # the same weights again, in other formats
        )
        return Path(str(snapshot))
    except Exception as e:
        raise ConfigError(
            f"base.model: {model!r} is neither a directory nor a model that the hub gives "
            f"({type(e).__name__}); download it first or give its directory",
            field="base.model",
        ) from e


def read_config(directory: Path) -> tuple[dict[str, Any], ModelShape]:
    """What config.json holds, and the shape that it describes. Raises ConfigError."""
    try:
        with described():
            hf = json.loads((directory / "config.json").read_text(encoding="utf-8"))
            if not isinstance(hf, dict):
                raise TypeError(f"it holds a {type(hf).__name__}")
            return hf, shape_from_config(hf)
    except OSError as e:
        raise ConfigError(
            f"base.model: config.json cannot be read ({e.strerror}); give the directory or hub id "
            "of a model in the Hugging Face format",
            field="base.model",
        ) from e


@contextmanager
def described() -> Iterator[None]:
    """Errors of values that config.json has or lacks become ConfigError."""
    try:
        yield
    except (ValueError, KeyError, TypeError, ArithmeticError) as e:
        detail = f"missing key: {e.args[0]}" if isinstance(e, KeyError) else str(e)
        raise ConfigError(
            f"base.model: config.json does not describe a model ({detail}); download it again "
            "or correct it",
            field="base.model",
        ) from e


def read_shape(model: str, revision: str = "main") -> ModelShape:
    """The shape of a base by its configuration alone: no weights are needed. Raises ConfigError."""
    return read_config(resolve(model, revision, CONFIG))[1]


def eos_ids(directory: Path, hf: dict[str, Any]) -> frozenset[int]:
    """The ids that end an answer, of generation_config.json where it has them, else of ``hf``."""
    eos = hf.get("eos_token_id")
    try:
        generation = json.loads((directory / "generation_config.json").read_text(encoding="utf-8"))
        eos = generation.get("eos_token_id", eos)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, AttributeError) as e:
        raise ConfigError(
            "base.model: generation_config.json cannot be read; download it again or remove it",
            field="base.model",
        ) from e
    return frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos])
