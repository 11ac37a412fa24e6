"""Labels found without any: what the adapters add to the answers' likelihood, against the truth.

Fresh single-task prompts of the demo with their answers, no labels. Every row runs under the base
and under each of the bundle's adapters; an adapter that takes most of the likelihood labels it.

    OMP_NUM_THREADS=1 python -m benchmarks.teacher --json
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from benchmarks import report
from mora_serve.config import BaseConfig
from mora_serve.demo.bundle import bundle_path
from mora_serve.model.loading import load_base
from router_training.demo.evaluate import FRESH_SEED
from router_training.demo.manifest import Manifest
from router_training.demo.tasks import TASKS
from router_training.peft_files import load_peft
from router_training.rows import TextRow, token_row
from router_training.teacher import PERPLEXITY, THRESHOLD, likelihood_gains, teach, temperature_of


def main() -> None:
    """Label the rows and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rows", type=int, default=16, help="rows a task")
    parser.add_argument("--seed", type=int, default=FRESH_SEED, help="of the prompts")
    parser.add_argument("--perplexity", type=float, default=PERPLEXITY)
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    bundle = bundle_path()
    manifest = Manifest.read(bundle)
    base = load_base(BaseConfig(str(bundle / manifest.base), dtype="fp32", device="cpu"))
    adapters = load_peft(base.shape, [bundle / a.directory for a in manifest.adapters])
    names = [a.name for a in manifest.adapters]
    asked = [
        (name, token_row(base.tokenizer, TextRow(*example), base.shape.max_positions))
        for name in names
        for example in TASKS[name].examples(args.seed, args.rows)
    ]
    start = time.monotonic()
    gains = likelihood_gains(base.decoder, adapters, [row for _, row in asked], report.log)
    seconds = time.monotonic() - start
    temperature = temperature_of(gains, args.perplexity)
    labels = teach(gains, names, temperature)
    right = [label == (name,) for (name, _), label in zip(asked, labels, strict=True)]
    labelled = [bool(label) for label in labels]
    by_task = {
        name: float(np.mean([r for (n, _), r in zip(asked, right, strict=True) if n == name]))
        for name in names
    }
    least = min(by_task, key=lambda name: by_task[name])
    report.emit(
        {
            "rows": len(asked),
            "adapters": len(names),
            "agreement": float(np.mean(right)),
            "labelled": float(np.mean(labelled)),
            "agreement_of_labelled": sum(right) / max(1, sum(labelled)),
            "best_adapter_agreement": float(
                np.mean([names[i] == n for i, (n, _) in zip(gains.argmax(1), asked, strict=True)])
            ),
            "agreement_least": by_task[least],
            "agreement_least_task": least,
            "temperature": temperature,
            "perplexity": args.perplexity,
            "threshold": THRESHOLD,
            "seconds": round(seconds, 2),
        }
    )


if __name__ == "__main__":
    main()
