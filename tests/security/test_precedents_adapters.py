"""The precedents about adapters' files, one by one: what other servers did, and what this one does.

``test_adapters.py`` has more of each kind; here each is named. The numbers are those of
secondary sources.
"""

from __future__ import annotations

import ast
import itertools
import json
import os
import pickle
import socket
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mora_serve.adapters import files as adapter_files
from mora_serve.adapters.checksum import stated_sum
from mora_serve.adapters.validate import read_directory, read_upload
from mora_serve.config import AdaptersConfig
from mora_serve.errors import InvalidArgument, MoraError
from tests.adapters.make import (
    LIMITS,
    SHAPE,
    config,
    container,
    directory,
    files,
    key,
    tensors,
)

PACKAGE = Path(adapter_files.__file__).parents[1]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An adapter root with one sound adapter."""
    directory(tmp_path / "root" / "good", config(), tensors())
    return tmp_path / "root"


def refusal(root: Path, path: str = "good", limits: AdaptersConfig = LIMITS) -> MoraError:
    """The typed error of a registration, in whose text nothing of the server's insides stands."""
    with pytest.raises(MoraError) as e:
        read_directory(root, path, SHAPE, limits)
    for leak in (str(root), str(root.parent), "Traceback", " at 0x", ".py"):
        assert leak not in e.value.message
    assert e.value.field
    return e.value


def rejected(weights: bytes, limits: AdaptersConfig = LIMITS, **changes: Any) -> MoraError:
    config_bytes = json.dumps(config(**changes)).encode()
    with pytest.raises(InvalidArgument) as e:
        read_upload(config_bytes, weights, None, SHAPE, limits)
    return e.value


class Runs:
    """Makes a directory when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self._mark),)


# Pickle


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"])
def test_pickled_weights_are_refused_unopened(root: Path, suffix: str, monkeypatch: Any) -> None:
    """SGLang CVE-2026-15969, the pickle paths of vLLM and TensorRT-LLM: weights in a pickle ran
    code when they were loaded. Here such a file is named and never opened.
    """
    mark = root / "was-run"
    (root / "good" / WEIGHTS).unlink()
    (root / "good" / f"adapter_model{suffix}").write_bytes(pickle.dumps(Runs(mark)))
    names: list[str] = []
    real = os.open

    def watched(path: Any, *args: Any, **options: Any) -> int:
        names.append(str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", watched)
    assert refusal(root).reason == "PICKLE"
    assert WEIGHTS in names
    assert not [n for n in names if n.endswith(suffix)]
    assert not mark.exists()


def test_a_pickle_named_as_safetensors_is_not_run(root: Path) -> None:
    """SGLang CVE-2026-15969: the extension is not what decides: a checkpoint as torch saves it,
    and a bare pickle, under the name of a safetensors file.
    """
    mark = root / "was-run"
    payload = pickle.dumps(Runs(mark))
    with zipfile.ZipFile(root / "good" / WEIGHTS, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
    assert refusal(root).reason == "PICKLE"
    (root / "good" / WEIGHTS).write_bytes(payload)
    assert refusal(root).reason == "PICKLE"
    assert not mark.exists()


def test_the_server_has_no_way_to_unpickle() -> None:
    """vLLM's and TensorRT-LLM's pickle paths: no module of the server imports one, nor calls
    ``torch.load`` without ``weights_only``.

    Rank 0 of tensor parallelism writes its orders as pickles for its own workers, through pipes
    that they inherit: no address can be written to. It does not read any by itself.
    """
    writes = {"engine/team.py": {"pickle"}}
    unsafe = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").partition(".")[0]}
            else:
                names = set()
                if isinstance(node, ast.Attribute) and node.attr in ("load", "loads"):
                    owner = node.value.id if isinstance(node.value, ast.Name) else ""
                    assert owner not in {"torch", *unsafe}, file.name
            allowed = writes.get(file.relative_to(PACKAGE).as_posix(), set())
            assert not names & (unsafe - allowed), file.name


# Configuration


@pytest.mark.parametrize(
    "extra",
    [
        {"auto_map": {"AutoModel": "evil--module.Class"}},
        {"auto_map": "evil.Class"},
        {"trust_remote_code": True},
        {"custom_pipelines": {"x": {"impl": "evil.Pipe"}}},
        {"modeling_file": "evil"},
        {"__class__": "evil"},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_a_configuration_cannot_name_code(root: Path, extra: dict[str, Any]) -> None:
    """vLLM CVE-2026-22807: ``auto_map`` in a configuration ran code from a repository. Here keys
    that are not known are refused, whatever they hold.
    """
    (root / "good" / "evil.py").write_text("raise SystemExit")
    (root / "good" / CONFIG).write_text(json.dumps(config(**extra)))
    error = refusal(root)
    assert error.code == "INVALID_ARGUMENT"
    assert next(iter(extra)) in error.message


# Paths


@pytest.mark.parametrize(
    "path",
    ["../outside", "good/../../outside", "/etc/passwd", "..", "good/..\0", "%2e%2e/outside",
     "..\\outside", "....//outside", "good/.../x", "{root}/../outside", "\u2025/outside"],
)  # fmt: skip
def test_a_path_stays_below_the_root(root: Path, path: str) -> None:
    """Triton CVE-2026-24208: path traversal through a model's name."""
    directory(root.parent / "outside", config(), tensors())
    error = refusal(root, path.format(root=root))
    assert error.reason in ("INVALID_PATH", "NO_DIRECTORY")


def test_symbolic_links_are_refused_at_every_place(root: Path) -> None:
    """Triton CVE-2026-24208: a link in the repository led out of it."""
    outside = directory(root.parent / "outside", config(), tensors())
    (root / "linked").symlink_to(outside)
    (root / "above").symlink_to(root.parent)
    for path in ("linked", "above/outside", "above/root/good"):
        assert refusal(root, path).reason == "INVALID_PATH"
    for name in (CONFIG, WEIGHTS):
        half = directory(root / f"half-{name}", config(), tensors())
        (half / name).unlink()
        (half / name).symlink_to(outside / name)
        assert refusal(root, half.name).reason == "INVALID_PATH"
    dangling = directory(root / "dangling", config(), tensors())
    (dangling / "routing_card.json").symlink_to("nowhere")
    assert refusal(root, "dangling").reason == "INVALID_PATH"


def test_a_hard_link_that_somebody_else_may_have_made_is_refused(root: Path) -> None:
    """Triton CVE-2026-24208, by another kind of link: who may write to a directory may link there
    a file that only the server can read. Where only the files' owner may, links are a copy's
    cheaper sister.
    """
    secret = directory(root.parent / "secret", config(), tensors())
    linked = root / "linked"
    linked.mkdir()
    for name in (CONFIG, WEIGHTS):
        os.link(secret / name, linked / name)
    for mode in (0o777, 0o757, 0o775):  # others, and the group
        linked.chmod(mode)
        error = refusal(root, "linked")
        assert (error.reason, error.field) == ("INVALID_PATH", CONFIG)
    linked.chmod(0o755)
    assert read_directory(root, "linked", SHAPE, LIMITS).rank == 4
    if os.geteuid() == 0:  # another owner's directory
        os.chown(linked, 12345, -1)
        assert refusal(root, "linked").reason == "INVALID_PATH"


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "directory"])
def test_only_regular_files_are_read(root: Path, name: str, kind: str) -> None:
    """Triton CVE-2026-24208's kin: a file that is none made a server hang or read a device."""
    path = root / "good" / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            here = Path.cwd()
            os.chdir(path.parent)  # a socket's name is short
            try:
                server.bind(name)
            finally:
                os.chdir(here)
    elif os.geteuid() == 0:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero
    else:
        path.symlink_to("/dev/zero")
    assert refusal(root).reason in ("INVALID_PATH", "UNREADABLE")


def test_a_directory_swapped_between_the_check_and_the_reading_changes_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The race behind CVE-2026-24208's repair: each part is opened from the one above it, so a
    link that takes a checked directory's place is not followed.
    """
    outside = directory(root.parent / "outside", config(rank=2), tensors(rank=2))
    read = adapter_files.read_file

    def swapped(opened: int, name: str, limits: AdaptersConfig) -> bytes | None:
        if not (root / "moved").exists():
            (root / "good").rename(root / "moved")
            (root / "good").symlink_to(outside)
        return read(opened, name, limits)

    monkeypatch.setattr(adapter_files, "read_file", swapped)
    assert read_directory(root, "good", SHAPE, LIMITS).rank == 4


def test_a_file_swapped_while_it_is_read_is_noticed_by_its_sum(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same race one level below: other weights come between the configuration and the
    weights. With the SHA-256 that the sender states they are refused.
    """
    import hashlib

    good = root / "good"
    stated = hashlib.sha256((good / CONFIG).read_bytes() + (good / WEIGHTS).read_bytes())
    sha256 = stated_sum(stated.hexdigest().upper(), required=True)
    assert read_directory(root, "good", SHAPE, LIMITS, sha256=sha256).rank == 4
    read = adapter_files.read_file
    evil = files(config(), tensors(seed=9))[1]

    def swapped(opened: int, name: str, limits: AdaptersConfig) -> bytes | None:
        if name == WEIGHTS:
            (good / "other").write_bytes(evil)
            (good / "other").rename(good / WEIGHTS)
        return read(opened, name, limits)

    monkeypatch.setattr(adapter_files, "read_file", swapped)
    with pytest.raises(InvalidArgument, match="do not have the SHA-256") as e:
        read_directory(root, "good", SHAPE, LIMITS, sha256=sha256)
    assert (e.value.field, e.value.reason) == ("sha256", "SHA256_MISMATCH")


def test_a_file_written_to_while_it_is_read_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same without a sum: the size or the time of the file tells."""
    fstat, calls = os.fstat, itertools.count()

    def changing(fd: int) -> os.stat_result:
        if next(calls) == 1:
            (root / "good" / CONFIG).write_text(json.dumps(config(lora_alpha=99)) + " ")
        return fstat(fd)

    monkeypatch.setattr(os, "fstat", changing)
    error = refusal(root)
    assert (error.reason, error.field) == ("CHANGED", CONFIG)


# Sizes: vLLM CVE-2025-48956, Triton CVE-2025-33201


def test_the_length_of_a_header_is_not_believed() -> None:
    """vLLM CVE-2025-48956, Triton CVE-2025-33201: a size in a request became an allocation."""
    good = files(config(), tensors())[1]
    for length in (0, 1, len(good), 1 << 31, 1 << 63, (1 << 64) - 1):
        assert rejected(length.to_bytes(8, "little") + good[8:]).reason in (
            "BAD_WEIGHTS",
            "INVALID_JSON",
        )


def test_metadata_is_capped() -> None:
    """Triton CVE-2025-33201: metadata without a bound. 64 KiB, and of strings alone."""
    pairs: list[tuple[dict[str, Any], str]] = [
        ({"format": "x" * (1 << 17)}, "TOO_LARGE"),
        ({f"k{i}": "v" * 16 for i in range(1 << 12)}, "TOO_LARGE"),
        ({"format": {"a": 1}}, "BAD_WEIGHTS"),
        ({"format": 1}, "BAD_WEIGHTS"),
    ]
    for metadata, reason in pairs:
        assert rejected(with_header(__metadata__=metadata)).reason == reason
    small = with_header(__metadata__={"format": "pt"})
    assert read_upload(json.dumps(config()).encode(), small, None, SHAPE, LIMITS).rank == 4


def test_rank_bytes_and_tensor_count_are_capped(root: Path) -> None:
    """vLLM CVE-2025-48956, Triton CVE-2025-33201: each size that a caller can make large."""
    directory(root / "high", config(rank=8), tensors(rank=8))
    assert refusal(root, "high", replace(LIMITS, max_rank=7)).reason == "RANK_TOO_LARGE"
    assert refusal(root, "good", replace(LIMITS, max_bytes=1000)).reason == "TOO_LARGE"
    assert refusal(root, "good", replace(LIMITS, max_tensors=3)).reason == "TOO_LARGE"
    (root / "good" / CONFIG).write_text(" " * (1 << 20) + json.dumps(config()))
    assert refusal(root).reason == "TOO_LARGE"


# The container: "before anything reaches the device"


def with_header(**changes: Any) -> bytes:
    """A sound file whose header has other entries for some keys; None leaves a key out."""
    data = files(config(), tensors())[1]
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length]) | changes
    return container({k: v for k, v in header.items() if v is not None}, data[8 + length :])


A = key(0, "q_proj", "A.weight")
B = key(0, "q_proj", "B.weight")


def entry(name: str) -> dict[str, Any]:
    data = with_header()
    found: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])[name]
    return found


def test_offsets_lie_in_the_file_and_do_not_overlap() -> None:
    """ecosystem.md's last precedent: offsets beyond the file, backwards, overlapping, with a gap,
    so large that they wrap around, or no integers.
    """
    start, end = entry(A)["data_offsets"]
    size = end - start
    wrong: list[Any] = [
        [start + (1 << 40), end + (1 << 40)], [end, start], [-size, 0],
        [start + 4, end + 4], [start - 4, end - 4], [0, size] if start else [size, 2 * size],
        [(1 << 64) - size, 1 << 64], [start + 0.5, end + 0.5], [str(start), str(end)],
        [start], [start, end, end], None, True, {}, [True, size + 1], [start, 1e400],
    ]  # fmt: skip
    for offsets in wrong:
        changed = {A: entry(A) | {"data_offsets": offsets}}
        assert rejected(with_header(**changed)).reason in ("BAD_WEIGHTS", "INVALID_JSON"), offsets


@pytest.mark.parametrize("dtype", ["F64", "I8", "F8_E4M3", "BOOL", "f32", "", 5, None, ["F32"]])
def test_types_that_cannot_be_served_are_refused(dtype: Any) -> None:
    """ecosystem.md's last precedent: the type is checked, and so is the extent that it means."""
    changed = {A: entry(A) | {"dtype": dtype}}
    assert rejected(with_header(**changed)).reason == "BAD_WEIGHTS"


@pytest.mark.parametrize(
    "shape", [[], [0, 32], [4], [32, 4], [4, 4, 8], [-4, -32], [1 << 62, 1 << 62], "4", [4.0, 32]]
)
def test_shapes_are_those_of_the_base(shape: Any) -> None:
    """ecosystem.md's last precedent: a shape that is not the base's never reaches a kernel."""
    changed = {A: entry(A) | {"shape": shape}}
    error = rejected(with_header(**changed))
    assert error.reason in ("BAD_WEIGHTS", "SHAPE_MISMATCH")


def test_modules_that_the_base_does_not_have_are_refused() -> None:
    """ecosystem.md's last precedent: a tensor of a layer or a projection that is not there."""
    for name in (A.replace("layers.0", "layers.99"), A.replace("q_proj", "lm_head"), "a/../b"):
        changed = {A: None, name: entry(A)}
        assert rejected(with_header(**changed)).reason in (
            "SHAPE_MISMATCH",
            "UNSUPPORTED_ADAPTER",
        )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [A, B])
def test_values_are_finite(bad: float, name: str) -> None:
    """ecosystem.md's last precedent: one NaN in a batch would be everybody's."""
    values = tensors()
    values[name][0, -1] = bad
    assert rejected(files(config(), values)[1]).reason == "NOT_FINITE"


# Texts: Triton CVE-2025-23319, vLLM CVE-2026-22778


def test_no_refusal_tells_of_the_servers_insides(root: Path) -> None:
    """Triton CVE-2025-23319, vLLM CVE-2026-22778: error texts held names of shared memory and
    addresses. ``refusal`` looks at each text; here are those of failing system calls.
    """
    for name in (CONFIG, WEIGHTS):
        path = root / "good" / name
        kept = path.read_bytes()
        path.unlink()
        assert refusal(root).reason == "MISSING_FILE"
        path.write_bytes(kept)
    assert refusal(root, "x" * 300).reason == "INVALID_PATH"
    assert refusal(root, f"good/{WEIGHTS}").reason == "INVALID_PATH"
    assert refusal(root / "gone").reason == "NO_ROOT"
