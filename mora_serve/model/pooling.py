"""How the base reads a text: its residual stream after some layers, averaged over the tokens.

The engine and the router's training share this. No adapters, no key/value pages, no head: a pass
of the first layers over texts laid end to end. A state depends on its text alone, to the last bit
on one machine: attention is per text, and the rows of a product do not depend on their
neighbours (see ``quant.product``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from mora_serve.model.attention import PackedCausal
from mora_serve.model.decoder import Decoder
from mora_serve.model.quant import ROW_TILE
from mora_serve.model.tokenizer import Tokenizer

States = npt.NDArray[np.float32]

PASS_TOKENS = 2048
_CHARACTERS = 16  # a token: of a longer text only the ends are tokenised


def pooled_hidden(
    decoder: Decoder, tokenizer: Tokenizer, texts: Sequence[str], depth: int, max_tokens: int
) -> States:
    """The pooled hidden states [texts, hidden] of texts, a few passes of PASS_TOKENS in all.

    See ``pool_tokens`` and ``pool_states`` for what ``max_tokens`` and ``depth`` mean.
    """
    vocab_size = decoder.shape.vocab_size
    tokens = [pool_tokens(tokenizer, text, max_tokens, vocab_size) for text in texts]
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    out = np.zeros((len(texts), decoder.shape.hidden_size), np.float32)
    for rows in _passes(order, [len(t) for t in tokens]):
        out[rows] = pool_states(decoder, [tokens[i] for i in rows], depth)
    return out


def pool_tokens(tokenizer: Tokenizer, text: str, max_tokens: int, vocab_size: int) -> list[int]:
    """The tokens of a text that count, without special ones or a chat template around it.

    Of more than ``max_tokens`` the first and last halves, joined. A text of more than 16
    characters for each of these is cut to its ends in the same way first, so that the time does
    not grow with it. Tokens that a base of ``vocab_size`` embeddings does not have do not count.
    """
    half = max_tokens // 2
    if len(text) > max_tokens * _CHARACTERS:
        text = text[: half * _CHARACTERS] + text[-half * _CHARACTERS :]
    tokens = [t for t in tokenizer.plain(text) if t < vocab_size]
    return tokens if len(tokens) <= max_tokens else tokens[:half] + tokens[-half:]


@torch.inference_mode()
def pool_states(decoder: Decoder, texts: Sequence[Sequence[int]], depth: int) -> States:
    """The means [texts, hidden] over each text's tokens, after ``depth`` layers, in one pass.

    Zeros for a text without tokens. Depth 0 is the mean embedding.
    """
    if decoder.device.type == "cuda" and len(texts) > 1:
        # Kernels there are chosen by the number of rows, and round differently.
        return np.concatenate([pool_states(decoder, [text], depth) for text in texts])
    shape, device = decoder.shape, decoder.device
    lengths = [len(text) for text in texts]
    total = sum(lengths)
    out = np.zeros((len(texts), shape.hidden_size), np.float32)
    if not total:
        return out
    # Whole tiles: a product pads its rows to them itself, but one of a single row rounds otherwise.
    padding = [0] * (-total % ROW_TILE)
    tokens = torch.tensor([*(t for text in texts for t in text), *padding], device=device)
    positions = torch.cat([torch.arange(n, device=device) for n in (*lengths, len(padding))])
    group = shape.heads // shape.kv_heads
    attention = PackedCausal([n for n in lengths if n], group, shape.sliding_window, device)
    hidden = decoder.residual(tokens, positions, attention, depth=depth)
    for row, state in zip(out, torch.split(hidden[:total], lengths), strict=True):
        if len(state):
            row[:] = state.float().mean(0).cpu().numpy()
    return out


def _passes(order: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices in order, in runs of at most PASS_TOKENS tokens, or of one text."""
    run: list[int] = []
    total = 0
    for i in order:
        if run and total + lengths[i] > PASS_TOKENS:
            yield run
            run, total = [], 0
        run.append(i)
        total += lengths[i]
    if run:
        yield run
