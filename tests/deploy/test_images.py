"""Dockerfile and compose are linted; what they name is where the server looks for it.

hadolint and compose-spec come with the extra ``deploy``. No image is built here: that takes a
daemon, and base images.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.monitoring import DEPLOY
from benchmarks.report import ROOT
from mora_serve import __version__
from mora_serve.cli import build_parser
from mora_serve.config import load_config

DOCKERFILE = (DEPLOY / "docker" / "Dockerfile").read_text()
COMPOSE = sorted((DEPLOY / "compose").glob("*.yaml"))
USER = "10001:10001"


def hadolint() -> str:
    tool = shutil.which("hadolint") or shutil.which("hadolint", path=Path(sys.executable).parent)
    if tool is None:
        pytest.skip("hadolint is not installed; it is in the extra deploy")
    return tool


def compose(name: str = "compose") -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose" / f"{name}.yaml").read_text())


class TestDockerfile:
    def test_hadolint_finds_nothing(self):
        done = subprocess.run([hadolint(), "-"], input=DOCKERFILE, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, "")

    def test_hadolint_would_find_something(self):
        bad = DOCKERFILE.replace("USER 10001:10001\n", "").replace("# hadolint ignore=DL3008\n", "")
        done = subprocess.run([hadolint(), "-"], input=bad, capture_output=True, text=True)
        assert done.returncode != 0
        assert "DL3008" in done.stdout

    def test_both_images_end_as_a_user_of_a_number(self):
        stages = re.split(r"^FROM .* AS (\S+)$", DOCKERFILE, flags=re.MULTILINE)
        runs = dict(zip(stages[1::2], stages[2::2], strict=True))
        users = {
            name: re.findall(r"^USER (\S+)$", runs["runtime"] + runs[name], re.MULTILINE)[-1]
            for name in ("cpu", "cuda")
        }
        assert set(users.values()) == {USER}

    def test_base_images_are_pinned(self):
        images = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", DOCKERFILE, re.MULTILINE)
        assert len(images) == 1
        assert re.fullmatch(r"python:\d+\.\d+\.\d+-[\w-]+", images[0])
        froms = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
        stages = set(re.findall(r" AS (\S+)$", DOCKERFILE, re.MULTILINE))
        assert set(froms) - stages == {"${PYTHON_IMAGE}"}

    def test_what_it_copies_is_in_the_context(self):
        """.dockerignore lets in what is named, and nothing else."""
        let_in = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
        copies = re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
        sources = {s.removeprefix("./") for copy in copies for s in copy.split()[:-1]}
        assert sources == set(let_in)
        assert all((ROOT / source).exists() for source in sources)

    @pytest.mark.parametrize("name", ["CMD", "HEALTHCHECK"])
    def test_its_commands_are_ones_that_the_command_line_takes(self, name: str):
        (words,) = (
            yaml.safe_load(found)
            for found in re.findall(r"^(?: +)?CMD (\[.+\])$", DOCKERFILE, re.MULTILINE)
            if ("health" in found) == (name == "HEALTHCHECK")
        )
        arguments = words[1:] if words[0] == "mora-serve" else words
        assert build_parser().parse_args(arguments).command in ("serve", "health")

    def test_it_may_write_where_its_configuration_says(self):
        config = load_config(DEPLOY / "docker" / "mora.toml", {})
        (volumes,) = re.findall(r"^VOLUME (\[.+\])$", DOCKERFILE, re.MULTILINE)
        for path in (config.server.state, config.adapters.root):
            assert path in DOCKERFILE
            assert any(Path(path).is_relative_to(v) for v in yaml.safe_load(volumes))

    def test_it_exposes_the_ports_of_its_configuration(self):
        server = load_config(DEPLOY / "docker" / "mora.toml", {}).server
        (ports,) = re.findall(r"^EXPOSE (.+)$", DOCKERFILE, re.MULTILINE)
        exposed = {int(port) for port in ports.split()}
        assert exposed == {server.port, server.http_port, server.metrics_port}

    @pytest.mark.parametrize("left_out", ["", "_mora.", "_native.", "bundle/"])
    def test_a_wheel_that_lacks_an_extension_stops_the_build(self, left_out: str, tmp_path: Path):
        """The check of the first stage, on wheels that it has to take and to refuse."""
        program = re.search(r"RUN python - <<'PYTHON'\n(.+?)\nPYTHON\n", DOCKERFILE, re.DOTALL)
        assert program is not None
        names = (
            "mora_serve/model/native/_mora.cpython-311-x86_64-linux-gnu.so",
            "mora_serve/router/_native.cpython-311-x86_64-linux-gnu.so",
            "mora_serve/demo/bundle/base/config.json",
        )
        with zipfile.ZipFile(tmp_path / "mora_serve-1-py3-none-any.whl", "w") as wheel:
            for name in names:
                if not left_out or left_out not in name:
                    wheel.writestr(name, "")
        code = program[1].replace('"/wheels"', repr(str(tmp_path)))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (done.returncode != 0) == bool(left_out), done.stderr


class TestCompose:
    @pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.stem)
    def test_it_fits_the_compose_specification(self, path: Path):
        spec = pytest.importorskip("compose_spec", reason="the extra deploy is not installed")
        spec.ComposeSpecification.model_validate(yaml.safe_load(path.read_text()), extra="forbid")
        spec.PyCompose.from_yaml(path.read_text()).validate()

    def test_a_key_that_compose_does_not_know_would_be_found(self):
        spec = pytest.importorskip("compose_spec", reason="the extra deploy is not installed")
        bad = compose()
        bad["services"]["mora-serve"]["read-only"] = True
        with pytest.raises(ValueError, match="read-only"):
            spec.ComposeSpecification.model_validate(bad, extra="forbid")

    @pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.stem)
    def test_the_files_that_it_names_are_there(self, path: Path):
        services = yaml.safe_load(path.read_text())["services"]
        for service in services.values():
            for volume in service.get("volumes", ()):
                source = volume.split(":")[0]
                assert not source.startswith(".") or (path.parent / source).exists()
            build = service.get("build", {})
            if "context" in build:
                assert (path.parent / build["context"] / build["dockerfile"]).is_file()
            if build:
                assert re.search(rf"^FROM .+ AS {build['target']}$", DOCKERFILE, re.MULTILINE)

    def test_ports_are_those_of_the_configuration_and_of_loopback(self):
        service = compose()["services"]["mora-serve"]
        config = load_config(DEPLOY / "compose" / "mora.toml", {})
        served = (config.server.port, config.server.http_port)
        assert service["ports"] == [f"127.0.0.1:{port}:{port}" for port in served]
        scrapes = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
        (job,) = scrapes["scrape_configs"]
        assert job["static_configs"] == [{"targets": [f"mora-serve:{config.server.metrics_port}"]}]
        for other in compose()["services"].values():
            assert all(port.startswith("127.0.0.1:") for port in other["ports"])

    def test_grafana_finds_prometheus_and_the_dashboard(self):
        services = compose()["services"]
        provisioning = DEPLOY / "grafana" / "provisioning"
        sources = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())
        host = re.fullmatch(r"http://(\w+):(\d+)", sources["datasources"][0]["url"])
        assert host is not None
        assert services[host[1]]["ports"] == [f"127.0.0.1:{host[2]}:{host[2]}"]
        boards = yaml.safe_load((provisioning / "dashboards" / "mora-serve.yaml").read_text())
        (provider,) = boards["providers"]
        mounts = dict(v.split(":")[:2] for v in services["grafana"]["volumes"])
        assert mounts["../grafana/dashboards"] == provider["options"]["path"]
        assert mounts["../grafana/provisioning"] == "/etc/grafana/provisioning"

    def test_the_server_runs_as_the_images_user_with_a_root_that_is_read_only(self):
        service = compose()["services"]["mora-serve"]
        assert service["user"] == USER
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        config = load_config(DEPLOY / "compose" / "mora.toml", {})
        targets = [v.split(":")[1] for v in service["volumes"]]
        for path in (config.server.state, config.adapters.root):
            assert any(Path(path).is_relative_to(target) for target in targets)

    def test_there_is_time_to_drain(self):
        grace = compose()["services"]["mora-serve"]["stop_grace_period"]
        config = load_config(DEPLOY / "compose" / "mora.toml", {})
        assert float(grace.removesuffix("s")) >= config.server.drain_seconds + 5

    def test_the_images_have_the_servers_version(self):
        for name, device in (("compose", "cpu"), ("cuda", "cuda")):
            image = compose(name)["services"]["mora-serve"]["image"]
            assert image == f"mora-serve:{__version__}-{device}"

    def test_other_images_are_pinned(self):
        images = [s["image"] for s in compose()["services"].values()]
        assert all(re.fullmatch(r"[\w/-]+:v?\d+\.\d+\.\d+(-\w+)?", image) for image in images)
