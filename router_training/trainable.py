"""Which bases adapters are trained on."""

from __future__ import annotations

from mora_serve.errors import InvalidArgument
from mora_serve.model.files import CONFIG, read_config, resolve
from mora_serve.model.group_checkpoint import METHODS

REMEDIES = {
    "gptq": "train on the 16-bit checkpoint that it was made from, and serve the adapter on this",
    "awq": "train on the 16-bit checkpoint that it was made from, and serve the adapter on that, "
    "as AWQ scales what layers take in",
}


def check_trainable(model: str, field: str) -> None:
    """Raises InvalidArgument that names ``field`` for a base that is stored as GPTQ or AWQ.

    ``model`` is a directory, a hub id or 'demo'. Trainers take gradients through 16-bit and NF4
    weights; those of groups are whole numbers, which only GPTQModel's layers could take them
    through, and no adapter would gain by it. Raises ConfigError where there is no configuration.
    """
    config, _ = read_config(resolve(model, patterns=CONFIG))
    stored = config.get("quantization_config")
    method = stored.get("quant_method") if isinstance(stored, dict) else None
    if method in METHODS:
        raise InvalidArgument(
            f"{field}: the base is stored as {method}, and adapters are trained on 16-bit or NF4 "
            f"weights, which gradients are taken through; {REMEDIES[method]}",
            field=field,
        )
