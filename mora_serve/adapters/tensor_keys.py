"""The keys of an adapter's tensors, as PEFT and the trainers around it write them.

PEFT's is ``base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight``. Accepted besides: the
name ``default`` that older versions leave in it, a key without ``base_model.model.``, and what
torch wraps modules in (torch.compile, DistributedDataParallel, FSDP, activation checkpoints).
None of these changes which matrix is meant.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from mora_serve.adapters.header import FIELD
from mora_serve.adapters.untrusted import quoted
from mora_serve.errors import InvalidArgument
from mora_serve.model.shape import PROJECTIONS, projection_path

_WRAPPERS = re.compile(
    r"(?:\A|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|\Amodule\."
)
_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<path>model\.layers\.(?P<layer>0|[1-9][0-9]{0,4})"
    r"\.(?:self_attn|mlp)\.(?P<projection>[a-z]+_proj))"
    r"\.lora_(?P<part>A|B|magnitude_vector)(?:\.default)?(?:\.weight)?"
)
_PROJECTIONS_ONLY = "target only these projections, and save neither embeddings nor whole modules"
# What else PEFT's trainers save, the first that is found in a key: why not, and what to do.
_OTHERS = (
    (
        r"\.base_layer\.",
        "the file holds the base's own weights",
        "save the adapter alone, with the PEFT model's save_pretrained",
    ),
    (
        r"lora_embedding_[AB]|(?:embed_tokens|lm_head)\.lora_",
        "LoRA on the embedding or the head is not served",
        "train with the projections alone as target_modules",
    ),
    (
        r"(?:embed_tokens|lm_head)(?:\.modules_to_save)?(?:\.default)?\.weight\Z",
        "the whole embedding or head is in the file, which all adapters share; PEFT adds it when "
        "the vocabulary was resized",
        "where it was not trained, save with save_embedding_layers=False: neither embeddings nor "
        "whole modules are served",
    ),
    (
        r"lora_B(?:\.default)?\.bias\Z",
        "a bias of lora_B is not served: this tensor is not lora_A, lora_B or "
        "lora_magnitude_vector",
        "train with lora_bias=False",
    ),
)


class Place(NamedTuple):
    """Which matrix a tensor is: ``part`` is 'A', 'B' or 'magnitude_vector'."""

    layer: int
    projection: str
    part: str

    @property
    def path(self) -> str:
        """The projection's path in the model."""
        return projection_path(self.layer, self.projection)


def parse_key(key: str) -> Place:
    """The place of a tensor by its key.

    Raises InvalidArgument for what is no part of a projection's adapter.
    """
    match = _KEY.fullmatch(_WRAPPERS.sub("", key))
    if match is None or match["projection"] not in PROJECTIONS:
        raise _unserved(key)
    place = Place(int(match["layer"]), match["projection"], match["part"])
    if match["path"] != place.path:
        raise unfit(
            quoted(key), "the projection stands in the wrong block", "save the adapter again"
        )
    return place


def unfit(what: str, why: str, remedy: str, reason: str = "SHAPE_MISMATCH") -> InvalidArgument:
    """An error about a tensor or a module of the weights file."""
    return InvalidArgument(f"{FIELD}: {what}: {why}; {remedy}", field=FIELD, reason=reason)


def _unserved(key: str) -> InvalidArgument:
    for pattern, why, remedy in _OTHERS:
        if re.search(pattern, key):
            return unfit(quoted(key), why, remedy, "UNSUPPORTED_ADAPTER")
    return unfit(
        quoted(key),
        "this tensor is not lora_A, lora_B or lora_magnitude_vector of a projection "
        f"({', '.join(PROJECTIONS)}) of a layer",
        _PROJECTIONS_ONLY,
        "UNSUPPORTED_ADAPTER",
    )
