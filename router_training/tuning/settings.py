"""What a run is told: one YAML file with Axolotl's names, checked before anything loads."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from mora_serve.adapters.untrusted import check_name
from mora_serve.errors import InvalidArgument
from mora_serve.model.shape import PROJECTIONS
from router_training.settings import check_bounds, read_mapping, settings_of

DatasetType = Literal[
    "auto", "chat_template", "sharegpt", "alpaca", "prompt_completion", "completion", "input_output"
]


def _doc(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Dataset:
    """Where rows come from, and how they are read."""

    path: str = _doc(
        dataclasses.MISSING, "a file (jsonl, json, parquet, csv), a folder of them, or a hub name"
    )
    type: DatasetType = field(
        default="auto", metadata={"help": "the form of a row; auto goes by its columns"}
    )
    data_files: tuple[str, ...] = _doc((), "of a hub name or a folder: these files alone")
    name: str | None = _doc(None, "of a hub name: the configuration")
    split: str = _doc("train", "of a hub name or of named files")
    field_messages: str = _doc("messages", "the column of a chat's turns")
    roles_to_train: tuple[str, ...] = _doc(("assistant",), "turns of these roles are learned")
    rows: int = _doc(0, "the first so many rows; 0: all")
    weight: float = _doc(1.0, "how often its rows are drawn, beside the other datasets'")
    adapter: str = _doc("", "of several adapters at once: the one that learns from it")
    replay: bool = _doc(
        False, "general data against forgetting: no part of the evaluation, nor of the card"
    )


@dataclass(frozen=True)
class LoraDrop:
    """LoRA-Drop (arXiv 2402.07721): layers whose adapters say little share one, or lose theirs."""

    mode: Literal["share", "drop"] = _doc("drop", "share one adapter among them, or drop it")
    sample: float = _doc(0.1, "the part of the rows that importance is measured on")
    steps: int = _doc(20, "training steps before that")
    threshold: float = _doc(0.9, "layers are kept until this part of all importance")


@dataclass(frozen=True)
class Check:
    """The quality check: what may not get worse, by how much, for an adapter to be registered."""

    metric: Literal["loss", "exact_match", "accuracy", "f1", "bleu", "none"] = _doc(
        "loss", "of the held-out rows, against the base without the adapter; none: no check of them"
    )
    margin: float = _doc(0.0, "how much worse it may be, in the metric's own units")
    general_margin: float = _doc(
        0.02, "how much less of general_datasets, and of each of general_tasks, may be right"
    )


@dataclass(frozen=True)
class TuneSettings:
    """A run's settings; Axolotl's names where Axolotl has one."""

    datasets: tuple[Dataset, ...] = _doc(dataclasses.MISSING, "what is learned from")
    base_model: str = _doc("demo", "a directory, a hub id, or 'demo'")
    output_dir: str = _doc("./adapter-out", "where everything is written")
    name: str = _doc("", "what the adapter is called; the last part of output_dir if empty")

    adapter: Literal["lora", "qlora", "full"] = _doc("qlora", "what is trained")
    load_in_4bit: bool | None = _doc(None, "NF4, as it is served; with qlora that is so anyway")
    bnb_4bit_use_double_quant: bool = _doc(
        False, "scales in 8 bits: 4.13 bits a weight instead of 4.5, no longer as it is served"
    )
    lora_r: int = _doc(16, "rank")
    lora_alpha: float = _doc(32.0, "scaling is alpha / r, or alpha / sqrt(r) with rsLoRA")
    lora_dropout: float = _doc(0.0, "of the adapters' inputs")
    lora_target_modules: tuple[str, ...] = _doc(PROJECTIONS, "which projections get an adapter")
    lora_rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "other ranks, by module name or pattern"}
    )
    lora_alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "other alphas, by module name or pattern"}
    )
    peft_use_rslora: bool = _doc(False, "rank-stabilised scaling")
    peft_use_dora: bool = _doc(False, "DoRA")
    peft_init_lora_weights: Literal["default", "gaussian", "eva"] = _doc(
        "default", "how A begins; B is zero"
    )
    adalora: bool = _doc(False, "ranks move between modules; saved as LoRA with a rank pattern")
    adalora_init_r: int = _doc(0, "rank that AdaLoRA begins with; 0: 1.5 lora_r")
    loraplus_lr_ratio: float = _doc(0.0, "LoRA+: B learns so many times as fast as A; 0: no LoRA+")
    lora_drop: LoraDrop | None = field(default=None, metadata={"help": "LoRA-Drop, with its keys"})

    test_datasets: tuple[Dataset, ...] = _doc((), "what is held out; else val_set_size")
    val_set_size: float = _doc(0.05, "rows held out: a part below 1, a number from 1")
    chat_template: str = _doc("tokenizer_default", "the model's own, or chatml")
    sequence_len: int = _doc(2048, "longest row in tokens")
    sample_packing: bool = _doc(False, "several rows side by side, none sees the other")
    train_on_inputs: bool = _doc(False, "learn prompts too")

    micro_batch_size: int = _doc(8, "rows on a device at a time")
    gradient_accumulation_steps: int = _doc(1, "such batches a step")
    num_epochs: float = _doc(3.0, "passes over the rows")
    max_steps: int = _doc(0, "steps, instead of epochs; 0: by epochs")
    learning_rate: float = _doc(2e-4, "the highest")
    optimizer: Literal[
        "auto", "adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "sgd"
    ] = _doc("auto", "auto: 8 bits with qlora, paged on CUDA")
    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = _doc(
        "cosine", "after the warm-up"
    )
    warmup_ratio: float = _doc(0.03, "of the steps")
    warmup_steps: int = _doc(0, "instead of warmup_ratio")
    weight_decay: float = _doc(0.0, "of the adapters")
    max_grad_norm: float = _doc(1.0, "gradients are cut to it")
    bf16: bool | Literal["auto"] = _doc("auto", "compute in bfloat16; auto: where it is fast")
    gradient_checkpointing: bool = _doc(False, "less memory, more time")
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2"] = _doc(
        "auto", "auto: transformers' choice"
    )
    liger_kernel: bool = _doc(False, "Liger's kernels, where they are installed, on CUDA")
    logging_steps: int = _doc(10, "steps between lines of metrics")
    eval_steps: int = _doc(0, "steps between evaluations; 0: as save_steps, or once an epoch")
    save_steps: int = _doc(0, "steps between checkpoints; 0: with each evaluation")
    save_total_limit: int = _doc(2, "checkpoints kept")
    early_stopping_patience: int = _doc(0, "evaluations without progress; 0: go on")
    load_best_model_at_end: bool = _doc(True, "keep the checkpoint with the least held-out loss")
    seed: int = _doc(0, "of everything that is random")
    report_to: tuple[str, ...] = _doc((), "tensorboard, wandb, mlflow")

    rl: Literal["dpo", "ipo", "kto", "orpo", "simpo"] | None = _doc(None, "of `prefer`: the method")
    rl_beta: float = _doc(0.1, "of preferences: how far from the reference")
    kto_desirable_weight: float = _doc(1.0, "of KTO")
    kto_undesirable_weight: float = _doc(1.0, "of KTO")
    start_from: str = _doc("", "an adapter's directory to go on with")

    metrics: tuple[str, ...] = _doc(
        ("exact_match",), "of generated answers: exact_match, accuracy, f1, bleu"
    )
    general_datasets: tuple[Dataset, ...] = _doc(
        (), "rows of what the base can do: answered before and after, to see what was forgotten"
    )
    eval_rows: int = _doc(64, "held-out rows that answers are generated for")
    general_tasks: tuple[str, ...] = _doc(
        (), "lm-eval's tasks, such as mmlu or hellaswag, before and after (extra eval)"
    )
    general_tasks_path: str = _doc("", "a folder of tasks' YAML files instead of lm-eval's own")
    general_rows: int = _doc(200, "rows of each of these tasks; 0: all")
    check: Check = field(default_factory=Check, metadata={"help": "the quality check"})
    register_to: str = _doc(
        "",
        "HOST:PORT of the server that gets the adapter, tls:HOST:PORT for TLS; the key that it may "
        "ask for is in MORA_API_KEY",
    )
    register_tasks: tuple[str, ...] = _doc((), "task hints it serves")
    card_prompts: int = _doc(16, "prompts of the training rows in its routing card")


# Other names of the same.
ALIASES: Mapping[str, str] = {
    "fine_tuning_method": "adapter",
    "flash_attention": "attn_implementation",
    "lora_target_linear": "lora_target_modules",
    "use_rslora": "peft_use_rslora",
    "use_dora": "peft_use_dora",
    "lr": "learning_rate",
    "orpo_alpha": "rl_beta",
    "micro_batch": "micro_batch_size",
}

# Axolotl's keys that there is nothing for here, and why.
ELSEWHERE: Mapping[str, str] = {
    "deepspeed": "start the run with `accelerate launch` and its DeepSpeed configuration",
    "fsdp": "start the run with `accelerate launch` and its FSDP configuration",
    "fsdp_config": "start the run with `accelerate launch` and its FSDP configuration",
    "trust_remote_code": "no code of a model's own is run",
    "load_in_8bit": "the base is served in NF4 or as it is; take load_in_4bit",
    "lora_modules_to_save": "the base is shared, so nothing of it can be part of an adapter",
    "lora_on_cpu": "adapters are merged nowhere",
    "lora_model_dir": "name the adapter to go on with as start_from",
    "gptq": "training is on NF4 or unquantised bases",
    "relora_steps": "ReLoRA changes the base, which all adapters share",
    "metric_for_best_model": "the held-out loss decides",
    "dpo_loss_type": "take rl: dpo or rl: ipo",
    "evals_per_epoch": "take eval_steps",
    "saves_per_epoch": "take save_steps",
    "group_by_length": "batches are drawn by chance",
    "lora_fan_in_fan_out": "the supported bases have no such layers",
    "peft_layers_to_transform": "name modules in lora_target_modules, or take lora_drop",
    "unfrozen_parameters": "nothing of the shared base is trained; take adapter: full apart",
    "dataset_prepared_path": "rows are prepared in memory",
    "push_dataset_to_hub": "nothing is uploaded; the output directory is a PEFT directory",
    "hub_model_id": "nothing is uploaded; the output directory is a PEFT directory",
    "eval_sample_packing": "evaluation is never packed",
    "pad_to_sequence_len": "batches are as long as their longest row",
    "wandb_project": "take report_to: wandb and WANDB_PROJECT",
    "mlflow_experiment_name": "take report_to: mlflow and MLFLOW_EXPERIMENT_NAME",
    "resume_from_checkpoint": "a run goes on by itself; give another output_dir for a new one",
    "tokenizer_type": "the base's own tokenizer is used, as it is served",
    "model_type": "the architecture is read from the base's configuration",
    "special_tokens": "the vocabulary is the base's, which all adapters share",
    "tokens": "the vocabulary is the base's, which all adapters share",
    "fp16": "float16 overflows on the supported bases; take bf16",
    "tf32": "float32 products stay exact",
    "strict": "every key is checked",
}
DATASET_ELSEWHERE: Mapping[str, str] = {
    "roles": "human, gpt and their like are known; name those to learn in roles_to_train",
    "message_property_mappings": "role and content, or from and value, are read as they are",
    "message_field_role": "role and from are read as they are",
    "message_field_content": "content and value are read as they are",
    "train_on_eos": "an answer's end is always learned",
    "ds_type": "the file's name says it",
    "shards": "take rows",
}
_METRICS = ("exact_match", "accuracy", "f1", "bleu")
_REPORTERS = ("tensorboard", "wandb", "mlflow")
_BOUNDS: Mapping[str, tuple[float, float]] = {
    "lora_r": (1, 1024),
    "lora_alpha": (1e-3, 1e5),
    "lora_dropout": (0.0, 0.9),
    "adalora_init_r": (0, 1024),
    "loraplus_lr_ratio": (0.0, 1e3),
    "val_set_size": (0.0, 1e7),
    "sequence_len": (8, 1 << 20),
    "micro_batch_size": (1, 4096),
    "gradient_accumulation_steps": (1, 4096),
    "num_epochs": (0.001, 10_000),
    "max_steps": (0, 10_000_000),
    "learning_rate": (1e-9, 1.0),
    "warmup_ratio": (0.0, 1.0),
    "warmup_steps": (0, 1_000_000),
    "weight_decay": (0.0, 10.0),
    "max_grad_norm": (1e-6, 1e6),
    "logging_steps": (1, 1_000_000),
    "eval_steps": (0, 1_000_000),
    "save_steps": (0, 1_000_000),
    "save_total_limit": (1, 1000),
    "early_stopping_patience": (0, 1000),
    "seed": (0, 2**32 - 1),
    "rl_beta": (0.0, 100.0),
    "kto_desirable_weight": (0.0, 1e3),
    "kto_undesirable_weight": (0.0, 1e3),
    "eval_rows": (0, 1_000_000),
    "general_rows": (0, 10_000_000),
    "card_prompts": (0, 1000),
}


def read_tune_settings(file: Path, overrides: Iterable[str] = ()) -> TuneSettings:
    """The settings of a file, with ``--key value`` pairs of a command line over them.

    Raises InvalidArgument, naming the key, for whatever is wrong with them.
    """
    values = read_mapping(file)
    for path, value in _pairs(list(overrides)):
        _put(values, path, value)
    return tune_settings(values)


def tune_settings(values: Mapping[str, Any]) -> TuneSettings:
    """Settings from a mapping. Raises InvalidArgument."""
    settings = settings_of(_renamed(values), TuneSettings)
    _check(settings)
    return settings


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        if key in ELSEWHERE:
            raise _wrong(str(key), f"mora-serve does not have this key: {ELSEWHERE[key]}")
        own = ALIASES.get(str(key), str(key))
        if key == "lora_target_linear":
            value = list(PROJECTIONS) if value else []
        elif key == "flash_attention":
            value = "flash_attention_2" if value else "auto"
        if own in out:
            raise _wrong(str(key), f"it is given twice, also as {own}; leave one out")
        out[own] = value
    for key in ("datasets", "test_datasets", "general_datasets"):
        for i, dataset in enumerate(out.get(key) or ()):
            for name in dataset if isinstance(dataset, dict) else ():
                if name in DATASET_ELSEWHERE:
                    where = f"{key}.{i}.{name}"
                    raise _wrong(
                        where, f"mora-serve does not have this key: {DATASET_ELSEWHERE[name]}"
                    )
    return out


def _check(s: TuneSettings) -> None:
    check_bounds(s, _BOUNDS)
    if not s.datasets:
        raise _wrong("datasets", "there are none; name at least one, as in '- path: chats.jsonl'")
    for i, dataset in enumerate(s.datasets):
        if not 0 < dataset.weight <= 1e3:
            raise _wrong(f"datasets.{i}.weight", f"{dataset.weight} is not above 0, at most 1000")
    if all(d.replay for d in s.datasets):
        raise _wrong("datasets", "all are replay, so there is nothing to learn; add your own")
    if s.adapter == "qlora" and s.load_in_4bit is False:
        raise _wrong("load_in_4bit", "qlora is on a 4-bit base; take adapter: lora, or true")
    if s.adapter == "full" and s.load_in_4bit:
        raise _wrong("load_in_4bit", "4-bit weights cannot be trained; take adapter: qlora")
    for module in s.lora_target_modules:
        if module not in PROJECTIONS:
            near = difflib.get_close_matches(module, PROJECTIONS, 1)
            hint = (
                f"did you mean {near[0]!r}?" if near else f"give some of {', '.join(PROJECTIONS)}"
            )
            raise _wrong("lora_target_modules", f"{module!r} is not a projection; {hint}")
    if not s.lora_target_modules:
        raise _wrong("lora_target_modules", "there are none; leave it out for all projections")
    _check_one_of("metrics", s.metrics, _METRICS)
    _check_one_of("report_to", s.report_to, _REPORTERS)
    if not s.val_set_size and not s.test_datasets and s.early_stopping_patience:
        raise _wrong("early_stopping_patience", "no rows are held out; give val_set_size")
    if s.load_best_model_at_end and s.eval_steps and s.save_steps % s.eval_steps:
        raise _wrong(
            "save_steps",
            f"{s.save_steps} is no multiple of eval_steps, {s.eval_steps}, so the best checkpoint "
            "could not be kept; give one, or load_best_model_at_end: false",
        )
    _check_together(s)
    if s.lora_drop is not None:
        check_bounds(s.lora_drop, {"sample": (1e-6, 1.0), "steps": (1, 1e6), "threshold": (0, 1)})
    if s.chat_template not in ("tokenizer_default", "chatml"):
        raise _wrong(
            "chat_template", f"{s.chat_template!r} is neither tokenizer_default nor chatml"
        )
    check_name(adapter_name(s), "name")


# Keys that go with these methods; all others that _check_together knows do not.
WITH_ADALORA = {
    *("adalora", "register_to", "train_on_inputs", "general_datasets", "loraplus_lr_ratio")
}
WITH_FULL = {"sample_packing", "train_on_inputs", "general_datasets"}
WITH_PREFERENCES = {
    *("peft_use_dora", "peft_use_rslora", "lora_rank_pattern", "lora_alpha_pattern"),
    *("start_from", "register_to"),
}


def _check_together(s: TuneSettings) -> None:
    """Keys that would be ignored, or fail late, beside others."""
    choices = {
        "peft_use_dora": s.peft_use_dora,
        "peft_use_rslora": s.peft_use_rslora,
        "lora_drop": s.lora_drop is not None,
        "lora_rank_pattern": bool(s.lora_rank_pattern),
        "lora_alpha_pattern": bool(s.lora_alpha_pattern),
        "peft_init_lora_weights": s.peft_init_lora_weights != "default",
        "start_from": bool(s.start_from),
        "loraplus_lr_ratio": s.loraplus_lr_ratio != 0,
        "sample_packing": s.sample_packing,
        "adalora": s.adalora,
        "register_to": bool(s.register_to),
        "train_on_inputs": s.train_on_inputs,
        "general_datasets": bool(s.general_datasets),
    }
    methods = (
        (s.adalora, WITH_ADALORA, "AdaLoRA moves ranks itself and is saved as plain LoRA"),
        (s.adapter == "full", WITH_FULL, "full fine-tuning has no adapter"),
        (s.rl is not None, WITH_PREFERENCES, "preferences are learned without it"),
    )
    for chosen, taken, why in methods:
        for key, given in choices.items():
            if chosen and given and key not in taken:
                raise _wrong(key, f"{why}; leave it out")
    if s.lora_drop is not None and s.peft_use_dora:
        raise _wrong("lora_drop", "importance is measured of plain LoRA; leave peft_use_dora out")
    if s.rl == "kto" and s.micro_batch_size < 2:
        raise _wrong("micro_batch_size", "KTO compares rows of a batch; give 2 or more")
    if s.rl is not None:
        for i, dataset in enumerate(s.datasets):
            if dataset.adapter or dataset.replay:
                key = "adapter" if dataset.adapter else "replay"
                raise _wrong(f"datasets.{i}.{key}", "preferences train one adapter; leave it out")


def checkable(s: TuneSettings) -> None:
    """Whether the quality check can be made after a run. Raises InvalidArgument."""
    if s.rl is not None:
        raise _wrong(
            "rl", "`run` checks answers; train preferences with `prefer`, then `register` them"
        )
    metric = s.check.metric
    if metric == "none":
        return
    if not s.val_set_size and not s.test_datasets:
        raise _wrong(
            "check.metric",
            f"no rows are held out to measure {metric} on; give val_set_size, or none",
        )
    if metric != "loss" and metric not in s.metrics:
        raise _wrong("check.metric", f"{metric} is not among metrics; add it there, or take loss")
    if metric != "loss" and not s.eval_rows:
        raise _wrong("eval_rows", f"0 leaves no answers to measure {metric} on; give some")


def adapter_name(settings: TuneSettings) -> str:
    """What the adapter is called."""
    return settings.name or Path(settings.output_dir).name


def four_bit(settings: TuneSettings) -> bool:
    """Whether the base is in NF4 while it is trained on."""
    chosen = settings.load_in_4bit
    return settings.adapter == "qlora" if chosen is None else chosen


def _check_one_of(key: str, values: Iterable[str], known: tuple[str, ...]) -> None:
    for value in values:
        if value not in known:
            raise _wrong(key, f"{value!r} is not one of {', '.join(known)}")


def _pairs(words: list[str]) -> list[tuple[str, Any]]:
    """``--key value`` and ``--key=value``, values as YAML has them."""
    out = []
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise _wrong(word, "it is neither a key nor its value; give --key value")
        key, given, value = word[2:].partition("=")
        if not given:
            if not words:
                raise _wrong(key, f"it has no value; give --{key} value")
            value = words.pop(0)
        try:
            out.append((key.replace("-", "_"), yaml.safe_load(value)))
        except yaml.YAMLError as e:
            raise _wrong(key, f"{value!r} is not a YAML value") from e
    return out


def _put(values: dict[str, Any], path: str, value: Any) -> None:
    """Set ``a.0.b`` in nested mappings and lists. Raises InvalidArgument where there is no such."""
    *parents, last = path.split(".")
    place: Any = values
    for i, part in enumerate(parents):
        if isinstance(place, list) and part.isdigit() and int(part) < len(place):
            place = place[int(part)]
        elif isinstance(place, dict):
            place = place.setdefault(part, {})
        else:
            raise _wrong(path, f"there is no {'.'.join(parents[: i + 1])} in the file")
    if isinstance(place, list) and last.isdigit() and int(last) < len(place):
        place[int(last)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise _wrong(path, "there is nothing of this name in the file")


def _wrong(key: str, why: str) -> InvalidArgument:
    return InvalidArgument(f"{key}: {why}", field=key)
