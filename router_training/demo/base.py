"""Pre-training of the demo's base: a byte-level Qwen3 of 0.9 million parameters.

Of the shapes that the server runs it is the one with norms on queries and keys: with Muon it learns
the tasks in a third of the steps that a Llama of the same size takes.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mora_serve.errors import InvalidArgument
from router_training.batches import TokenRow, bucketed, chunks, collate
from router_training.demo.coded import CODES, CodedRows, Row
from router_training.demo.pairs import PAIRS, Pair
from router_training.demo.tokenizer import END, PAD, TOKEN_ID, VOCAB_SIZE, encode_turns
from router_training.muon import Muon

MAX_POSITIONS = 512


@dataclass(frozen=True)
class BaseRecipe:
    """Learning rates fall linearly to zero over the last 40 % of the steps.

    ``excluded``: pairs of codes that no row has. ``hidden``: the width, a multiple of 64,
    which is a block of NF4; a head has 32.
    """

    steps: int = 3000
    rows: int = 48
    matrix_lr: float = 0.02
    other_lr: float = 3e-3
    warmup: int = 50
    prompt_weight: float = 0.03
    excluded: tuple[Pair, ...] = ()
    hidden: int = 128
    seed: int = 0


def tokens(row: Row) -> TokenRow:
    """A row's tokens; the end token belongs to the answer."""
    prompt = encode_turns(row.prompt, row.ahead)
    return TokenRow(tuple(prompt), (*row.answer.encode(), TOKEN_ID[END]))


def characters(row: Row) -> int:
    """Length of a row, for batching it with others like it."""
    return sum(len(t) for _, t in row.ahead) + len(row.prompt) + len(row.answer)


def build_model(seed: int, hidden: int = BaseRecipe.hidden) -> Any:
    """A random transformers ``Qwen3ForCausalLM`` of the demo's shape, in fp32."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB_SIZE,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=4,
            num_attention_heads=hidden // 32,
            num_key_value_heads=hidden // 32,
            head_dim=32,
            max_position_embeddings=MAX_POSITIONS,
            rms_norm_eps=1e-5,
            initializer_range=hidden**-0.5,
            tie_word_embeddings=False,
            bos_token_id=TOKEN_ID["<|begin|>"],
            eos_token_id=TOKEN_ID[END],
            pad_token_id=TOKEN_ID[PAD],
            use_cache=False,
        )
    )


def pretrain(
    recipe: BaseRecipe, log: Callable[[str], None] = lambda line: print(line, file=sys.stderr)
) -> Any:
    """Train the base on coded rows; returns the model in eval mode, fp32.

    Raises InvalidArgument for a width that NF4's blocks do not divide.
    """
    if recipe.hidden < 64 or recipe.hidden % 64:
        raise InvalidArgument(
            f"hidden: {recipe.hidden} is no multiple of 64, a block of NF4; give one",
            field="hidden",
        )
    model = build_model(recipe.seed, recipe.hidden)
    rng = random.Random(recipe.seed)
    batches = bucketed(CodedRows(rng, recipe.excluded), characters, recipe.rows, rng)
    matrices = [p for n, p in model.named_parameters() if n.endswith("_proj.weight")]
    others = [p for n, p in model.named_parameters() if not n.endswith("_proj.weight")]
    optimizers = (
        Muon(matrices, lr=recipe.matrix_lr, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=recipe.other_lr, betas=(0.9, 0.98), weight_decay=0.0),
    )
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: _rate(step, recipe)) for o in optimizers
    ]
    start = time.monotonic()
    for step in range(1, recipe.steps + 1):
        model.zero_grad()
        mean = _backward(model, next(batches), recipe.prompt_weight)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        if step % 50 == 0 or step == 1:
            seconds = time.monotonic() - start
            eta = seconds / step * (recipe.steps - step)
            log(f"base {step}/{recipe.steps} {seconds:.0f}s eta {eta:.0f}s answer loss {mean:.3f}")
        if step % 300 == 0:
            log(f"  {coded_exact_match(model, recipe.seed + 1)}")
    return model.eval()


def _backward(model: nn.Module, rows: list[Row], prompt_weight: float) -> float:
    """Gradients of the weighted mean loss of a batch; returns the mean over answer tokens."""
    batches = [collate([tokens(r) for r in part], TOKEN_ID[PAD]) for part in chunks(rows)]
    answers = float(sum(b.answer.sum() for b in batches))
    total = answers + prompt_weight * float(sum(b.prompt.sum() for b in batches))
    loss = 0.0
    for batch in batches:
        logits = model(input_ids=batch.inputs).logits
        losses = F.cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none")
        weight = batch.answer + prompt_weight * batch.prompt
        torch.autograd.backward((losses * weight).sum() / total)
        loss += float((losses.detach() * batch.answer).sum())
    return loss / answers


@torch.no_grad()
def exact_match(model: nn.Module, rows: Sequence[Row]) -> float:
    """Share of rows whose every answer token is the most likely one (teacher-forced)."""
    batch = collate([tokens(r) for r in rows], TOKEN_ID[PAD])
    return float(batch.right(model(input_ids=batch.inputs).logits).float().mean())


def coded_exact_match(model: nn.Module, seed: int, rows: int = 16) -> dict[str, float]:
    """Mean exact match under single codes and under pairs, of an echo, and of the weakest."""
    draw = CodedRows(random.Random(f"evaluate/{seed}"))

    def score(names: tuple[str, ...]) -> float:
        return exact_match(model, [draw.coded(names) for _ in range(rows)])

    singles = {name: score((name,)) for name in CODES}
    pairs = {"+".join(pair): score(pair) for pair in PAIRS}
    weakest = sorted((singles | pairs).items(), key=lambda item: item[1])[:4]
    found = {
        "singles": sum(singles.values()) / len(singles),
        "pairs": sum(pairs.values()) / len(pairs),
        "echo": score(()),
        **dict(weakest),
    }
    return {name: round(value, 3) for name, value in found.items()}


def _rate(step: int, recipe: BaseRecipe) -> float:
    left = 1 - step / recipe.steps
    return min(1.0, (step + 1) / max(1, recipe.warmup)) * min(1.0, left / 0.4 + 0.01)
