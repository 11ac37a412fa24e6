"""An example's tokens, and which of them are learned: as the server would send its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mora_serve.errors import InvalidArgument
from mora_serve.model.tokenizer import Tokenizer
from router_training.tuning.formats import Example, Turn

IGNORED = -100  # the label of a token that is not learned, as transformers has it

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Encoded:
    """A row's ids and labels (-100 where nothing is learned), both [tokens].

    ``whole`` is its length before it was cut to the limit; ``end_added`` whether it had no end
    token of its own.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    whole: int
    end_added: bool

    @property
    def learned(self) -> int:
        """Tokens that are learned."""
        return sum(label != IGNORED for label in self.labels)


class Encoder:
    """Turns examples into tokens with a base's tokenizer and template."""

    def __init__(
        self, tokenizer: Tokenizer, limit: int, *, inputs: bool = False, template: str | None = None
    ) -> None:
        """``inputs``: prompts are learned too. ``template`` replaces the model's own."""
        self._tokenizer, self._limit, self._inputs = tokenizer, limit, inputs
        self._template = template

    def encode(self, example: Example) -> Encoded:
        """Its tokens, cut to the limit. Raises InvalidArgument where the template refuses it."""
        segments = self._of_turns(example) if example.turns else self._of_pieces(example)
        ids: list[int] = []
        labels: list[int] = []
        for tokens, learned in segments:
            ids += tokens
            labels += tokens if learned or self._inputs else [IGNORED] * len(tokens)
        answer = [tokens for tokens, learned in segments if learned][-1]
        ended = answer[-1:] != [] and answer[-1] in self._tokenizer.eos_ids
        added = not ended and segments[-1][1]
        if added:  # else nothing would teach it to stop
            ids.append(self._tokenizer.end_id)
            labels.append(self._tokenizer.end_id)
        whole = len(ids)
        return Encoded(tuple(ids[: self._limit]), tuple(labels[: self._limit]), whole, added)

    def question(self, example: Example) -> list[int]:
        """The tokens before the last answer, as the server gets them to generate from."""
        if self._template is None and not self._tokenizer.has_chat_template:
            return self._of_turns(example)[0][0]
        return self._plain(self._render(example, example.question, generate=True))

    def _of_pieces(self, example: Example) -> list[tuple[list[int], bool]]:
        out = []
        for i, (text, learned) in enumerate(example.pieces):
            ids = self._plain(text) if i else self._tokenizer.encode(text)
            out.append((ids, learned))
        return out

    def _of_turns(self, example: Example) -> list[tuple[list[int], bool]]:
        """Each learned turn is a segment of its own, so that what comes before it has the tokens
        that it has where an answer is generated."""
        if self._template is None and not self._tokenizer.has_chat_template:
            return self._without_template(example)
        segments: list[tuple[list[int], bool]] = []
        done = ""
        for i, turn in enumerate(example.turns):
            if not turn.learned:
                continue
            before = self._render(example, example.turns[:i], generate=turn.role == "assistant")
            after = self._render(example, example.turns[: i + 1], generate=False)
            if not (before.startswith(done) and after.startswith(before)):
                return self._last_alone(example)
            if before != done:
                segments.append((self._plain(before[len(done) :]), False))
            answer = self._plain(after[len(before) :])
            end = next((n for n, t in enumerate(answer, 1) if t in self._tokenizer.eos_ids), None)
            segments.append((answer[:end], True))
            if end is not None and answer[end:]:
                segments.append((answer[end:], False))
            done = after
        return segments

    def _last_alone(self, example: Example) -> list[tuple[list[int], bool]]:
        """Of a template that shows no answers, or others once a turn follows: the prompt, and the
        answer with its end, as the server would send and get them."""
        if sum(turn.learned for turn in example.turns) > 1:
            raise InvalidArgument(
                f"chat_template: {example.where}: the template changes what comes before a turn "
                'once it is there, so only the last can be learned; give the others "train": '
                "false, or take chat_template: chatml",
                field="chat_template",
            )
        prompt = self._render(example, example.question, generate=True)
        return [(self._plain(prompt), False), (self._plain(example.answer), True)]

    def _without_template(self, example: Example) -> list[tuple[list[int], bool]]:
        if [t.role for t in example.turns] != ["user", "assistant"]:
            raise InvalidArgument(
                f"chat_template: {example.where}: the base has no chat template, so a row is one "
                "prompt and its answer; take chat_template: chatml",
                field="chat_template",
            )
        asked, answer = example.turns
        prompt, ids = self._tokenizer.row(asked.content, answer.content)
        return [(prompt, asked.learned), (ids, answer.learned)]

    def _render(self, example: Example, turns: Sequence[Turn], *, generate: bool) -> str:
        if not turns:
            return ""
        messages = [(t.role, t.content) for t in turns]
        try:
            return self._tokenizer.render(messages, generate=generate, template=self._template)
        except InvalidArgument as e:
            raise InvalidArgument(
                f"datasets: {example.where}: {e.message}", field="datasets"
            ) from e

    def _plain(self, text: str) -> list[int]:
        return self._tokenizer.plain(text)
