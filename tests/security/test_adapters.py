"""What has gone wrong in other servers when adapters came from outside, one test each."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.adapters.files import open_directory, read_file
from mora_serve.adapters.untrusted import check_name
from mora_serve.adapters.validate import read_directory, read_upload
from mora_serve.errors import InvalidArgument, MoraError
from tests.adapters.make import LIMITS, SHAPE, config, container, directory, files, key, tensors

SECRET = "the secret content of a file outside"  # noqa: S105


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An adapter root with one sound adapter, and a secret adapter outside it."""
    directory(tmp_path / "root" / "good", config(), tensors())
    outside = directory(tmp_path / "outside", config(), tensors())
    (outside / "adapter_config.json").write_text(json.dumps({"peft_type": SECRET}))
    return tmp_path / "root"


def refusal(root: Path, path: str) -> MoraError:
    with pytest.raises(MoraError) as e:
        read_directory(root, path, SHAPE, LIMITS)
    for leak in (str(root), str(root.parent), SECRET, "Traceback", " at 0x"):
        assert leak not in e.value.message
    assert e.value.field
    assert "; " in e.value.message
    return e.value


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (os.mkdir, (str(self._mark),))


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".pkl", ".ckpt", ".BIN"])
def test_pickle_files_are_refused_unopened(root: Path, suffix: str) -> None:
    """Not even opened: a pipe without a writer would make that wait for ever."""
    weights = root / "good" / "adapter_model.safetensors"
    weights.unlink()
    os.mkfifo(weights.with_suffix(suffix))
    error = refusal(root, "good")
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "PICKLE")
    assert "safe_serialization=True" in error.message


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_under_a_trusted_name_is_not_run(root: Path, protocol: int) -> None:
    mark = root / "was-run"
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (root / "good" / name).write_bytes(pickle.dumps(Payload(mark), protocol))
        assert refusal(root, "good").code == "INVALID_ARGUMENT"
    assert not mark.exists()


def test_a_zip_as_torch_saves_it_is_named_for_what_it_is() -> None:
    config_bytes, _ = files(config(), tensors())
    with pytest.raises(InvalidArgument, match="pickle file under another name") as e:
        read_upload(config_bytes, b"PK\x03\x04" + bytes(100), None, SHAPE, LIMITS)
    assert e.value.reason == "PICKLE"


@pytest.mark.parametrize("name", ["auto_map", "custom_modules", "_custom_modules", "megatron_cfg"])
def test_no_key_of_a_configuration_names_code_that_is_imported(root: Path, name: str) -> None:
    """Allowed keys only; those that PEFT writes with names of modules are never looked at."""
    (root / "good" / "evil.py").write_text("raise SystemExit")
    file = root / "good" / "adapter_config.json"
    file.write_text(json.dumps(config(**{name: {"AutoModel": "evil.Model"}})))
    assert name in refusal(root, "good").message
    mapped = {"base_model_class": "Model", "parent_library": "evil"}
    file.write_text(json.dumps(config(auto_mapping=mapped, megatron_core="evil")))
    adapter = read_directory(root, "good", SHAPE, LIMITS)
    assert b"evil" not in adapter.config
    assert "evil" not in sys.modules


@pytest.mark.parametrize(
    "path",
    ["..", "../outside", "good/../../outside", "good/..", "/", "/etc", "./../outside", "//etc",
     "{parent}/outside", "{root}/../outside", "{root}-other", "..\0", "good\0/../.."],
)  # fmt: skip
def test_a_path_cannot_leave_the_root(root: Path, path: str) -> None:
    error = refusal(root, path.format(root=root, parent=root.parent))
    assert (error.code, error.field, error.reason) == ("INVALID_ARGUMENT", "path", "INVALID_PATH")


def test_links_are_not_followed(root: Path) -> None:
    """Neither as a directory on the way, nor as the directory, nor as a file in it."""
    (root / "link").symlink_to(root.parent / "outside")
    (root / "inward").symlink_to(root / "good")
    (root / "up").symlink_to("..")
    for path in ("link", "inward", "up/outside", "inward/."):
        assert refusal(root, path).reason == "INVALID_PATH"
    for name in ("adapter_config.json", "adapter_model.safetensors", "routing_card.json"):
        file = root / "good" / name
        kept = file.read_bytes() if file.exists() else None
        file.unlink(missing_ok=True)
        file.symlink_to(root.parent / "outside" / "adapter_config.json")
        error = refusal(root, "good")
        assert (error.field, error.reason) == (name, "INVALID_PATH")
        file.unlink()
        if kept is not None:
            file.write_bytes(kept)
    assert read_directory(root, "good", SHAPE, LIMITS).rank == 4


def test_a_root_that_is_itself_a_link_is_the_operators_choice(root: Path) -> None:
    (root.parent / "configured").symlink_to(root)
    assert read_directory(root.parent / "configured", "good", SHAPE, LIMITS).rank == 4


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "directory"])
def test_only_regular_files_are_read(root: Path, name: str, make: Callable[[Path], None]) -> None:
    (root / "good" / name).unlink()
    make(root / "good" / name)
    error = refusal(root, "good")
    assert (error.field, error.reason) == (name, "INVALID_PATH")


def test_a_directory_exchanged_after_it_was_opened_changes_nothing(root: Path) -> None:
    with open_directory(root, "good") as opened:
        (root / "good").rename(root / "moved")
        (root / "good").symlink_to(root.parent / "outside")
        content = read_file(opened, "adapter_config.json", LIMITS)
    assert content == (root / "moved" / "adapter_config.json").read_bytes()


def test_a_file_that_changes_after_it_was_read_changes_nothing(root: Path) -> None:
    adapter = read_directory(root, "good", SHAPE, LIMITS)
    before = adapter.array(adapter.modules[0].a).copy()
    (root / "good" / "adapter_model.safetensors").write_bytes(b"\xff" * adapter.nbytes)
    np.testing.assert_array_equal(adapter.array(adapter.modules[0].a), before)


@pytest.mark.parametrize(
    "weights",
    [
        (1 << 63).to_bytes(8, "little") + b"{" * 100,
        (1 << 40).to_bytes(8, "little"),
        container({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}),
        container(b'{"a":' + b"[" * 3_000_000),
        container(b'{"a":{"dtype":"F32","shape":[' + b"9" * 3_000_000 + b"]}}"),
    ],
    ids=["length", "length beyond", "extent", "nesting", "number"],
)
def test_sizes_that_a_file_claims_are_not_allocated(weights: bytes) -> None:
    config_bytes, _ = files(config(), tensors())
    tracemalloc.start()
    try:
        with pytest.raises(InvalidArgument):
            read_upload(config_bytes, weights, None, SHAPE, LIMITS)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_a_file_beyond_the_limit_is_not_read(root: Path) -> None:
    """Sparse files: they claim more than there is memory."""
    for name in ("adapter_model.safetensors", "adapter_config.json", "routing_card.json"):
        file = root / "good" / name
        kept = file.read_bytes() if file.exists() else b"{}"
        with file.open("wb") as f:
            f.truncate(1 << 40)
        error = refusal(root, "good")
        assert (error.field, error.reason) == (name, "TOO_LARGE")
        file.write_bytes(kept)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_reach_no_device(root: Path, bad: float) -> None:
    values = tensors()
    values[key(0, "v_proj", "A.weight")][2, 3] = bad
    directory(root / "bad", config(), values)
    assert refusal(root, "bad").reason == "NOT_FINITE"


@given(st.text(max_size=70))
def test_a_valid_name_is_one_harmless_component_of_a_path(name: str) -> None:
    try:
        check_name(name, "name")
    except InvalidArgument:
        return
    assert name.isascii()
    assert Path("root", name).resolve().parent == Path("root").resolve()
    assert not set(name) & set("/\\\0\n %{}")


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "-x", "_x", "A", "a/b", "a\n", "ä",
                                  "a" * 65, "a b", "a\0", "%2e%2e"])  # fmt: skip
def test_names_that_could_mean_something_else_are_refused(name: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^adapter: .* is not a valid name; use 1 to 64"):
        check_name(name, "adapter")


def test_reading_adapters_loads_neither_torch_nor_pickle_loaders() -> None:
    script = (
        "import sys, mora_serve.adapters.registry\n"
        "heavy = {'torch', 'peft', 'transformers', 'safetensors', 'grpc', 'bitsandbytes'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
    import mora_serve.adapters

    for file in Path(mora_serve.adapters.__path__[0]).glob("*.py"):
        assert "import pickle" not in file.read_text()
