"""The clients: what they send, what they make of answers, and that they are alike."""

from __future__ import annotations

import inspect
import json
import socket
from datetime import datetime, timedelta, timezone

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve import errors, messages
from mora_serve.client import AsyncClient, AsyncStream, Client, Stream, connection, requests
from mora_serve.core import (
    AdapterWeight,
    Candidate,
    Decision,
    Finish,
    Logprob,
    Mixture,
    SamplingParams,
    Source,
    TokenOut,
    Usage,
)
from mora_serve.server.status import status_of
from mora_serve.v1 import adapters_pb2, generation_pb2, router_pb2, server_pb2

g = generation_pb2
FILES = [m.DESCRIPTOR for m in (generation_pb2, adapters_pb2, router_pb2, server_pb2)]


def ask(prompt: str | None = "x", **options) -> g.GenerateRequest:
    return requests.generate(g.GenerateRequest, prompt, options)


class TestRequests:
    def test_a_bare_prompt_says_nothing_else(self):
        """What is unset stays unset, so that the server's defaults hold."""
        assert ask("hello") == g.GenerateRequest(
            prompt=g.Prompt(text="hello"), sampling=g.SamplingParams()
        )

    def test_each_form_of_prompt(self):
        chat = ask(None, messages=[("user", "hi")]).prompt
        assert chat == g.Prompt(chat=g.Chat(messages=[g.ChatMessage(role="user", content="hi")]))
        assert ask(None, token_ids=[1, 2]).prompt == g.Prompt(token_ids=g.TokenIds(ids=[1, 2]))
        assert ask("").prompt.WhichOneof("kind") == "text"

    @pytest.mark.parametrize(
        "given",
        [{"prompt": None}, {"token_ids": [1]}, {"prompt": None, "messages": [], "token_ids": []}],
    )
    def test_one_prompt_is_needed(self, given):
        with pytest.raises(errors.InvalidArgument, match="exactly one"):
            ask(**given)

    @pytest.mark.parametrize(
        ("options", "selection"),
        [
            ({}, None),
            ({"candidates": [], "max_adapters": 0, "adapters": None, "task": ""}, None),
            ({"base": True}, g.Selection(base=g.BaseOnly())),
            ({"task": "a"}, g.Selection(task=g.TaskHint(tasks=["a"]))),
            (
                {"task": ["a", "b"], "fallback_to_router": True},
                g.Selection(task=g.TaskHint(tasks=["a", "b"], fallback_to_router=True)),
            ),
            (
                {"route_by": "t", "candidates": ["a"], "max_adapters": 3},
                g.Selection(auto=g.AutoRoute(text="t", candidates=["a"], max_adapters=3)),
            ),
            ({"adapters": {}}, g.Selection(mixture=g.Mixture())),
            (
                {"adapters": {"a": 0.0}},
                g.Selection(mixture=g.Mixture(adapters=[g.AdapterWeight(adapter="a", weight=0)])),
            ),
            (
                {"adapters": Mixture((AdapterWeight("a", 2.0, "d"),))},
                g.Selection(
                    mixture=g.Mixture(adapters=[g.AdapterWeight(adapter="a", weight=2, digest="d")])
                ),
            ),
        ],
    )
    def test_each_way_of_choosing(self, options, selection):
        want = ask("x")
        if selection is not None:
            want.selection.CopyFrom(selection)
        assert ask("x", **options) == want

    @pytest.mark.parametrize(
        "options",
        [
            {"base": True, "task": "a"},
            {"adapters": {"a": 1}, "base": True},
            {"adapters": {}, "candidates": ["a"]},
            {"task": "a", "max_adapters": 2},
        ],
    )
    def test_two_ways_of_choosing_are_one_too_many(self, options):
        with pytest.raises(errors.InvalidArgument, match="exclude each other"):
            ask("x", **options)

    def test_zeros_are_sent(self):
        """A zero that means something is not taken for unset."""
        sampling = ask("x", max_tokens=0, top_p=0.0, seed=0, logprobs=0, stop="end").sampling
        for name in ("max_tokens", "top_p", "seed", "logprobs"):
            assert sampling.HasField(name)
        assert list(sampling.stop) == ["end"]

    @pytest.mark.parametrize(
        ("options", "field", "message"),
        [
            ({"max_tokens": -1}, "sampling.max_tokens", "-1 cannot be sent; give a positive whole"),
            ({"top_k": 1 << 40}, "sampling.top_k", "1099511627776 cannot be .* below 2.32"),
            ({"seed": "x"}, "sampling.seed", "'x' cannot be sent; give a positive .* below 2.64"),
            ({"temperature": "hot"}, "sampling.temperature", "'hot' .* give a number"),
            ({"ignore_eos": "yes"}, "sampling.ignore_eos", "'yes' .* give a truth value"),
            ({"stop": 5}, "sampling.stop", "5 cannot be sent; give a list, each a text"),
            ({"stop_token_ids": [-1]}, "sampling.stop_token_ids", "-1.* give a list, each a posi"),
            ({"max_adapters": -1}, "selection.auto.max_adapters", "-1 cannot be sent"),
            ({"candidates": [1]}, "selection.auto.candidates", "1.* cannot be sent"),
            ({"route_by": 1}, "selection.auto.text", "1 cannot be sent"),
            ({"task": [1]}, "selection.task.tasks", "1.* cannot be sent"),
            (
                {"adapters": {"a": 1.0, "reverse": "1"}},
                "selection.mixture.adapters[1].weight",
                "'1' cannot be sent; give a number",
            ),
            ({"adapters": {1: 1.0}}, "selection.mixture.adapters[0].adapter", "1 cannot be sent"),
            ({"adapters": "reverse"}, "selection.mixture", "'reverse' .* e.g. {'reverse': 1.0}"),
            (
                {"adapters": Mixture((AdapterWeight("a", "b"),))},
                "selection.mixture.adapters[0].weight",
                "'b' cannot be sent",
            ),
            ({"prompt": 5}, "prompt.text", "5 cannot be sent; give a text"),
            ({"prompt": "\ud800"}, "prompt.text", "cannot be sent"),
            ({"prompt": None, "token_ids": [-1]}, "prompt.token_ids.ids", "-1.* cannot be sent"),
            (
                {"prompt": None, "messages": [("user", "a"), "b"]},
                "prompt.chat.messages[1]",
                "'b' cannot be sent; give a role and its content",
            ),
        ],
    )
    def test_what_no_message_holds_is_named_with_its_remedy(self, options, field, message):
        with pytest.raises(errors.InvalidArgument, match=message) as e:
            ask(**({"prompt": "x"} | options))
        assert e.value.field == field
        assert e.value.message.startswith(f"{field}: ")

    def test_a_card_that_no_message_holds_is_refused_before_anything_is_sent(self, tmp_path):
        for file in requests.UPLOAD_FILES:
            (tmp_path / file).touch()
        with pytest.raises(errors.InvalidArgument, match=r"card\.tasks: .* each a text"):
            requests.upload("a", tmp_path, False, {"tasks": [1]})
        with pytest.raises(errors.InvalidArgument, match=r"path: .* give a text"):
            requests.register("a", tmp_path, False, {})

    def test_a_directory_without_an_adapter_is_refused_with_where_the_adapter_is(self, tmp_path):
        (tmp_path / "checkpoint-3").mkdir()
        for file in requests.UPLOAD_FILES:
            (tmp_path / "checkpoint-3" / file).touch()
        with pytest.raises(errors.InvalidArgument, match="in the folder 'checkpoint-3'") as e:
            requests.upload("a", tmp_path, False, {})
        assert (e.value.field, e.value.reason) == ("directory", "MISSING_FILE")
        with pytest.raises(errors.InvalidArgument, match="cannot be opened"):
            requests.upload("a", tmp_path / "none", False, {})

    def test_one_text_is_a_list_of_one(self):
        """It is not taken apart into its letters."""
        assert list(ask("x", candidates="json").selection.auto.candidates) == ["json"]
        assert list(ask("x", stop="end").sampling.stop) == ["end"]
        card = requests.card({"tasks": "reverse", "prompts": "reverse it"})
        assert card == adapters_pb2.RoutingCard(tasks=["reverse"], prompts=["reverse it"])

    def test_an_update_always_has_a_card(self):
        assert requests.update("a", {}).HasField("card")

    def test_every_sampling_parameter_can_be_given(self):
        """The client, the API and the core name the same ones."""
        api = {f.name for f in g.SamplingParams.DESCRIPTOR.fields}
        assert api == set(SamplingParams.__dataclass_fields__) == set(requests._SAMPLING)

    def test_a_card_is_sent_when_something_is_said(self):
        assert requests.card({"tasks": [], "prompts": [], "description": ""}) is None
        card = requests.card({"tasks": ["a"], "group": "g", "timeout": 3})
        assert card == adapters_pb2.RoutingCard(tasks=["a"], group="g")
        fields = {f.name for f in adapters_pb2.RoutingCard.DESCRIPTOR.fields}
        assert fields == set(requests._CARD)

    def test_feedback_is_asked_for_from_a_cursor_or_a_time_on(self):
        kind = router_pb2.ExportFeedbackRequest
        assert requests.export_feedback("", None) == kind()
        noon = datetime(2026, 11, 24, 12, tzinfo=timezone(timedelta(hours=1)))
        asked = requests.export_feedback("1.2", noon)
        assert (asked.cursor, asked.since.ToDatetime()) == ("1.2", datetime(2026, 11, 24, 11))
        with pytest.raises(errors.InvalidArgument, match="since: 5 cannot be sent; give a datet"):
            requests.export_feedback("", 5)


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
names = st.text("abc-1", min_size=1, max_size=5)
mixtures = st.builds(Mixture, st.lists(st.builds(AdapterWeight, names, floats, names)).map(tuple))
decisions = st.builds(
    Decision,
    mixtures,
    st.sampled_from(Source),
    st.lists(st.builds(Candidate, names, floats, floats)).map(tuple),
    names,
)
counts = st.integers(0, 2**31)
tokens = st.builds(
    TokenOut,
    counts,
    st.none() | floats,
    st.lists(st.builds(Logprob, counts, floats)).map(tuple),
)
seconds = st.floats(0, 1e6)
usages = st.builds(Usage, counts, counts, counts, seconds, seconds, seconds, counts)


class TestMessages:
    """What the server says is what the client reads."""

    @given(decisions)
    def test_decisions(self, decision):
        assert messages.decision_of(messages.decision_message(decision)) == decision

    @given(tokens)
    def test_tokens(self, token):
        assert messages.token_of(messages.token_message(token)) == token

    @given(usages)
    def test_usages(self, usage):
        assert messages.usage_of(*messages.usage_messages(usage)) == usage

    @pytest.mark.parametrize("finish", [Finish.STOP, Finish.LENGTH])
    def test_finishes(self, finish):
        assert messages.finish_of(messages.finish_message(finish)) is finish

    def test_an_unset_weight_is_one(self):
        message = g.Mixture(adapters=[g.AdapterWeight(adapter="a")])
        assert messages.mixture_of(message).adapters[0].weight == 1.0


class Failure:
    """A failed call, as grpc's clients show it."""

    def __init__(self, code: grpc.StatusCode, details: str, metadata=()) -> None:
        self._values = code, details, metadata

    def code(self):
        return self._values[0]

    def details(self):
        return self._values[1]

    def trailing_metadata(self):
        return self._values[2]


ERRORS = [
    cls("a: wrong; do better", field="a.b", reason="WHY", retry_after=1.5)
    for cls in errors.MoraError.__subclasses__()
    if cls is not errors.ConfigError
]


class TestErrors:
    @pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
    def test_what_the_server_raises_is_what_the_client_raises(self, error):
        """The class, the message, the field, the reason and when to come back."""
        packed = ("grpc-status-details-bin", status_of(error).SerializeToString())
        failed = Failure(grpc.StatusCode[error.code], error.message, (packed,))
        got = connection.error_of(failed, "here")
        assert type(got) is type(error)
        assert vars(got) == vars(error)

    def test_every_class_of_error_has_a_code_of_its_own(self):
        assert len({e.code for e in ERRORS}) == len(ERRORS)
        assert all(errors.class_of(e.code) is type(e) for e in ERRORS)

    def test_other_codes_keep_their_name(self):
        got = connection.error_of(Failure(grpc.StatusCode.DATA_LOSS, "no"), "here")
        assert (type(got), got.code, got.message) == (errors.MoraError, "DATA_LOSS", "no")

    @pytest.mark.parametrize("packed", [b"\xff", b""])
    def test_details_that_do_not_parse_are_no_harm(self, packed):
        metadata = (("grpc-status-details-bin", packed),)
        failed = Failure(grpc.StatusCode.NOT_FOUND, "gone", metadata)
        assert connection.error_of(failed, "here").message == "gone"


def test_a_status_that_grpc_lost_is_no_fault_of_the_server():
    """A refusal can meet a request that is still being sent; asyncio's calls then tell neither."""
    lost = connection.error_of(Failure(grpc.StatusCode.INTERNAL, "Internal error from Core"), "h:1")
    assert isinstance(lost, errors.Unavailable)
    assert lost.reason == "ENDED_EARLY"
    assert "send it again" in lost.message
    other = connection.error_of(Failure(grpc.StatusCode.INTERNAL, "internal error; x"), "h:1")
    assert isinstance(other, errors.Internal)


def nowhere() -> str:
    """An address at which nobody listens."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


class TestNobodyThere:
    def test_the_address_is_named(self):
        address = nowhere()
        with Client(address) as client, pytest.raises(errors.Unavailable, match=address):
            client.unregister_adapter("x")

    def test_waiting_ends(self):
        with Client(nowhere()) as client, pytest.raises(errors.Unavailable, match="not ready"):
            client.wait_until_ready(timeout=0.3)

    async def test_waiting_ends_for_asyncio_too(self):
        async with AsyncClient(nowhere()) as client:
            with pytest.raises(errors.Unavailable, match="not ready"):
                await client.wait_until_ready(timeout=0.3)

    def test_a_timeout_is_explained(self):
        with Client(nowhere()) as client, pytest.raises(errors.DeadlineExceeded, match="longer"):
            client.generate("x", timeout=0.1)


@pytest.fixture
def blocking():
    with Client(nowhere()) as client:
        yield client


class TestUnknownArguments:
    @pytest.mark.parametrize(
        ("method", "given", "near"),
        [
            ("generate", {"adapter": "json"}, "'adapters'"),
            ("generate", {"tempature": 1}, "'temperature'"),
            ("stream", {"max_token": 1}, "'max_tokens'"),
            ("route", {"candidate": ["a"]}, "'candidates'"),
            ("register_adapter", {"replce": True}, "'replace'"),
            ("upload_adapter", {"prompt": ["x"]}, "'prompts'"),
            ("update_adapter", {"task": "t"}, "'tasks'"),
            ("list_adapters", {"time_out": 1}, "'timeout'"),
            ("export_feedback", {"since_time": 1}, "'since'"),
        ],
    )
    def test_the_nearest_known_one_is_named(self, blocking, method, given, near):
        (name,) = given
        with pytest.raises(TypeError, match=rf"{method}\(\) .* '{name}'; did you mean {near}"):
            getattr(blocking, method)(**given)

    def test_without_a_near_one_the_known_ones_are_named(self, blocking):
        with pytest.raises(TypeError, match="known are name, timeout, request_id"):
            blocking.get_adapter("a", zzz=1)

    @pytest.mark.parametrize("cls", [Client, AsyncClient])
    def test_no_method_drops_one(self, cls):
        """Whatever takes options knows all of them; nothing is sent, nothing awaited."""
        for name, signature in public(cls).items():
            if "options" in signature.parameters:
                with pytest.raises(TypeError, match="unexpected keyword argument 'zzz'"):
                    getattr(cls, name)(None, zzz=1)


class TestNames:
    @pytest.mark.parametrize("cls", [Client, AsyncClient])
    @pytest.mark.parametrize("tenant", ["é", "a\n", "A"])
    async def test_a_tenant_that_cannot_be_one_is_refused_at_once(self, cls, tenant):
        with pytest.raises(errors.InvalidArgument, match=r"tenant: .* is not a valid name") as e:
            cls(nowhere(), tenant=tenant)
        assert e.value.field == "tenant"

    @pytest.mark.parametrize("request_id", ["é", "a\n"])
    def test_a_request_id_that_cannot_be_sent_is_refused(self, blocking, request_id):
        with pytest.raises(errors.InvalidArgument, match=r"request_id: .* give ASCII") as e:
            blocking.server_info(request_id=request_id)
        assert e.value.field == "request_id"


def public(cls: type) -> dict[str, inspect.Signature]:
    return {
        name: inspect.signature(member)
        for name, member in inspect.getmembers(cls, inspect.isfunction)
        if not name.startswith("_")
    }


@pytest.mark.parametrize(
    ("blocking", "asynchronous"), [(Client, AsyncClient), (Stream, AsyncStream)]
)
def test_both_clients_have_the_same_methods(blocking, asynchronous):
    """With the same parameters and, but for streams, the same results."""
    assert public(blocking).keys() == public(asynchronous).keys()
    for name, signature in public(blocking).items():
        other = public(asynchronous)[name]
        assert signature.parameters == other.parameters
        assert str(other.return_annotation).removeprefix("Async") == signature.return_annotation


def test_every_rpc_has_a_method_and_a_retry_rule():
    """An RPC is repeated, or there is a reason why not."""
    methods = {
        (service.full_name, method.name)
        for file in FILES
        for service in file.services_by_name.values()
        for method in service.methods
    }
    config = json.loads(dict(connection.options("x:1"))["grpc.service_config"])
    (rule,) = config["methodConfig"]
    repeated = {(n["service"], n["method"]) for n in rule["name"]}
    adapters = "mora_serve.v1.AdapterService"
    assert methods - repeated == {(adapters, "UnregisterAdapter"), (adapters, "UploadAdapter")}
    assert repeated < methods
