"""Every RPC with bad input, against a real server over gRPC, and a good request after each.

The cases and what is right about an answer stand in ``bad_input_cases``.

    python -m benchmarks.bad_input --json
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import bad_input_cases, families, oracle, report
from mora_serve.client import Client
from mora_serve.config import load_config
from mora_serve.server.app import MoraServer


def main() -> None:
    """Ask and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = families.make_base("llama3", root / "base")
        variants = {name: {"r": 4, "lora_alpha": 8} for name in ("rev", "sum")}
        oracle.make_adapters(model, root / "adapters", variants)
        bad_input_cases.spoil(root / "adapters", good="rev")
        report.emit(asyncio.run(measure(root)))


async def measure(root: Path) -> dict[str, Any]:
    """Serve, and ask from another thread."""
    sections: dict[str, dict[str, Any]] = {
        "base": {"model": root / "base", "quantization": "none", "dtype": "fp32", "device": "cpu"},
        "adapters": {"root": root / "adapters"},
        "server": {"port": 0, "metrics_port": -1},
    }
    flags = {
        f"{section}.{key}": value
        for part in (sections, bad_input_cases.LIMITS)
        for section, values in part.items()
        for key, value in values.items()
    }
    async with MoraServer(load_config(environ={}, flags=flags)) as server:
        return await asyncio.to_thread(ask, server.address, root)


def ask(address: str, root: Path) -> dict[str, Any]:
    """Every case once; what was wrong with the answers."""
    cases, wrong = 0, {}
    with Client(address, timeout=30.0) as client:
        for name in ("rev", "sum"):
            client.register_adapter(name, name, tasks=[f"do-{name}"], prompts=[f"please {name}"])
        for rpc, table in bad_input_cases.CASES.items():
            for case in table:
                cases += 1
                if found := bad_input_cases.wrong(client, rpc, case, root):
                    wrong[f"{rpc}: {case}"] = found
                    report.log(f"{rpc}: {case}: {found}")
    rpcs = sum(bool(table) for table in bad_input_cases.CASES.values())
    return {
        "cases": cases,
        "rpcs": rpcs,
        "wrong": len(wrong),
        "what": wrong,
        "environment": report.environment(),
    }


if __name__ == "__main__":
    main()
