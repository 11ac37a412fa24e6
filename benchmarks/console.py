"""A browser goes through the console: every view, light and dark, against the bundled models.

It prompts, overrides the router's mixture, compares, stops an answer, registers an adapter by
upload, pins, routes to and unregisters it, and watches the load; each step is checked. Nothing may
be written to the browser's console, nothing asked of another host. Needs Chromium, node, npm and a
package index; takes about a minute. With ``--shots DIR`` the pictures of the views are kept there.

    python -m benchmarks.console --json
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.node_client import NPM_CI, run_script
from mora_serve.client import Client
from mora_serve.demo.bundle import bundle_path
from mora_serve.demo.process import ServerProcess, free_port

WALK = Path(__file__).parent / "browser"
UPLOADED = "swap-ends"  # not registered before, so that nothing else is routed to by its prompts


def main() -> None:
    """Walk and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--shots", type=Path, help="keep pictures of the views here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shots = args.shots or Path(folder) / "shots"
        shots.mkdir(parents=True, exist_ok=True)
        report.emit({**walk(Path(folder), shots), "environment": report.environment()})


def walk(folder: Path, shots: Path) -> dict[str, Any]:
    """How many steps were checked, and which went wrong."""
    copy = folder / "browser"
    shutil.copytree(WALK, copy, ignore=shutil.ignore_patterns("node_modules"))
    subprocess.run(NPM_CI, cwd=copy, check=True, capture_output=True, text=True, timeout=180)
    port = free_port()
    flags = {"server.http_port": port, "server.http_host": "127.0.0.1", "engine.threads": 1}
    with ServerProcess(flags) as server:
        with Client(server.address) as client:
            server.wait_until_ready(client)
            card = client.get_adapter(UPLOADED).card
            client.unregister_adapter(UPLOADED)
        prompts = folder / "prompts.txt"
        prompts.write_text("\n".join(card.prompts))
        adapter = bundle_path() / "adapters" / UPLOADED
        url = f"http://127.0.0.1:{port}"
        command = ["node", "walk.mjs", "--url", url, "--adapter", str(adapter)]
        said, _ = run_script(
            [*command, "--prompts", str(prompts), "--shots", str(shots)], copy, seconds=400
        )
    return {**said, "failed": len(said["failed"]), "failures": said["failed"]}


if __name__ == "__main__":
    main()
