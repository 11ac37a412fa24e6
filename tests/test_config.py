"""The configuration: precedence, conversion, and errors that say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.config import LEAST_FEEDBACK_BYTES, Config, keys, load_config
from mora_serve.errors import ConfigError


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mora.toml"
    path.write_text(text)
    return path


def load(environ: dict[str, str] | None = None, **flags: Any) -> Config:
    return load_config(
        environ=environ or {}, flags={k.replace("__", "."): v for k, v in flags.items()}
    )


def value(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def test_nothing_given_is_the_defaults() -> None:
    assert load_config(environ={}) == Config()


def test_every_key_has_a_help_text_and_a_default_of_its_type() -> None:
    config = Config()
    for key, (_, default, help_text) in keys().items():
        assert help_text
        assert value(config, key) == default


def test_the_file_is_overridden_by_the_environment_and_that_by_flags(tmp_path: Path) -> None:
    file = write(tmp_path, "[engine]\nmax_batch = 2\npage_size = 2\nmax_queue = 2\n")
    environ = {"MORA_ENGINE_PAGE_SIZE": "3", "MORA_ENGINE_MAX_QUEUE": "3", "HOME": "/"}
    config = load_config(file, environ, {"engine.max_queue": "4"})
    assert (config.engine.max_batch, config.engine.page_size, config.engine.max_queue) == (2, 3, 4)


@given(st.sampled_from(sorted(k for k, (t, _, _) in keys().items() if t is int)), st.integers())
def test_a_text_and_a_number_of_the_same_value_mean_the_same(key: str, number: int) -> None:
    def attempt(given_value: Any) -> Config | str:
        try:
            return load_config(environ={}, flags={key: given_value})
        except ConfigError as e:
            return e.message

    assert attempt(number) == attempt(str(number))


def test_truth_values_are_read_from_text() -> None:
    for text, expected in (("true", True), ("False", False), ("1", True), ("0", False)):
        assert load(engine__prefix_cache=text).engine.prefix_cache is expected


@pytest.mark.parametrize(
    ("key", "given_value"),
    [
        ("engine.max_batch", "many"),
        ("engine.max_batch", 1.5),
        ("engine.max_batch", True),
        ("engine.prefix_cache", "maybe"),
        ("engine.stall_seconds", "soon"),
        ("base.quantization", "int3"),
        ("base.dtype", "fp16"),
    ],
)
def test_a_value_of_the_wrong_type_is_an_error_that_names_key_and_value(
    key: str, given_value: Any
) -> None:
    with pytest.raises(ConfigError) as e:
        load_config(environ={}, flags={key: given_value})
    assert e.value.field == key
    assert key in e.value.message
    assert str(given_value) in e.value.message


@pytest.mark.parametrize(
    ("key", "given_value"),
    [
        ("engine.max_batch", 0),
        ("engine.tensor_parallel", 0),
        ("adapters.slots", -1),
        ("router.max_adapters", -1),
        ("engine.kv_bytes", -1),
        ("router.feedback_bytes", LEAST_FEEDBACK_BYTES - 1),
        ("engine.stall_seconds", float("nan")),
        ("engine.stall_seconds", float("inf")),
        ("engine.step_pace", 0.5),
        ("engine.step_pace", -1.0),
        ("server.port", 65536),
        ("server.port", -1),
        ("server.metrics_port", -2),
    ],
)
def test_a_value_out_of_range_is_an_error(key: str, given_value: Any) -> None:
    with pytest.raises(ConfigError, match="out of range") as e:
        load_config(environ={}, flags={key: given_value})
    assert e.value.field == key


def test_values_that_contradict_each_other_are_an_error_that_names_both() -> None:
    with pytest.raises(ConfigError, match=r"engine\.max_batch"):
        load(engine__step_tokens=8, engine__max_batch=16)
    with pytest.raises(ConfigError, match=r"adapters\.max_mixture"):
        load(adapters__slots=2, adapters__max_mixture=4)
    with pytest.raises(ConfigError, match=r"engine\.kernels: 'native'.*engine\.tensor_parallel"):
        load(engine__tensor_parallel=2, engine__kernels="native")


def test_an_unknown_key_is_an_error_that_names_the_nearest_wherever_it_stands(
    tmp_path: Path,
) -> None:
    file = write(tmp_path, "[engine]\nmax_bacth = 2\n")
    with pytest.raises(ConfigError, match=r"did you mean 'engine\.max_batch'"):
        load_config(file, {})
    with pytest.raises(ConfigError, match=r"MORA_SERVER_PROT.*did you mean 'server\.port'"):
        load({"MORA_SERVER_PROT": "1"})
    with pytest.raises(ConfigError, match=r"did you mean 'base\.model'"):
        load(base__modle="x")


def test_what_kubernetes_injects_for_services_is_ignored() -> None:
    """A Service beside the server must not stop it, whatever of our sections it is named after."""
    environ = {}
    for service in ("MORA_SERVE", "MORA_SERVER", "MORA_ROUTER", "MORA_GATEWAY"):
        environ |= {
            f"{service}_SERVICE_HOST": "10.0.0.1",
            f"{service}_SERVICE_PORT": "50051",
            f"{service}_SERVICE_PORT_GRPC": "50051",
            f"{service}_PORT": "tcp://10.0.0.1:50051",
            f"{service}_PORT_50051_TCP": "tcp://10.0.0.1:50051",
            f"{service}_PORT_50051_TCP_PROTO": "tcp",
            f"{service}_PORT_50051_TCP_PORT": "50051",
            f"{service}_PORT_50051_TCP_ADDR": "10.0.0.1",
        }
    assert load(environ) == Config()
    assert load({**environ, "MORA_SERVER_PORT": "7"}).server.port == 7
    with pytest.raises(ConfigError, match=r"server\.port"):
        load({"MORA_SERVER_PORT": "http://10.0.0.1"})


def test_a_file_that_is_missing_or_broken_is_an_error_that_shows_no_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read") as e:
        load_config(tmp_path / "none.toml", {})
    assert str(tmp_path) not in e.value.message
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(write(tmp_path, "[engine\n"), {})
    with pytest.raises(ConfigError, match="outside any"):
        load_config(write(tmp_path, "port = 1\n"), {})


@pytest.mark.parametrize(
    ("key", "number"),
    [
        ("server.max_message_bytes", 2**31),
        ("adapters.max_adapters", 2**31),
        ("engine.max_queue", 2**32),
        ("engine.stall_seconds", 0),
        ("server.port", 65536),
    ],
)
def test_what_no_server_could_keep_to_is_refused(key: str, number: int) -> None:
    with pytest.raises(ConfigError, match="it must be") as e:
        load_config(environ={}, flags={key: number})
    assert e.value.field == key


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mora.toml").write_bytes(b"[base]\nmodel = '\xff'\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(tmp_path / "mora.toml", {})
