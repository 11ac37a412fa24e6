"""What a request may ask for: each refusal names the field, the value and the remedy."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.config import Config, EngineConfig
from mora_serve.core import SamplingParams
from mora_serve.errors import InvalidArgument
from mora_serve.server.convert import check_chat, sampling_of
from mora_serve.v1 import generation_pb2 as pb

CONFIG = Config(engine=EngineConfig(max_tokens=100, max_stop=3, max_logprobs=5))
VOCABULARY = 50


def convert(**fields) -> SamplingParams:
    return sampling_of(pb.SamplingParams(**fields), CONFIG, VOCABULARY)


def test_nothing_said_is_greedy_with_a_seed_of_the_servers():
    got = convert()
    assert got == SamplingParams(max_tokens=100, seed=got.seed)
    assert got.seed != convert().seed


def test_what_is_said_is_kept():
    """Zeros that mean something are not taken for unset."""
    said = {
        "max_tokens": 7,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.5,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "presence_penalty": -2.0,
        "frequency_penalty": 2.0,
        "seed": 0,
        "stop": ("a", "b"),
        "stop_token_ids": (0, 49),
        "ignore_eos": True,
        "logprobs": 0,
    }
    assert convert(**said) == SamplingParams(**said)


WRONG = {
    "max_tokens=0": ({"max_tokens": 0}, "from 1 to 100"),
    "max_tokens=101": ({"max_tokens": 101}, "from 1 to 100"),
    "temperature=-1": ({"temperature": -1}, "from 0 to 10"),
    "temperature=inf": ({"temperature": math.inf}, "from 0 to 10"),
    "temperature=nan": ({"temperature": math.nan}, "from 0 to 10"),
    "top_p=0": ({"top_p": 0}, "above 0"),
    "top_p=1.5": ({"top_p": 1.5}, "up to 1"),
    "min_p=2": ({"min_p": 2}, "from 0 to 1"),
    "repetition_penalty=0": ({"repetition_penalty": 0}, "above 0"),
    "presence_penalty=3": ({"presence_penalty": 3}, "from -2 to 2"),
    "frequency_penalty=-3": ({"frequency_penalty": -3}, "from -2 to 2"),
    "logprobs=6": ({"logprobs": 6}, "at most 5"),
    "stop=4 strings": ({"stop": "abcd"}, "at most 3"),
    "stop[1]=empty": ({"stop": ("a", "")}, "leave it out"),
    "stop[0]=too long": ({"stop": ("x" * 257,)}, "at most 256"),
    "stop_token_ids=4 ids": ({"stop_token_ids": (1, 2, 3, 4)}, "at most 3"),
    "stop_token_ids[1]=50": ({"stop_token_ids": (1, 50)}, "from 0 to 49"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_out_of_range_is_refused(case):
    fields, remedy = WRONG[case]
    field, _, value = case.partition("=")
    with pytest.raises(InvalidArgument) as caught:
        convert(**fields)
    error = caught.value
    assert error.field == f"sampling.{field}"
    assert error.message.startswith(f"sampling.{field}: ")
    assert remedy in error.message
    if not value[-1].isalpha():
        assert value in error.message


@given(st.floats(width=32), st.floats(width=32), st.floats(width=32))
def test_what_passes_can_be_sampled_with(temperature, top_p, penalty):
    """Whatever the numbers, they are refused or lie where the sampler's arithmetic holds."""
    try:
        got = convert(temperature=temperature, top_p=top_p, repetition_penalty=penalty)
    except InvalidArgument:
        return
    assert 0 <= got.temperature <= 10
    assert 0 < got.top_p <= 1
    assert 0 < got.repetition_penalty <= 10


def chat(*turns: tuple[str, str]) -> pb.Chat:
    return pb.Chat(messages=[pb.ChatMessage(role=r, content=c) for r, c in turns])


def test_a_conversation_of_known_roles_passes():
    check_chat(chat(("system", ""), ("user", "hello"), ("assistant", "yes?"), ("tool", "4")))


@pytest.mark.parametrize(
    ("turns", "field", "remedy"),
    [
        ((), "prompt.chat.messages", "at least one"),
        ((("user", " "), ("system", "")), "prompt.chat.messages", "give some content"),
        ((("user", "a"), ("robot", "b")), "prompt.chat.messages[1].role", "system, user"),
    ],
    ids=["none", "empty", "unknown role"],
)
def test_other_conversations_are_refused(turns, field, remedy):
    with pytest.raises(InvalidArgument, match=remedy) as caught:
        check_chat(chat(*turns))
    assert caught.value.field == field
