"""Text to token ids and back: a Hugging Face fast tokenizer behind a few methods."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mora_serve.errors import ConfigError, InvalidArgument


class Tokenizer:
    """A tokenizer with its chat template. Thread-safe: fast tokenizers hold no call state."""

    def __init__(self, hf: Any, eos_ids: frozenset[int]) -> None:
        self._hf = hf
        self.eos_ids = eos_ids
        self.vocab_size = len(hf)

    @classmethod
    def load(cls, directory: Path, eos_ids: frozenset[int]) -> Tokenizer:
        """Read tokenizer.json and its configuration; no code of the model's own is run.

        Raises ConfigError where they cannot be read.
        """
        from transformers import AutoTokenizer

        try:
            hf = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
        except Exception as e:  # of several libraries, for a file that is missing or broken
            raise ConfigError(
                f"base.model: its tokenizer cannot be read ({type(e).__name__}); download "
                "tokenizer.json and tokenizer_config.json again",
                field="base.model",
            ) from e
        own = frozenset() if hf.eos_token_id is None else frozenset((int(hf.eos_token_id),))
        return cls(hf, eos_ids | own)

    @property
    def hf(self) -> Any:
        """The tokenizer as transformers has it."""
        return self._hf

    @property
    def has_chat_template(self) -> bool:
        """Whether ``chat`` can work."""
        return bool(self._hf.chat_template)

    def encode(self, text: str) -> list[int]:
        """Token ids with the special tokens that the tokenizer adds to a plain prompt."""
        return list(self._hf.encode(text, verbose=False))  # the engine tells what is too long

    def row(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """Ids of a prompt, as a chat's only turn where there is a template, and of its answer.

        The answer ends in the tokenizer's own end token: that of a turn in models that chat.
        """
        asked = self.chat([("user", prompt)]) if self.has_chat_template else self.encode(prompt)
        return asked, [*self.plain(answer), self.end_id]

    @property
    def end_id(self) -> int:
        """The tokenizer's own end token: that of a turn in models that chat."""
        own = self._hf.eos_token_id
        return min(self.eos_ids) if own is None else int(own)

    def plain(self, text: str) -> list[int]:
        """Token ids of the text alone, without special tokens."""
        return list(self._hf.encode(text, add_special_tokens=False, verbose=False))

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text, without special tokens unless asked for; an incomplete character ends in U+FFFD."""
        text: str = self._hf.decode(
            ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )
        return text

    def chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Token ids of (role, content) messages under the chat template.

        Raises InvalidArgument when the model has none, or when the template refuses the roles.
        """
        if not self.has_chat_template:
            raise InvalidArgument(
                "messages: this base model has no chat template; send prompt instead",
                field="messages",
            )
        return self.plain(self.render(messages))

    def render(
        self,
        messages: Sequence[tuple[str, str]],
        *,
        generate: bool = True,
        template: str | None = None,
    ) -> str:
        """The text of (role, content) messages under a chat template, the model's own if None.

        ``generate``: with what the template puts before an answer. Raises InvalidArgument when the
        template refuses the roles.
        """
        from jinja2 import TemplateError

        conversation = [{"role": role, "content": content} for role, content in messages]
        try:
            text: str = self._hf.apply_chat_template(
                conversation,
                chat_template=template,
                add_generation_prompt=generate,
                tokenize=False,
            )
        except TemplateError as e:
            raise InvalidArgument(
                f"messages: the model's chat template refuses them: {e}", field="messages"
            ) from e
        return text

    def vocabulary(self) -> dict[str, int]:
        """Token -> id, for the base's fingerprint."""
        return dict(self._hf.get_vocab())
