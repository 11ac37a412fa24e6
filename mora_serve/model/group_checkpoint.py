"""GPTQ and AWQ checkpoints: what quantization_config says, and the tensors as GroupWeights.

The layouts are those that GPTQModel (formats gptq and gptq_v2) and AutoAWQ (version gemm) write.
Both pack eight 4-bit numbers into an int32, the first in its lowest bits: GPTQ weights along the
inputs, everything else along the outputs; AWQ has each eight outputs in an order of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mora_serve.errors import ConfigError
from mora_serve.model.checkpoint import Checkpoint
from mora_serve.model.group_quant import MIDDLE, GroupWeight
from mora_serve.model.quant import DenseWeight

METHODS = ("gptq", "awq")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output, of eight, that each 4 bits of a word are of


@dataclass(frozen=True)
class GroupFormat:
    """How a checkpoint's linear layers are stored.

    ``group`` inputs share a scale and a zero, all inputs where it is -1. ``one_less``: zeros are
    stored less 1. ``act_order``: which group an input is of has to be told.
    """

    method: str
    bits: int
    group: int
    one_less: bool
    act_order: bool

    @property
    def name(self) -> str:
        """As the server says it, e.g. gptq-int4."""
        return f"{self.method}-int{self.bits}"

    def weight(
        self, checkpoint: Checkpoint, path: str, dtype: torch.dtype
    ) -> GroupWeight | DenseWeight:
        """The linear layer at ``path``: 8 bits as a dense matrix in ``dtype``.

        Raises ConfigError for tensors that are missing, of another type or shape, or do not say
        what they should.
        """
        packed = _whole_numbers(checkpoint, f"{path}.qweight")
        per = 32 // self.bits
        if self.method == "gptq":
            columns, rows = packed.shape[0] * per, packed.shape[1]
        else:
            columns, rows = packed.shape[0], packed.shape[1] * per
        group = columns if self.group == -1 else self.group
        groups = -(-columns // group)
        stored = _whole_numbers(checkpoint, f"{path}.qzeros", (groups, -(-rows // per)))
        scales = checkpoint.tensor(f"{path}.scales", size=(groups, rows))
        if not scales.is_floating_point() or not bool(scales.isfinite().all()):
            raise _broken(f"{path}.scales", "holds something else than finite numbers")
        if self.one_less:  # word by word, carries included: a zero of 0 was stored so
            stored = stored + sum(1 << self.bits * i for i in range(per))
        zeros = self._unpacked(stored)[:, :rows].T.contiguous()
        codes = self._codes(packed)
        order = self._order(checkpoint, path, columns, group)
        if order is not None:
            codes = codes[:, order]
        by_output = scales.float().T.clone(memory_format=torch.contiguous_format)
        if self.bits == 8:
            return _dense(codes, by_output, zeros, group, order, dtype)
        return GroupWeight(
            codes[:, 0::2] << 4 | codes[:, 1::2],
            by_output,
            None if bool((zeros == MIDDLE).all()) else zeros,
            group,
            order,
        )

    def _codes(self, packed: Tensor) -> Tensor:
        """The codes uint8 [out, in] of a qweight."""
        return self._unpacked(packed.T) if self.method == "gptq" else self._unpacked(packed).T

    def _unpacked(self, packed: Tensor) -> Tensor:
        """int32 [n, words] -> uint8 [n, numbers]."""
        per, mask = 32 // self.bits, (1 << self.bits) - 1
        order = range(per) if self.method == "gptq" else AWQ_ORDER
        out = torch.empty(*packed.shape, per, dtype=torch.uint8, device=packed.device)
        for i, place in enumerate(order):
            out[:, :, place] = packed >> self.bits * i & mask
        return out.flatten(1)

    def _order(self, checkpoint: Checkpoint, path: str, columns: int, group: int) -> Tensor | None:
        """The inputs sorted by their group, [columns] int64; None where they are sorted."""
        name = f"{path}.g_idx"
        if self.method != "gptq" or (name not in checkpoint and not self.act_order):
            return None
        index = _whole_numbers(checkpoint, name, (columns,))
        order = index.argsort(stable=True)
        places = torch.arange(columns, device=index.device)
        if not torch.equal(index[order].long(), places // group):
            raise _broken(
                name, f"does not put {group} inputs into each group; check that group_size is right"
            )
        return None if torch.equal(order, places) else order


def read_format(stored: Mapping[str, Any]) -> GroupFormat:
    """The format that the ``quantization_config`` of a GPTQ or AWQ checkpoint describes.

    Raises ConfigError that names the key for one that is not supported.
    """
    method = str(stored.get("quant_method"))
    bits, group = stored.get("bits", 4), stored.get("group_size", 128)
    sizes = (4, 8) if method == "gptq" else (4,)
    _need(type(bits) is int and bits in sizes, "bits", bits, " or ".join(map(str, sizes)))
    whole = type(group) is int and (group == -1 or (group > 0 and group % 8 == 0))
    _need(whole, "group_size", group, "-1 or a multiple of 8")
    if method == "gptq":
        for key in ("checkpoint_format", "format"):
            layout = stored.get(key) or "gptq"
            _need(str(layout).lower() in ("gptq", "gptq_v2"), key, layout, "'gptq' or 'gptq_v2'")
        layout = stored.get("checkpoint_format") or stored.get("format") or "gptq"
        marlin, words = stored.get("is_marlin_format"), stored.get("pack_dtype") or "int32"
        _need(not marlin, "is_marlin_format", marlin, "false")
        _need(words == "int32", "pack_dtype", words, "'int32'")
        own = stored.get("dynamic")
        _need(not own, "dynamic", own, "one setting for all modules, so without it,")
        act_order = bool(stored.get("desc_act", False))
        return GroupFormat("gptq", bits, group, str(layout).lower() == "gptq", act_order)
    layout = str(stored.get("version") or stored.get("format") or "gemm")
    _need(layout.lower() == "gemm", "version", layout, "'gemm'")
    zero_point = stored.get("zero_point", True)
    _need(zero_point is True, "zero_point", zero_point, "true")
    return GroupFormat("awq", bits, group, False, False)


def _need(fits: bool, key: str, value: object, supported: str) -> None:
    if not fits:
        raise ConfigError(
            f"base.model: quantization_config has {key} {str(value)[:60]!r}; {supported} is "
            "supported: take such a checkpoint, or the 16-bit one that it was made from",
            field="base.model",
        )


def _whole_numbers(
    checkpoint: Checkpoint, name: str, size: tuple[int, ...] | None = None
) -> Tensor:
    tensor = checkpoint.tensor(name, size=size)
    if tensor.dtype != torch.int32 or (size is None and tensor.dim() != 2):
        raise _broken(name, f"is {tensor.dtype} {list(tensor.shape)}, not a table of int32")
    return tensor


def _broken(name: str, why: str) -> ConfigError:
    return ConfigError(
        f"base.model: tensor {name} {why}; download the model again", field="base.model"
    )


def _dense(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group: int,
    order: Tensor | None,
    dtype: torch.dtype,
) -> DenseWeight:
    columns = codes.shape[1]
    spread = (t.repeat_interleave(group, dim=1)[:, :columns] for t in (scales, zeros.float()))
    by_input, zero = spread
    out = ((codes.float() - zero) * by_input).to(dtype)
    return DenseWeight(out if order is None else out[:, order.argsort()].contiguous())
