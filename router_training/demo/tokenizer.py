"""The demo's tokenizer: one token a byte, plus the few that mark turns.

A plain prompt ``X`` encodes to ``<|begin|><|user|>X<|assistant|>``, by the post-processor; the
chat template writes the same tokens for a user turn, with system turns ahead of it. Of a longer
chat it keeps the last user turn alone: the demo's models answer one prompt, and an operand of an
earlier turn would mislead them. The answer ends with ``<|end|>``. Byte ``b`` is token ``b``, so
every UTF-8 text round-trips.
"""

from __future__ import annotations

from typing import Any

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIALS = (PAD, BEGIN, END, SYSTEM, USER, ASSISTANT)
TOKEN_ID = {name: 256 + i for i, name in enumerate(SPECIALS)}
VOCAB_SIZE = 320  # a multiple of 64; the ids that are left over are reserved tokens
CHAT_TEMPLATE = (
    "{{ bos_token }}{% set last = namespace(text=none) %}{% for m in messages %}"
    "{% if m['role'] == 'system' %}<|system|>{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}{% set last.text = m['content'] %}"
    "{% elif m['role'] != 'assistant' %}"
    "{{ raise_exception('roles are system, user and assistant') }}{% endif %}{% endfor %}"
    "{% if last.text is none %}{{ raise_exception('a chat needs a user turn') }}{% endif %}"
    "<|user|>{{ last.text }}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def encode_turns(prompt: str, ahead: tuple[tuple[str, str], ...] = ()) -> list[int]:
    """Token ids of a prompt that is ready to be answered.

    ``ahead`` holds earlier (role, text) turns, as some rows of the training have them.
    """
    ids = [TOKEN_ID[BEGIN]]
    for role, text in (*ahead, ("user", prompt)):
        ids += [TOKEN_ID[f"<|{role}|>"], *text.encode()]
        if role == "assistant":
            ids.append(TOKEN_ID[END])
    return [*ids, TOKEN_ID[ASSISTANT]]


def decode_bytes(ids: list[int]) -> str:
    """The text of the byte tokens among ``ids``."""
    return bytes(i for i in ids if i < 256).decode(errors="replace")


def build_tokenizer(max_length: int) -> Any:
    """A Hugging Face fast tokenizer, ready for ``save_pretrained``."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {c: b for b, c in _byte_characters().items()}
    reserved = [f"<|reserved-{i}|>" for i in range(VOCAB_SIZE - 256 - len(SPECIALS))]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in (*SPECIALS, *reserved)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} {USER} $A {ASSISTANT}",
        pair=f"{BEGIN} {USER} $A {USER} $B {ASSISTANT}",
        special_tokens=[(t, TOKEN_ID[t]) for t in (BEGIN, USER, ASSISTANT)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def _byte_characters() -> dict[int, str]:
    # The printable stand-ins that every byte-level vocabulary uses for bytes.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shown = {b: chr(b) for b in printable}
    rest = [b for b in range(256) if b not in shown]
    return shown | {b: chr(256 + i) for i, b in enumerate(rest)}
