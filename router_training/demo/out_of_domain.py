"""Prompts that no demo task answers: prose, arithmetic noise, code.

The generators for fitting and for testing differ in words, grammar and notation, so that an
abstention measured on the second has not been learnt from the first.
"""

from __future__ import annotations

import random
from typing import Literal


def out_of_domain(rng: random.Random, split: Literal["train", "test"] = "train") -> str:
    """One prompt that belongs to no task."""
    if split == "train":
        return rng.choice((_prose, _question, _sum, _python))(rng)
    return rng.choice((_news, _letter, _equation, _markup))(rng)


def _pick(rng: random.Random, text: str) -> str:
    return rng.choice(text.split("|"))


def _prose(rng: random.Random) -> str:
    who = _pick(rng, "the old king|my neighbour|a grey cat|the farmer|our teacher|the river")
    did = _pick(rng, "walked past|looked at|painted|forgot|carried|watched|found")
    what = _pick(rng, "the bridge|a wooden boat|some apples|the tall tower|her garden|two lamps")
    when = _pick(rng, "in the morning|before winter|last night|every day|after lunch|slowly")
    return f"{who} {did} {what} {when}"


def _question(rng: random.Random) -> str:
    ask = _pick(rng, "where is|how far is|why is|who built|when did we see|how old is")
    what = _pick(rng, "the harbour|that mountain|the small church|paris|the moon|your brother")
    name = _pick(rng, "'anna'|'oslo'|'blue'|'milo'|'the end'")
    return f"{ask} {what}?" if rng.random() < 0.7 else f"{ask} {what} near {name}?"


def _sum(rng: random.Random) -> str:
    parts = [str(rng.randint(0, 999))]
    for _ in range(rng.randint(1, 4)):
        parts += [rng.choice("+-*/"), str(rng.randint(0, 999))]
    return " ".join(parts) + rng.choice(("", " =", " = ?"))


def _python(rng: random.Random) -> str:
    name = _pick(rng, "total|index|row|buffer|items|node")
    return rng.choice(
        (
            f"for {name} in range({rng.randint(2, 90)}):",
            f"{name} = {name}[{rng.randint(0, 9)}] + {rng.randint(0, 99)}",
            f"def {name}(self, value={rng.randint(0, 9)}): return value",
            f"import {name}; print({name}.size)",
            f"if {name} is None: raise ValueError('{name}')",
        )
    )


def _news(rng: random.Random) -> str:
    who = _pick(rng, "Parliament|A ferry company|Scientists|Both clubs|The museum|Investors")
    did = _pick(rng, "announced|rejected|will publish|confirmed|postponed|are discussing")
    what = _pick(rng, "new tariffs|a merger|the budget|record rainfall|an exhibition|job cuts")
    tail = _pick(rng, "on Tuesday.|despite protests.|for 2031.|, officials said.|this spring.")
    return f"{who} {did} {what} {tail}".replace(" ,", ",")


def _letter(rng: random.Random) -> str:
    opening = _pick(rng, "Dear Sir,|Hello Maria,|Good evening,|Hi team,")
    body = _pick(
        rng,
        "my parcel has not arrived yet|is your shop open on Sundays|can we meet at 'Luigi'"
        "|the heating broke again|thank you for the lovely flowers|which bus goes to the airport",
    )
    return f"{opening} {body}{rng.choice('.?')}"


def _equation(rng: random.Random) -> str:
    a, b, c = (rng.randint(2, 60) for _ in range(3))
    return rng.choice(
        (
            f"({a}x^2-{b})/{c}=0",
            f"sqrt({a}{b})>{c}%",
            f"{a}.{b:02d}e-{c} m/s",
            f"f(x)={a}sin({b}x)-{c}",
            f"{a}:{b}::{c}:y",
        )
    )


def _markup(rng: random.Random) -> str:
    n = rng.randint(1, 99)
    return rng.choice(
        (
            f"SELECT id, price FROM orders WHERE qty > {n} LIMIT 5;",  # noqa: S608 - a prompt, not a query
            f"<div class='col-{n}'><a href='#'>home</a></div>",
            f"const f = async (q) => await fetch(`/api/${{q}}?p={n}`);",
            f"grep -rn 'main' src/ | head -{n}",
            f"int main(void) {{ return {n} << 2; }}",
        )
    )
