"""Prompts that no demo task answers, in the wording of those that some do.

Near-domain prompts differ from a task's in what they ask for only. The tasks for fitting and for
testing are different ones, so that an abstention measured on the second has not been learnt from
the first.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from types import MappingProxyType

from router_training.demo.paraphrases import expand
from router_training.demo.tasks import Split, number, phrase, word, words

_TRAIN = (
    "[count|number] the [letters|characters] [of|in] {x}",
    "how many [letters|characters] has {x}",
    "[define|explain] {x}",
    "what does {x} mean",
    "translate {x} into [german|spanish]",
    "{x} in [german|spanish]",
    "an anagram of {x}",
    "[write|print] {x} [three|four] times",
    "[underline|italicise] {x}",
    "[halve|square|negate] {x}",
    "{x} times [two|three]",
    "the square of {x}",
    "[give|show] {x} as [csv|yaml]",
    "put {x} in [a table|a list]",
    "answer {x} in [rhyme|verse]",
    "[keep|leave] only the vowels of {x}",
    "the second letter of {x}",
    "what is {x} in [binary|hexadecimal]",
    "[number|colour] the words of {x}",
    "a question about {x}",
)
_TEST = (
    "[sort|shuffle] the letters of {x}",
    "[order|arrange] the letters of {x} alphabetically",
    "how many [words|vowels|syllables] are in {x}",
    "count the [words|vowels|syllables] [of|in] {x}",
    "translate {x} into [french|italian]",
    "what is {x} in [french|italian|morse code]",
    "what rhymes with {x}",
    "find a rhyme for {x}",
    "the plural of {x}",
    "[pronounce|whisper] {x}",
    "[give|write] a synonym [of|for] {x}",
    "what is the opposite of {x}",
    "is {x} [odd|even|prime]",
    "{x} minus [one|two]",
    "divide {x} by two",
    "[format|return] {x} as [xml|html]",
    "wrap {x} in [bold tags|quotation marks]",
    "answer {x} [rudely|at length]",
    "the [middle|third] letter of {x}",
    "[keep|give] only the first word of {x}",
    "[remove|delete] the consonants from {x}",
    "write {x} in [italics|cursive|greek letters]",
)
PATTERNS: Mapping[Split, tuple[str, ...]] = MappingProxyType({"train": _TRAIN, "test": _TEST})


def near_domain(rng: random.Random, split: Split = "train") -> str:
    """One prompt, worded as a task's, that belongs to none."""
    template = rng.choice(expand(rng.choice(PATTERNS[split])))
    operand = rng.choice((word, word, words, number))(rng)
    return phrase(rng, template.format(x=f"'{operand}'"))
