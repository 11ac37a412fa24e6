"""RouterService and routed generation against a real server."""

from __future__ import annotations

import hashlib
import threading

import pytest

from mora_serve import errors
from mora_serve.core import Mixture, Source
from mora_serve.router.features import Features, NGrams
from router_training.router import FitOptions, fit_router
from router_training.router_data import RouterData
from tests.server.conftest import PROMPTS, running

WORDS = (
    *("stone", "river", "cloud", "lamp", "grass", "fork"),
    *("plate", "glass", "moon", "tree", "sand", "door"),
)


@pytest.fixture(scope="module")
def router_file() -> bytes:
    """A small router that knows tasks like those of the test adapters."""
    examples = {
        "rev": [f"reverse the word {w}" for w in WORDS],
        "sum": [f"add the numbers {i} and {2 * i + 1}" for i in range(12)],
        "upper": [f"write {w} in capital letters" for w in WORDS],
        "count": [f"how many vowels has {w}" for w in WORDS],
    }
    other = [f"{a} {b} was seen near {c}" for a in WORDS for b in WORDS[:3] for c in WORDS[:3]]
    options = FitOptions(Features(NGrams(dim=512)), dims=64, folds=2)
    return fit_router(RouterData.of(examples, other), options=options)[0]


@pytest.fixture
def routed(client, router_file):
    """The client's tenant has rev and sum, the server a router."""
    client.load_router(data=router_file)
    for name in PROMPTS:
        client.register_adapter(name, name)
    return client


def test_the_router_picks_what_was_registered(routed):
    got = routed.generate("reverse the word plate", max_tokens=4)
    assert got.decision.source is Source.ROUTER
    assert [a.adapter for a in got.decision.mixture.adapters] == ["rev"]
    assert got.decision.candidates[0].adapter == "rev"
    assert got.decision.router_digest == routed.get_router().digest


def test_route_decides_as_generate_does(routed):
    for options in ({}, {"task": "do-sum"}, {"adapters": {"rev": 0.5}}, {"base": True}):
        decision = routed.route("add the numbers 7 and 8", **options)
        got = routed.generate("add the numbers 7 and 8", max_tokens=1, **options)
        assert decision == got.decision


def test_a_prompt_that_fits_nothing_gets_the_base(routed):
    """Exactly what BaseOnly gives, log-probabilities included."""
    prompt = "xyzzy qqq 0x7f"
    options = {"max_tokens": 12, "logprobs": 2}
    got = routed.generate(prompt, **options)
    assert (got.decision.source, got.decision.mixture) == (Source.ABSTAINED, Mixture())
    base = routed.generate(prompt, base=True, **options)
    assert (got.text, got.tokens) == (base.text, base.tokens)


def test_a_conversation_is_routed_by_its_last_user_turn(routed):
    turns = [("user", "add the numbers 1 and 2"), ("assistant", "3")]
    turns += [("user", "reverse the word moon")]
    assert routed.route(messages=turns).mixture.adapters[0].adapter == "rev"


def test_ids_are_routed_by_their_text(serving, routed):
    ids = serving.server._assembly.base.tokenizer.encode("add the numbers 3 and 4")
    assert routed.route(token_ids=ids).mixture.adapters[0].adapter == "sum"


def test_another_text_can_be_routed_by(routed):
    decision = routed.route("xyzzy", route_by="reverse the word lamp")
    assert decision.mixture.adapters[0].adapter == "rev"


def test_candidates_restrict_the_router(routed):
    decision = routed.route("reverse the word lamp", candidates=["sum"])
    assert {c.adapter for c in decision.candidates} == {"sum"}


def test_an_adapter_is_routable_as_soon_as_it_is_registered(routed):
    prompt = "how many vowels has glass"
    assert routed.route(prompt).mixture == Mixture()
    routed.register_adapter("vowels", "plain", prompts=[f"how many vowels has {w}" for w in WORDS])
    assert routed.route(prompt).mixture.adapters[0].adapter == "vowels"
    routed.unregister_adapter("vowels")
    assert routed.route(prompt).mixture == Mixture()


def test_a_router_is_described(routed, router_file):
    described = routed.get_router()
    assert described.digest == hashlib.sha256(router_file).hexdigest()
    assert (described.routable_adapters, described.dims, described.max_adapters) == (2, 64, 2)
    assert routed.server_info().router_digest == described.digest


def test_adapters_whose_prompts_say_nothing_are_not_counted_as_routable(routed):
    routed.register_adapter("mute", "plain", prompts=["?!", "..."])
    assert routed.get_router().routable_adapters == 2
    assert routed.server_info().adapters == 3


def test_adapters_are_counted_off_the_event_loop(serving, routed, monkeypatch):
    """With thousands of them it takes milliseconds, for which no stream may wait."""
    registry = serving.server._assembly.registry
    threads, served = [], registry.served

    def watched(tenant):
        threads.append(threading.current_thread().name)
        return served(tenant)

    monkeypatch.setattr(registry, "served", watched)
    assert routed.server_info().adapters == 2
    assert routed.get_router().routable_adapters == 2
    assert [name.startswith("route") for name in threads] == [True]


def test_a_router_can_be_a_file_under_the_root(routed, root, router_file):
    (root / "adapters/router.safetensors").write_bytes(router_file)
    digest = hashlib.sha256(router_file).hexdigest()
    assert routed.load_router("router.safetensors").digest == digest


def test_a_bad_router_leaves_the_one_in_use(routed):
    before = routed.get_router()
    with pytest.raises(errors.InvalidArgument, match="router"):
        routed.load_router(data=b"not a router")
    assert routed.get_router() == before


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("../base/config.json", errors.InvalidArgument),
        ("/etc/passwd", errors.InvalidArgument),
        ("rev", errors.InvalidArgument),
        ("link", errors.InvalidArgument),
        ("nothing.safetensors", errors.NotFound),
        ("no/such/directory", errors.NotFound),
        ("", errors.InvalidArgument),
    ],
)
def test_paths_outside_the_root_are_refused(client, root, path, error):
    link = root / "adapters/link"
    if not link.is_symlink():
        link.symlink_to(root / "base/config.json")
    with pytest.raises(error) as caught:
        client.load_router(path)
    assert caught.value.field == "path"
    assert str(root) not in caught.value.message


def test_without_a_router_nothing_is_picked(configure, router_file, tmp_path):
    """The base answers; a router given by configuration or stored earlier is there at start."""
    state = {"state": str(tmp_path / "state")}
    with running(configure(server=state)) as serving, serving.client() as client:
        client.register_adapter("rev", "rev")
        assert client.get_router().digest == ""
        assert client.generate("reverse it", max_tokens=1).decision.source is Source.ABSTAINED
    (tmp_path / "r.safetensors").write_bytes(router_file)
    config = configure(server=state, router={"path": str(tmp_path / "r.safetensors")})
    with running(config) as serving, serving.client() as client:
        digest = client.get_router().digest
        assert client.route("reverse the word moon").mixture.adapters[0].adapter == "rev"
    with running(configure(server=state)) as serving, serving.client() as client:
        assert client.get_router().digest == digest
