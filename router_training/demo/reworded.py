"""Requests for the demo's tasks in wordings that no training, card or fitting has seen.

Unlike the templates kept for testing, which are other expansions of the training's patterns,
these are new sentences. How much of one is known is the share of its content words that occur in
the training templates of its task.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Mapping

from router_training.demo.tasks import TASKS, phrase

TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "reverse": (
        "print {x} in reverse order",
        "flip {x} so that it reads backwards",
        "the reverse of {x}",
        "mirror the letters of {x} from right to left",
        "show me {x} written backwards",
        "rewind {x}",
        "invert the spelling of {x}",
        "spin {x} end to end",
    ),
    "uppercase": (
        "capitalise all letters of {x}",
        "convert {x} to uppercase",
        "i want {x} in capital letters only",
        "write {x} with every letter in upper case",
        "make capitals of {x}",
        "yell {x}",
        "use large type for {x}",
        "enlarge {x}",
    ),
    "double": (
        "every letter of {x} doubled",
        "make each letter of {x} appear twice",
        "write the letters of {x} twice each",
        "duplicate all characters in {x}",
        "each character of {x} two times",
        "stutter {x}",
        "clone the glyphs of {x}",
        "thicken {x}",
    ),
    "drop-vowels": (
        "strip all vowels out of {x}",
        "{x} with the vowels removed",
        "only the consonants of {x} please",
        "vowels deleted from {x}",
        "remove every vowel in {x}",
        "consonant skeleton for {x}",
        "purge a e i o u from {x}",
        "squeeze {x}",
    ),
    "caesar": (
        "apply a caesar cipher to {x}",
        "shift {x} one place along the alphabet",
        "advance the letters of {x} by one",
        "the caesar encoding of {x}",
        "encrypt the letters in {x} by a shift of one",
        "scramble {x} secretly",
        "rotate {x} through abc",
        "obfuscate {x}",
    ),
    "successor": (
        "{x} and one more",
        "what number follows after {x}",
        "the integer that comes next after {x}",
        "increase the number {x} by 1",
        "one up from {x}",
        "bump {x}",
        "tick {x} forward",
        "climb a step above {x}",
    ),
    "roman": (
        "the roman numerals of {x}",
        "convert the number {x} to a roman numeral",
        "{x} written in roman digits",
        "how would romans put {x}",
        "roman numeral form of {x}",
        "latin digits for {x}",
        "what would caesar carve for {x}",
        "{x} on an old clock face",
    ),
    "swap-ends": (
        "the first and last letters of {x} exchanged",
        "switch the first and last letters in {x}",
        "{x} with outer letters traded",
        "swap both ends of {x}",
        "let the ends of {x} trade places",
        "interchange head and tail in {x}",
        "transpose the borders of {x}",
        "flip-flop the extremes of {x}",
    ),
    "initials": (
        "only the initials of {x}",
        "the first letters of each word in {x}",
        "an acronym made of {x}",
        "abbreviate {x} to its initials",
        "which abbreviation stands for {x}",
        "condense {x} to heads",
        "monogram for {x}",
        "compress the phrase {x}",
    ),
    "last-word": (
        "the final word in {x} only",
        "find the word at the end of {x}",
        "what word does {x} end with",
        "the last word that is in {x}",
        "give me the word that finishes {x}",
        "conclude {x} alone",
        "trailing token of {x}",
        "rightmost chunk in {x}",
    ),
    "drop-first": (
        "{x} with the first letter dropped",
        "remove the opening letter in {x}",
        "delete the leading letter in {x}",
        "{x} after its first letter is cut",
        "chop off the leading letter of {x}",
        "omit the initial sign in {x}",
        "shave the front off {x}",
        "trim {x} at the head",
    ),
    "json": (
        "serialise {x} to json",
        "make a json object of {x}",
        "{x} wrapped in a json object",
        "the json for {x}",
        "show {x} formatted as json",
        "machine readable {x}",
        "encode {x} for an api",
        "structured data with {x}",
    ),
    "polite": (
        "a courteous reply with {x}",
        "tell me {x} in a nice way",
        "answer with {x} and be courteous",
        "say {x} in a friendly tone",
        "return {x} nicely",
        "hand me {x} like a butler",
        "mind your manners and utter {x}",
        "graciously present {x}",
    ),
    "spell": (
        "{x} spelled with hyphens",
        "a dash between the letters of {x}",
        "spell out {x} letter by letter",
        "separate all letters of {x} with dashes",
        "hyphens between every letter of {x}",
        "break up {x} by strokes",
        "interleave minus signs in {x}",
        "stretch {x} into pieces",
    ),
    "brackets": (
        "angle brackets on both sides of {x}",
        "{x} enclosed by chevrons",
        "put chevrons around {x}",
        "surround {x} by angle brackets",
        "wrap {x} inside chevrons",
        "fence {x} like a tag",
        "dress {x} as markup",
        "cage {x} between less-than and greater-than",
    ),
}

_STOP = re.compile(
    r"a|an|the|of|in|on|at|to|for|from|by|with|and|or|it|its|is|are|was|be|that|so|i|me|my|you|your|"
    r"would|does|do|has|have|what|which|how|only|all|each|every|both|as|into|out|off|up"
)


def known_share(task: str, template: str) -> float:
    """The share of a template's content words that its task's training templates have.

    A word counts as known in another inflection: "doubled" where "double" is.
    """
    content = _content(template)
    known = _known(task)
    return sum(any(_same(w, k) for k in known) for w in content) / max(1, len(content))


def reworded_examples(
    task: str, seed: int, count: int, *, least: float = 0.0, most: float = 1.0
) -> list[tuple[str, str]]:
    """(prompt, answer) pairs, ``count`` of them, from the templates whose known share fits."""
    rng = random.Random(f"{task}/reworded/{seed}")
    templates = [t for t in TEMPLATES[task] if least <= known_share(task, t) <= most]
    examples = []
    for i in range(count if templates else 0):
        x = TASKS[task].draw(rng)
        prompt = phrase(rng, templates[i % len(templates)].format(x=f"'{x}'"))
        examples.append((prompt, TASKS[task].apply(x)))
    return examples


def _content(template: str) -> list[str]:
    words = re.findall(r"[a-z0-9]+", template.replace("{x}", " "))
    return [w for w in words if not _STOP.fullmatch(w)]


@functools.cache
def _known(task: str) -> frozenset[str]:
    t = TASKS[task]
    return frozenset(w for text in (*t.train, *t.tails["train"]) for w in _content(text))


def _same(a: str, b: str) -> bool:
    return a == b or (min(len(a), len(b)) > 3 and (a.startswith(b[:-1]) or b.startswith(a[:-1])))
