"""What ``python -m router_training`` writes, a running server routes by."""

from __future__ import annotations

import json

import pytest

from mora_serve.core import Source
from router_training.__main__ import main
from tests.server.conftest import PROMPTS

WORDS = (
    *("stone", "river", "cloud", "lamp", "grass", "fork"),
    *("plate", "glass", "moon", "tree", "sand", "door"),
)


@pytest.fixture(scope="module", params=["ngrams", "both"])
def trained(request, root, tmp_path_factory):
    """The file of a router trained on rows as feedback is exported, with the base of the server."""
    folder = tmp_path_factory.mktemp("trained")
    texts = {
        "rev": [f"reverse the word {w}" for w in WORDS],
        "sum": [f"add the numbers {i} and {2 * i + 1}" for i in range(12)],
        "plain": [f"how many vowels has {w}" for w in WORDS],
    }
    rows = [{"prompt": p, "tasks": [n], "adapters": [n]} for n, own in texts.items() for p in own]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    other = [f"{a} {b} was seen near {c}" for a in WORDS for b in WORDS[:3] for c in WORDS[:3]]
    (folder / "outside.txt").write_text("\n".join(other))
    settings = {
        "adapters": [str(root / "adapters" / name) for name in texts],
        "prompts": [str(folder / "rows.jsonl")],
        "outside": [str(folder / "outside.txt")],
        "base": str(root / "base"),
        "features": request.param,
        "dims": 64,
        "folds": 2,
        "out": str(folder / "out"),
    }
    (folder / "config.yaml").write_text(json.dumps(settings))
    assert main([str(folder / "config.yaml")]) == 0
    return request.param, (folder / "out" / "router.safetensors").read_bytes()


def test_a_trained_router_is_loaded_and_routes(client, trained):
    kind, data = trained
    loaded = client.load_router(data=data)
    assert (loaded.digest, loaded.features) == (client.get_router().digest, kind)
    for name in PROMPTS:
        client.register_adapter(name, name)
    for name, prompt in (("rev", "reverse the word table"), ("sum", "add the numbers 70 and 8")):
        got = client.generate(prompt, max_tokens=2)
        assert got.decision.source is Source.ROUTER
        assert [a.adapter for a in got.decision.mixture.adapters] == [name]
    assert client.route("xyzzy qqq 0x7f").source is Source.ABSTAINED
