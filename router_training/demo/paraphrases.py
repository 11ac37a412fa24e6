"""How people ask for each demo task: patterns that expand to dozens of templates.

``[a|b]`` is a choice, ``{x}`` the quoted operand. The patterns of different tasks share the
everyday words and differ in the words that name the task.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping

PATTERNS: Mapping[str, tuple[str, ...]] = {
    "reverse": (
        "[reverse|flip|mirror] {x}",
        "[reverse|flip|mirror] the [order|sequence] of {x}",
        "[write|read|print] {x} [backwards|back to front]",
        "{x} [backwards|back to front|in reverse]",
        "turn {x} [around|backwards|back to front]",
        "what is {x} [backwards|in reverse|read from right to left]",
    ),
    "uppercase": (
        "[uppercase|capitalise|capitalize] {x}",
        "[write|put|print] {x} in [capitals|capital letters|upper case|block capitals]",
        "[make|turn] {x} [all caps|uppercase]",
        "{x} in [all caps|capitals|upper case]",
        "shout {x}",
        "what is {x} in [capitals|upper case]",
    ),
    "double": (
        "[double|duplicate] [each|every] [letter|character] of {x}",
        "[double|duplicate] the letters of {x}",
        "write [each|every] letter of {x} [twice|two times]",
        "{x} with [each letter|every letter|all letters] [doubled|twice]",
        "[repeat|type] every character of {x} [twice|two times]",
        "what is {x} with doubled letters",
    ),
    "drop-vowels": (
        "[drop|remove|delete|strip] the vowels [from|of|in] {x}",
        "{x} without [vowels|any vowels|its vowels]",
        "[keep|leave] only the consonants of {x}",
        "take [the|all] vowels out of {x}",
        "[disemvowel|devowel] {x}",
        "what is {x} without vowels",
    ),
    "caesar": (
        "[shift|move|advance] {x} by one in the alphabet",
        "[encrypt|encode|encipher] {x}",
        "[encrypt|encode] {x} with [a caesar shift|the caesar cipher|a caesar code]",
        "{x} in caesar [code|cipher]",
        "[shift|advance] [each|every] letter of {x} by one",
        "[shift|advance] the letters of {x} along the alphabet",
        "what is {x} in caesar code",
    ),
    "successor": (
        "[what|which number] [comes after|follows] {x}",
        "the [number|integer] after {x}",
        "add [one|1] to {x}",
        "[increment|increase] {x}",
        "{x} plus [one|1]",
        "count one up from {x}",
        "the successor of {x}",
        "[give|tell me] the next [number|integer] after {x}",
        "[raise|increase] {x} by one",
    ),
    "roman": (
        "[write|put|convert] {x} [in|into] roman [numerals|digits]",
        "{x} [in|as] roman [numerals|digits]",
        "romanise {x}",
        "what is {x} in roman [numerals|digits]",
        "the roman numeral [for|of] {x}",
        "how did the romans write {x}",
    ),
    "swap-ends": (
        "swap the [ends|outer letters|first and last letters] of {x}",
        "exchange the [ends|first and last letters|outer letters] of {x}",
        "trade the [ends|outer letters] of {x}",
        "{x} with [its ends|the first and last letters] [swapped|exchanged]",
        "switch [the ends|the outer letters] of {x} over",
        "[swap|exchange] the [letters at both ends|outermost letters] of {x}",
        "[let|make] the first and last letters of {x} trade places",
        "what is {x} with swapped ends",
    ),
    "initials": (
        "[give|take|find|write] the initials of {x}",
        "[abbreviate|shorten] {x}",
        "make an [acronym|abbreviation] [of|from] {x}",
        "{x} as [an acronym|initials|an abbreviation]",
        "what are the initials of {x}",
        "the [initials|acronym|abbreviation] for {x}",
        "the first letters of the words in {x}",
        "[which|what] initials has {x}",
    ),
    "last-word": (
        "[give|take|find|write] the [last|final] word [of|in] {x}",
        "what is the [last|final] word [of|in] {x}",
        "which word [ends|finishes|closes] {x}",
        "keep only the [last|final] word of {x}",
        "the word at the end of {x}",
    ),
    "drop-first": (
        "[drop|remove|delete|skip] the [first|opening|leading] letter [of|from] {x}",
        "{x} without [the|its] [first|opening|leading] letter",
        "[behead|decapitate] {x}",
        "[cut|chop] the [first|opening|leading] letter off {x}",
        "start {x} [at|from] its second letter",
        "what is left of {x} after its [first|opening|leading] letter",
    ),
    "json": (
        "[give|return|write|put|show] {x} [as|in] json",
        "{x} as [json|a json object|a json value]",
        "wrap {x} in [json|a json object]",
        "[format|serialise] {x} as json",
        "answer {x} in json",
        "a json object [holding|containing|with] {x}",
    ),
    "polite": (
        "[say|tell me|answer] {x} [politely|nicely|courteously]",
        "be [polite|courteous|nice] and say {x}",
        "a [polite|courteous|friendly] answer with {x}",
        "[politely|nicely|courteously] [say|answer|return] {x}",
        "{x} in a [polite|courteous|friendly] [way|tone]",
    ),
    "spell": (
        "spell {x}",
        "spell {x} [letter by letter|with hyphens|out]",
        "[hyphenate|dash] {x}",
        "put [hyphens|dashes] between the letters of {x}",
        "separate the letters of {x} [with|by] [hyphens|dashes]",
        "{x} with [hyphens|dashes] between the letters",
        "{x} [spelled out|with hyphens]",
        "how do you spell {x}",
        "a hyphen between all letters of {x}",
        "[write|show] {x} hyphenated",
    ),
    "brackets": (
        "[put|wrap|enclose|set] {x} in [angle brackets|chevrons]",
        "{x} [in|inside|between] [angle brackets|chevrons]",
        "surround {x} with [angle brackets|chevrons]",
        "[angle brackets|chevrons] around {x}",
        "bracket {x}",
        "{x} with [angle brackets|chevrons] around it",
    ),
}

TAILS: Mapping[str, tuple[str, ...]] = {
    "json": (
        "[as|in] json",
        "[as|in] a json object",
        "[answer|reply] in json",
        "[wrap|put] [it|the answer|the result] in [json|a json object]",
        "[format|serialise] [it|the answer|the result] as json",
        "[give|return|show] [it|the result] as [json|a json value]",
    ),
    "polite": (
        "[politely|nicely|courteously]",
        "[be|stay] [polite|courteous|nice]",
        "in a [polite|courteous|friendly] [way|tone]",
        "[answer|reply|say it] [politely|nicely|courteously]",
        "[give|return] [it|the answer] [politely|courteously]",
        "with a [polite|courteous|friendly] answer",
    ),
    "brackets": (
        "[in|inside|between] [angle brackets|chevrons]",
        "[put|wrap|enclose|set] [it|the answer|the result] in [angle brackets|chevrons]",
        "surround [it|the answer|the result] with [angle brackets|chevrons]",
        "with [angle brackets|chevrons] around [it|the answer]",
        "bracket [it|the answer|the result]",
    ),
}
"""What asks for a style after (or ahead of) another request."""

ECHOES = (
    "say {x}",
    "repeat {x}",
    "give {x} back",
    "return {x}",
    "print {x}",
    "show {x}",
    "write {x}",
    "tell me {x}",
)
"""Requests for the operand itself, which a style then dresses."""

OPENINGS = ("please ", "hey, ", "now ", "could you ", "i need this: ", "ok, ", "next: ")
CLOSINGS = (" please", ", thanks", " for me", " now", ", thank you")

_CHOICE = re.compile(r"\[([^\]]*)\]")


def expand(pattern: str) -> list[str]:
    """Every template that a pattern stands for, in order."""
    parts = _CHOICE.split(pattern)
    options = [p.split("|") if i % 2 else [p] for i, p in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*options)]
