"""Does lm-eval measure this server? A small local task by both of its clients of such servers.

The task asks the bundled examples whose answers are known. ``local-chat-completions`` sends
chats, ``local-completions`` token ids under the chat template; both let the router pick. Each
share of exact answers has to be what the same prompts give over gRPC.

    python -m benchmarks.lm_eval_client [--json]
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks import report
from mora_serve.client import Client
from mora_serve.demo.bundle import bundle_path, read_examples
from mora_serve.demo.process import ServerProcess, free_port

TASK, LONGEST = "mora_examples", 64


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder))
    report.emit({**result, "environment": report.environment()})


def measure(folder: Path) -> dict[str, Any]:
    """Start a server and have lm-eval ask it."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    rows = [e for e in read_examples(bundle_path()) if e.kind == "auto"]
    task(folder, [{"question": e.prompt, "answer": e.answer} for e in rows])
    start, port = time.monotonic(), free_port()
    flags = {"server.http_port": port, "base.model": "demo", "engine.threads": 1}
    with ServerProcess(flags) as server:
        with Client(server.address) as client:
            server.wait_until_ready(client)
            options: Any = {"temperature": 0.0, "max_tokens": LONGEST}
            texts = [client.generate(messages=[("user", e.prompt)], **options).text for e in rows]
        expected = sum(t == e.answer for t, e in zip(texts, rows, strict=True)) / len(rows)
        url = f"http://127.0.0.1:{port}/v1"
        chat = figure(folder, "local-chat-completions", {"base_url": f"{url}/chat/completions"})
        tokenizer = {"tokenizer": str(bundle_path() / "base"), "tokenizer_backend": "huggingface"}
        plain = figure(folder, "local-completions", {"base_url": f"{url}/completions", **tokenizer})
    return {
        "rows": len(rows),
        "expected": expected,
        "chat": chat,
        "completions": plain,
        "agree": chat == plain == expected,
        "seconds": round(time.monotonic() - start, 1),
    }


def task(folder: Path, rows: list[dict[str, str]]) -> None:
    """A task of local files: no hub is asked."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    described = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "generation_kwargs": {"max_gen_toks": LONGEST, "temperature": 0, "until": ["\n\n"]},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / f"{TASK}.yaml").write_text(yaml.safe_dump(described))


def figure(folder: Path, model: str, options: dict[str, Any]) -> float:
    """The share of exact answers that lm-eval finds by one of its clients."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model=model,
        model_args={"model": "auto", "max_length": 512, **options},
        tasks=[TASK],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
        log_samples=False,
    )
    return float(found["results"][TASK]["exact_match,none"])


if __name__ == "__main__":
    main()
