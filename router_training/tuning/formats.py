"""Rows of the known forms as conversations or texts, with what is to be learned marked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mora_serve.adapters.untrusted import quoted
from mora_serve.errors import InvalidArgument
from router_training.tuning.settings import Dataset

ROLES: Mapping[str, str] = {
    **{name: name for name in ("system", "user", "assistant")},
    "human": "user",
    "prompter": "user",
    "instruction": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
}
# the columns that a form needs, in the order in which they are looked for
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "input_output": ("segments",),
    "prompt_completion": ("prompt", "completion"),
    "completion": ("text",),
}
PREFERENCES = {"dpo": ("prompt", "chosen", "rejected"), "kto": ("prompt", "completion", "label")}


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: str
    content: str
    learned: bool


@dataclass(frozen=True, slots=True)
class Example:
    """A row: the turns of a conversation, or pieces of text and whether they are learned."""

    where: str
    turns: tuple[Turn, ...] = ()
    pieces: tuple[tuple[str, bool], ...] = ()

    @property
    def question(self) -> tuple[Turn, ...]:
        """The turns before the last that is learned; empty where there is none."""
        at = [i for i, turn in enumerate(self.turns) if turn.learned]
        return self.turns[: at[-1]] if at else ()

    @property
    def answer(self) -> str:
        """The last turn that is learned."""
        learned = [turn.content for turn in self.turns if turn.learned]
        return learned[-1] if learned else ""

    @property
    def prompt(self) -> str:
        """What the user says first."""
        return next((turn.content for turn in self.turns if turn.role == "user"), "")


@dataclass
class Seen:
    """What was met while rows were read: how roles were renamed."""

    roles: Counter[tuple[str, str]] = field(default_factory=Counter)


def example_of(where: str, row: Mapping[str, Any], dataset: Dataset, seen: Seen) -> Example:
    """A row as its dataset's form has it. Raises InvalidArgument, naming the row."""
    form = dataset.type if dataset.type != "auto" else form_of(where, row, dataset)
    if form in ("chat_template", "sharegpt"):
        column = dataset.field_messages
        if column not in row and "conversations" in row:
            column = "conversations"
        return Example(where, _turns(where, row.get(column), column, dataset, seen))
    if form == "input_output":
        return Example(where, pieces=_pieces(where, row.get("segments")))
    texts = {name: row.get(name) for name in (*COLUMNS[form], "input", "system")}
    for name in COLUMNS[form]:
        if form == "prompt_completion" and isinstance(texts[name], list):
            continue
        if not isinstance(texts[name], str) or not texts[name]:
            raise _wrong(where, f"{name} is not a text", f"both of {', '.join(COLUMNS[form])}")
    if form == "completion":
        return Example(where, pieces=((str(texts["text"]), True),))
    if form == "alpaca":
        asked, answer = str(texts["instruction"]), str(texts["output"])
        if texts["input"]:
            asked = f"{asked}\n\n{texts['input']}"
        return Example(where, _said(texts["system"], asked, answer))
    prompt, completion = texts["prompt"], texts["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        turns = _turns(where, [*prompt, *completion], "prompt", dataset, seen)
        first = len(prompt)
        return Example(
            where,
            tuple(Turn(t.role, t.content, i >= first and t.learned) for i, t in enumerate(turns)),
        )
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise _wrong(where, "prompt and completion are of two kinds", "two texts or two lists")
    return Example(where, _said(texts["system"], prompt, completion))


def form_of(where: str, row: Mapping[str, Any], dataset: Dataset) -> str:
    """The form whose columns a row has. Raises InvalidArgument where there is none."""
    if dataset.field_messages in row:
        return "chat_template"
    for form, columns in COLUMNS.items():
        if all(column in row for column in columns):
            return form
    forms = "; ".join(f"{form}: {', '.join(columns)}" for form, columns in COLUMNS.items())
    raise InvalidArgument(
        f"datasets: {where} has the columns {quoted(', '.join(map(str, row)))}, which are those of "
        f"no known form; give {dataset.field_messages}, or one of {forms}",
        field="datasets",
    )


def _said(system: Any, asked: str, answer: str) -> tuple[Turn, ...]:
    before = (Turn("system", system, False),) if isinstance(system, str) and system else ()
    return (*before, Turn("user", asked, False), Turn("assistant", answer, True))


def _turns(where: str, value: Any, column: str, dataset: Dataset, seen: Seen) -> tuple[Turn, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise _wrong(where, f"{column} is not a list of turns", "[{role, content}, ...]")
    turns = []
    for turn in value:
        if not isinstance(turn, Mapping):
            raise _wrong(where, "a turn is not an object", "{role, content}")
        name = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if not isinstance(name, str) or not isinstance(content, str):
            raise _wrong(where, "a turn has no role or no text", "{role, content}")
        role = ROLES.get(name)
        if role is None:
            raise _wrong(
                where, f"the role {quoted(name)} is not known", f"one of {', '.join(ROLES)}"
            )
        seen.roles[name, role] += 1
        learned = role in dataset.roles_to_train or name in dataset.roles_to_train
        if isinstance(turn.get("train"), bool):
            learned = bool(turn["train"])
        turns.append(Turn(role, content, learned))
    if not any(turn.learned for turn in turns):
        wanted = ", ".join(dataset.roles_to_train)
        raise _wrong(where, f"no turn is of {wanted}, so nothing is learned", "an answer")
    return tuple(turns)


def _pieces(where: str, value: Any) -> tuple[tuple[str, bool], ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise _wrong(where, "segments is not a list", "[{text, label}, ...]")
    pieces = []
    for piece in value:
        if not isinstance(piece, Mapping) or not isinstance(piece.get("text"), str):
            raise _wrong(where, "a segment has no text", "{text, label}")
        pieces.append((str(piece["text"]), bool(piece.get("label"))))
    if not any(learned for _, learned in pieces):
        raise _wrong(where, "no segment has label true, so nothing is learned", "one")
    return tuple(pieces)


def _wrong(where: str, what: str, give: str) -> InvalidArgument:
    return InvalidArgument(f"datasets: {where}: {what}; give {give}", field="datasets")
