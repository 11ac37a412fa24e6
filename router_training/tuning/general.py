"""General ability, before and after: lm-eval's tasks on the base alone and with an adapter.

Of the extra ``eval``. Answers are scored by transformers and PEFT on the base as it is trained on;
tasks are lm-eval's own, from the hub, or those of YAML files in a folder, which need no network.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mora_serve.errors import InvalidArgument
from mora_serve.model.loading import BaseFiles
from router_training.tuning.model import load
from router_training.tuning.settings import TuneSettings

PREFIX = "general/"  # of the figures' names
_METRICS = ("acc_norm", "acc", "exact_match", "f1", "bleu")  # the first that a task has counts


def general_ability(
    settings: TuneSettings, base: BaseFiles, adapters: Mapping[str, Path]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Each task's figure, of the base and of each adapter by name; 1 is best.

    Of full fine-tuning, an adapter is the whole model. Raises InvalidArgument for a task that is
    not known or cannot be had.
    """
    from peft import PeftModel

    tasks = _Tasks(settings)
    before = tasks.figures(load(settings, base.directory), base)
    after = {}
    for name, directory in adapters.items():
        if settings.adapter == "full":
            model = load(settings, directory)
        else:
            model = PeftModel.from_pretrained(load(settings, base.directory), str(directory))
        after[name] = tasks.figures(model, base)
    return before, after


def check_tasks(settings: TuneSettings) -> None:
    """Raises InvalidArgument for a task that is not known, before anything is trained."""
    if settings.general_tasks:
        _Tasks(settings)


class _Tasks:
    """The settings' tasks."""

    def __init__(self, settings: TuneSettings) -> None:
        from lm_eval.tasks import TaskManager

        self._settings = settings
        self._names = list(settings.general_tasks)
        folder = settings.general_tasks_path
        if folder and not Path(folder).is_dir():
            raise InvalidArgument(
                f"general_tasks_path: {Path(folder).name!r} is no folder; give one with the tasks' "
                "YAML files",
                field="general_tasks_path",
            )
        with _quiet():
            # its own tasks take seconds to index
            self._manager = TaskManager(include_path=folder or None, include_defaults=not folder)
        known = set(self._manager.all_tasks)
        if unknown := [name for name in self._names if name not in known]:
            raise InvalidArgument(
                f"general_tasks: {unknown[0]!r} is not one of "
                + ("the folder's tasks" if folder else "lm-eval's tasks")
                + "; `lm-eval ls tasks` lists its own",
                field="general_tasks",
            )

    def figures(self, model: Any, base: BaseFiles) -> dict[str, float]:
        """What a model reaches."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        model.eval()
        try:
            with _quiet():
                lm = HFLM(
                    pretrained=model,
                    tokenizer=base.tokenizer.hf,
                    batch_size=self._settings.micro_batch_size,
                    max_length=self._settings.sequence_len,
                )
                found = simple_evaluate(
                    model=lm,
                    tasks=self._names,
                    task_manager=self._manager,
                    limit=self._settings.general_rows or None,
                    bootstrap_iters=0,
                    log_samples=False,
                    random_seed=self._settings.seed,
                )
        except OSError as e:
            raise InvalidArgument(
                f"general_tasks: their rows cannot be had ({type(e).__name__}); check the "
                "network, or give local copies with general_tasks_path",
                field="general_tasks",
            ) from e
        return {PREFIX + name: _figure(found["results"][name]) for name in self._names}


def _figure(results: Mapping[str, Any]) -> float:
    by_metric = {key.partition(",")[0]: value for key, value in reversed(list(results.items()))}
    return float(next(by_metric[name] for name in _METRICS if name in by_metric))


@contextlib.contextmanager
def _quiet() -> Any:
    """Without lm-eval's account of itself."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
