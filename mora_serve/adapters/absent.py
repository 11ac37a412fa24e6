"""Why a directory holds no adapter, and where the adapter is: said by names, nothing is opened."""

from __future__ import annotations

import itertools
import os
import re

from mora_serve.adapters import header, peft_config
from mora_serve.adapters.untrusted import quoted
from mora_serve.errors import InvalidArgument

_MAX_ENTRIES = 1000
_MAX_FOLDERS = 100  # that are looked into
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
# What trainers save beside an adapter, by torch.save: no adapter in another form.
_TRAINING = (
    *("training_args", "optimizer", "scheduler", "scaler", "rng_state", "random_states"),
    "value_head",  # of a reward model; the adapter beside it is whole without
)
_SHARD = re.compile(r"adapter_model-\d+-of-\d+\.safetensors")
_WHOLE_MODEL = re.compile(r"model(?:-\d+-of-\d+)?\.safetensors")


def is_pickle(name: str) -> bool:
    """Whether a file of this name is read by unpickling, which can run code."""
    return name.lower().endswith(_PICKLES)


def missing(name: str, directory: int | None = None) -> InvalidArgument:
    """An adapter's file is not there; ``directory`` is an open one that is looked at for why."""
    if directory is not None:
        found = _why(name, directory)
        if found is not None:
            return found
    return _missing(name, "the adapter has no such file; give what PEFT's save_pretrained wrote")


def pickle(name: str = header.FIELD) -> InvalidArgument:
    """The adapter comes as a pickle."""
    return InvalidArgument(
        f"{name}: the adapter has only pickle files, which can run code when they are opened, "
        "so they were not opened; where you trust them, load the adapter with PEFT and save it "
        "with save_pretrained(..., safe_serialization=True)",
        field=name,
        reason="PICKLE",
    )


def _why(name: str, directory: int) -> InvalidArgument | None:
    with os.scandir(directory) as entries:
        found = sorted(itertools.islice(entries, _MAX_ENTRIES), key=lambda e: e.name)
        names = [e.name for e in found]
        folders = [e.name for e in found if e.is_dir(follow_symlinks=False)]
    weights = name == header.FIELD
    if weights and any(is_pickle(n) and not n.lower().startswith(_TRAINING) for n in names):
        return pickle()
    if weights and any(map(_SHARD.fullmatch, names)):
        return _missing(
            name,
            "the adapter is in several files; save it again in one, with a larger max_shard_size",
        )
    below = _adapter_below(directory, folders[:_MAX_FOLDERS])
    if below is not None:
        return _missing(
            name, f"it is not here, but in the folder {quoted(below)}; give that directory"
        )
    if any(map(_WHOLE_MODEL.fullmatch, names)):
        return _missing(
            name,
            "this is a whole model, with or without an adapter merged into it; serve it by "
            "base.model, or save the adapter by itself (Unsloth: save_method='lora')",
        )
    if "adapters.safetensors" in names:
        return _missing(
            name,
            "these are MLX's adapters, with other names and transposed matrices; convert them to "
            "PEFT's form",
        )
    if any(n.lower().endswith(".gguf") for n in names):
        return _missing(name, "GGUF is not read; give what the trainer saved before the conversion")
    return None


def _adapter_below(directory: int, folders: list[str]) -> str | None:
    """The folder that holds an adapter: of checkpoints the last, else the first by name."""
    found = []
    for name in folders:
        try:
            below = os.open(
                name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory
            )
        except OSError:  # not ours to read, or exchanged since
            continue
        try:
            os.stat(peft_config.FIELD, dir_fd=below, follow_symlinks=False)
            os.stat(header.FIELD, dir_fd=below, follow_symlinks=False)
            found.append(name)
        except OSError:
            continue
        finally:
            os.close(below)
    steps = {int(m[1]): n for n in found if (m := re.fullmatch(r"checkpoint-(\d{1,18})", n))}
    if "pissa_converted" in found:  # LLaMA-Factory: beside it lie steps that need another base
        return "pissa_converted"
    return steps[max(steps)] if steps else found[0] if found else None


def _missing(name: str, why: str) -> InvalidArgument:
    return InvalidArgument(f"{name}: {why}", field=name, reason="MISSING_FILE")
