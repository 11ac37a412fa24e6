"""``adapter_config.json`` as PEFT saves it: what of it can be served, and what that means.

The tensors decide which modules an adapter changes; the configuration decides how strongly
(alpha, rank-stabilised or not, patterns) and whether it is DoRA. A key is either known not to
change what is computed, or checked, or has to be empty: nothing is ignored unseen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from mora_serve.adapters.patterns import Patterns
from mora_serve.adapters.untrusted import load_json, quoted
from mora_serve.errors import InvalidArgument

FIELD = "adapter_config.json"
MAX_BYTES = 1 << 20

# What PEFT writes for the record, needs only in training, or what the tensors already say.
_NO_EFFECT = frozenset(
    (
        "task_type",
        "peft_version",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "lora_dropout",
        "megatron_core",
        "runtime_config",
        "qalora_group_size",
        "ensure_weight_tying",
        "eva_config",
        "corda_config",
        "loftq_config",
        "lora_ga_config",
        "nvfp4_merge_aware",  # Axolotl's note for merging the adapter later
    )
)
_READ = frozenset(
    (
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "use_dora",
        "rank_pattern",
        "alpha_pattern",
        "bias",
        "init_lora_weights",
        "fan_in_fan_out",
    )
)
_RETRAIN = "train without it"
_UNSERVED = {
    "modules_to_save": ("it replaces whole modules of the base, which all adapters share", ""),
    "trainable_token_indices": ("it changes the base's embeddings, which all adapters share", ""),
    "layer_replication": ("it changes the base's layers, which all adapters share", ""),
    "lora_bias": ("biases of lora_B are not served", ""),
    "megatron_config": ("Megatron's parallel layers are not served", ""),
    "alora_invocation_tokens": ("activated LoRA (aLoRA) is not served", ""),
    "use_qalora": ("QALoRA is not served", ""),
    "use_mora": ("square high-rank updates (MoRA, a fork of PEFT) are not served", ""),
    "use_bdlora": ("block-diagonal LoRA (BD-LoRA) is not served", ""),
    "velora_config": ("VeLoRA is not served", ""),
    "monteclora_config": ("MonteCLoRA is not served", ""),
    "kasa_config": ("KaSA changes the base's weights, which all adapters share", ""),
    "arrow_config": (
        "Arrow routes between adapters by itself",
        "register its adapters one by one and let the router choose",
    ),
    "target_parameters": ("parameters outside the linear projections are not served", ""),
}
_BASE_KEPT = frozenset(("gaussian", "eva", "orthogonal", "mica"))
_BASE_CHANGED = ("pissa", "olora", "corda", "loftq", "lora_ga")
_FLOAT32_MAX = 3.4e38


@dataclass(frozen=True)
class LoraSettings:
    """What of a LoRA configuration decides the computation."""

    r: int
    lora_alpha: float
    use_rslora: bool
    use_dora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    def ranks(self) -> Patterns[int]:
        """Ranks by module; ask with ``r`` as the default."""
        return Patterns("rank_pattern", self.rank_pattern)

    def alphas(self) -> Patterns[float]:
        """Alphas by module; ask with ``lora_alpha`` as the default."""
        return Patterns("alpha_pattern", self.alpha_pattern)

    def scaling(self, alpha: float, rank: int) -> float:
        """What B(Ax) is multiplied by: alpha / rank, or alpha / sqrt(rank)."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def canonical(self, targets: Collection[str]) -> bytes:
        """The configuration that is hashed and stored: PEFT can load it.

        Two adapters that compute the same have the same bytes, whatever else their files said.
        """
        return json.dumps(
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "inference_mode": True,
                "target_modules": sorted(targets),
                "r": self.r,
                "lora_alpha": _plain(self.lora_alpha),
                "use_rslora": self.use_rslora,
                "use_dora": self.use_dora,
                "rank_pattern": self.rank_pattern,
                "alpha_pattern": {k: _plain(v) for k, v in self.alpha_pattern.items()},
                "bias": "none",
            },
            indent=1,
        ).encode()


def parse_config(data: bytes) -> LoraSettings:
    """Read an ``adapter_config.json`` (at most 1 MiB).

    Raises InvalidArgument, naming the key, for anything that cannot be served exactly.
    """
    config = load_json(data, FIELD, max_bytes=MAX_BYTES)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise _refused(
            "peft_type", kind, "only LORA (PEFT's LoraConfig) is served", "train a LoRA adapter"
        )
    _check_initialisation(config.get("init_lora_weights", True))
    if config.get("bias", "none") != "none":
        raise _refused(
            "bias",
            config["bias"],
            "it changes the base's biases, which all adapters share",
            'train with bias="none"',
        )
    if config.get("fan_in_fan_out") and config.get("use_dora"):
        # For plain LoRA PEFT itself sets it to false on the linear layers that the bases have.
        raise _refused(
            "fan_in_fan_out",
            config["fan_in_fan_out"],
            "with DoRA, magnitudes may have been taken along the wrong side of transposed weights, "
            "which the supported bases do not have",
            "train with it set to false",
        )
    for key, value in config.items():
        if key in _NO_EFFECT or key in _READ or _empty(value):
            continue
        if key in _UNSERVED:
            why, remedy = _UNSERVED[key]
            raise _refused(key, value, why, remedy or _RETRAIN)
        raise _refused(
            quoted(key),
            value,
            "this key is not known, and what it changes would be lost",
            "remove it if the adapter does not need it",
        )
    return LoraSettings(
        r=_rank("r", config.get("r", 8)),
        lora_alpha=_alpha("lora_alpha", config.get("lora_alpha", 8)),
        use_rslora=_flag("use_rslora", config.get("use_rslora")),
        use_dora=_flag("use_dora", config.get("use_dora")),
        rank_pattern={
            k: _rank("rank_pattern", v) for k, v in _table(config, "rank_pattern").items()
        },
        alpha_pattern={
            k: _alpha("alpha_pattern", v) for k, v in _table(config, "alpha_pattern").items()
        },
    )


def _check_initialisation(value: Any) -> None:
    if isinstance(value, bool) or value is None:
        return
    name = value.lower() if isinstance(value, str) else ""
    if name in _BASE_KEPT:
        return
    if name.startswith(_BASE_CHANGED):
        raise _refused(
            "init_lora_weights",
            value,
            "this initialisation changes the base's weights, which all adapters share",
            "save it again as plain LoRA with save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...), or train with init_lora_weights=True",
        )
    raise _refused(
        "init_lora_weights",
        value,
        "this initialisation is not known, and it may change the base",
        f"use true, false, {', '.join(sorted(_BASE_KEPT))}",
    )


def _empty(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _table(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key) or {}
    if isinstance(value, dict):
        return value
    raise _refused(key, value, "it has to be an object", "save the adapter again")


def _rank(key: str, value: Any) -> int:
    if type(value) is int and 1 <= value < 1 << 31:
        return value
    raise _refused(key, value, "a rank is a positive integer", "save the adapter again")


def _alpha(key: str, value: Any) -> float:
    if type(value) in (int, float) and abs(value) <= _FLOAT32_MAX:
        return float(value)
    raise _refused(key, value, "an alpha is a finite number", "save the adapter again")


def _flag(key: str, value: Any) -> bool:
    if value is None or isinstance(value, bool):
        return bool(value)
    raise _refused(key, value, "it has to be true or false", "save the adapter again")


def _plain(number: float) -> float | int:
    return int(number) if number.is_integer() else number


def _refused(key: str, value: Any, why: str, remedy: str) -> InvalidArgument:
    return InvalidArgument(
        f"{FIELD}: {key} is {quoted(value)}, which cannot be served: {why}; {remedy}",
        field=f"{FIELD}:{key}",
        reason="UNSUPPORTED_ADAPTER",
    )
