"""The safetensors files of a Hugging Face directory: which file holds which tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mora_serve.errors import ConfigError

INDEX = "model.safetensors.index.json"


class Checkpoint:
    """The tensors of a directory's safetensors files, read one at a time from the mapped file.

    The index says which file holds what; without one it is model.safetensors, else all files.
    """

    def __init__(self, directory: Path, device: torch.device) -> None:
        self.device = device
        self._files: dict[str, Any] = {}
        with ExitStack() as stack:
            try:
                for file, wanted in _files(directory):
                    handle = stack.enter_context(safe_open(str(file), framework="pt"))
                    for key in handle.keys():  # noqa: SIM118 - not a dict
                        if wanted is None or key in wanted:
                            self._add(key, handle)
            except (SafetensorError, OSError) as e:
                raise ConfigError(
                    "base.model: a .safetensors file is missing or broken; download the model "
                    "again (a Git LFS pointer is not the file itself)",
                    field="base.model",
                ) from e
            self._stack = stack.pop_all()

    def _add(self, key: str, handle: Any) -> None:
        if key in self._files:
            raise ConfigError(
                f"base.model: tensor {key} is in two .safetensors files, and no "
                f"{INDEX} says which one counts; remove the files of the other model",
                field="base.model",
            )
        self._files[key] = handle

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def beside(self, name: str) -> Iterator[str]:
        """The keys stored beside a weight, e.g. its absmax."""
        return (key for key in self._files if key.startswith(name + "."))

    def size(self, name: str) -> tuple[int, ...]:
        """A tensor's size, by the file's header. Raises ConfigError when it is missing."""
        self._check(name)
        return tuple(self._files[name].get_slice(name).get_shape())

    def on_host(self, name: str) -> Tensor:
        """One tensor as it is in the mapped file. Raises ConfigError when it is missing."""
        self._check(name)
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def tensor(
        self,
        name: str,
        dtype: torch.dtype | None = None,
        size: tuple[int, ...] | None = None,
        part: tuple[slice, slice] | None = None,
    ) -> Tensor:
        """One tensor on the device, or the rows and columns of a matrix that ``part`` says.

        Raises ConfigError when it is missing or not of that size.
        """
        self._check(name)
        if size is not None and (found := self.size(name)) != size:
            raise ConfigError(
                f"base.model: tensor {name} is {list(found)}, by the configuration it "
                f"should be {list(size)}; check that both are of one model",
                field="base.model",
            )
        file = self._files[name]
        tensor: Tensor = file.get_tensor(name) if part is None else file.get_slice(name)[part]
        return tensor.to(self.device, dtype, copy=dtype is not None)

    def _check(self, name: str) -> None:
        if name not in self._files:
            raise ConfigError(
                f"base.model: tensor {name} is missing; download the model again",
                field="base.model",
            )


def _files(directory: Path) -> list[tuple[Path, set[str] | None]]:
    """The files of a checkpoint, each with the tensors to take from it; None takes all."""
    index, single = directory / INDEX, directory / "model.safetensors"
    if index.exists():
        try:
            shards: dict[str, set[str]] = {}
            for key, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
                shards.setdefault(str(file), set()).add(key)
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ConfigError(
                f"base.model: {INDEX} holds no weight_map; download it again", field="base.model"
            ) from e
        return [(directory / file, keys) for file, keys in sorted(shards.items())]
    files = [single] if single.exists() else sorted(directory.glob("*.safetensors"))
    if not files:
        raise ConfigError(
            "base.model: the directory holds no .safetensors file; convert the weights first "
            "(pickle files are never opened)",
            field="base.model",
        )
    return [(file, None) for file in files]
