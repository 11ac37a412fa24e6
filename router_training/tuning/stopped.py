"""Going on with a run that was stopped: of the same settings, rows and base, or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from mora_serve.errors import InvalidArgument
from router_training.tuning import ranks
from router_training.tuning.settings import TuneSettings

CHECKPOINTS, RUN_FILE = "checkpoints", "run.json"
# what may change between the start of a run and its going on
FREE = frozenset(
    {
        *("logging_steps", "report_to", "register_to", "register_tasks", "output_dir", "name"),
        *("check", "metrics", "eval_rows", "card_prompts", "save_total_limit"),
        *("general_datasets", "general_tasks", "general_tasks_path", "general_rows"),
    }
)


def claim(settings: TuneSettings, data: str, fingerprint: str, *, goes_on: bool) -> None:
    """Note what the output directory's run is of; where it goes on, it must be of the same.

    ``data`` is the rows' digest, ``fingerprint`` the base's. Raises InvalidArgument.
    """
    mine = {"settings": settings_digest(settings), "data": data, "base": fingerprint}
    file = Path(settings.output_dir) / RUN_FILE
    if goes_on and file.exists():
        theirs = json.loads(file.read_text())
        for key, what in (("base", "base"), ("data", "rows"), ("settings", "settings")):
            if theirs.get(key) != mine[key]:
                raise InvalidArgument(
                    f"output_dir: it has a run that was stopped, with other {what}; give another "
                    "directory, or delete it to begin anew",
                    field="output_dir",
                )
    elif ranks.first():
        file.write_text(json.dumps(mine, indent=1) + "\n")


def last_checkpoint(settings: TuneSettings, data: str, fingerprint: str) -> Path | None:
    """Where a stopped run of TRL's trainers goes on; ``claim`` for it. Raises InvalidArgument."""
    found = sorted(
        (Path(settings.output_dir) / CHECKPOINTS).glob("checkpoint-*"),
        key=lambda path: int(path.name.rpartition("-")[2]),
    )
    whole = [path for path in found if (path / "trainer_state.json").exists()]
    claim(settings, data, fingerprint, goes_on=bool(whole))
    return whole[-1] if whole else None


def run_digest(settings: TuneSettings, data: str, fingerprint: str) -> str:
    """Of settings, rows and base together."""
    return hashlib.sha256(f"{settings_digest(settings)} {data} {fingerprint}".encode()).hexdigest()


def settings_digest(settings: TuneSettings) -> str:
    """Of all that a run's weights depend on but its rows and base."""
    values = {k: v for k, v in dataclasses.asdict(settings).items() if k not in FREE}
    values["processes"] = ranks.count()
    if settings.start_from:
        weights = Path(settings.start_from) / "adapter_model.safetensors"
        if weights.is_file():
            values["start"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
