"""The bundle's build, with recipes of a few steps: stages, manifest, measuring."""

from __future__ import annotations

import re

import pytest
import torch

from mora_serve.adapters.card import FILE, parse_card
from mora_serve.config import AdaptersConfig, BaseConfig
from mora_serve.errors import InvalidArgument
from mora_serve.model.attention import DenseCausal
from mora_serve.model.loading import load_base
from mora_serve.router.features import Features, NGrams
from router_training.batched import AdapterRecipe
from router_training.demo.base import BaseRecipe, build_model, exact_match, pretrain
from router_training.demo.build import BuildOptions, build
from router_training.demo.coded import Row
from router_training.demo.manifest import Manifest
from router_training.demo.routing import RouterRecipe
from router_training.demo.tasks import HELD_OUT, TASKS
from router_training.generation import greedy
from router_training.router import FitOptions


def options(out, **changes):
    return BuildOptions(
        out,
        base=BaseRecipe(steps=2, rows=8),
        adapters=AdapterRecipe(steps=1, rows=8),
        router=RouterRecipe(
            24, FitOptions(Features(NGrams(dim=256)), 64, strengths=(1.0,), folds=2)
        ),
        **changes,
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    out = tmp_path_factory.mktemp("bundle") / "demo"
    build(options(out), lambda line: None)
    return out


def test_a_bundle_is_whole(bundle):
    """Base, an adapter a task with its routing card, manifest; small enough to commit."""
    manifest = Manifest.read(bundle)
    base = load_base(BaseConfig(str(bundle / "base"), device="cpu"))
    assert manifest.base_fingerprint == base.fingerprint
    assert {a.name for a in manifest.adapters if not a.registered} == set(HELD_OUT)
    for adapter in manifest.adapters:
        card = parse_card((bundle / adapter.directory / FILE).read_bytes(), AdaptersConfig())
        assert card.tasks == adapter.tasks
        assert len(card.prompts) == 16
        assert card.base_fingerprint == base.fingerprint
        templates = TASKS[adapter.name].test
        assert not {re.sub("'.*'", "{x}", p) for p in card.prompts} & set(templates)
    assert sum(f.stat().st_size for f in bundle.rglob("*") if f.is_file()) < 6e6


def test_a_full_directory_is_not_overwritten(bundle):
    """Without --resume a directory with content is refused."""
    with pytest.raises(FileExistsError, match="--resume"):
        build(options(bundle), lambda line: None)


def test_resuming_keeps_finished_stages(bundle):
    """The base is kept as it is; a missing stage is made anew."""
    weights = bundle / "base" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    lines = []
    build(options(bundle, resume=True), lines.append)
    assert weights.stat().st_mtime_ns == before
    assert "base: kept" in lines
    assert "adapters: kept" in lines


def test_pretraining_lowers_the_loss():
    """A few steps on coded rows bring the answers' loss down."""
    lines = []
    pretrain(BaseRecipe(steps=50, rows=6, warmup=5), lines.append)
    losses = [float(line.split()[-1]) for line in lines if "answer loss" in line]
    assert losses[-1] < losses[0] - 1


def test_a_width_that_cannot_be_quantised_is_refused_before_any_step():
    """NF4 has a scale for each 64 weights of a row."""
    lines = []
    with pytest.raises(InvalidArgument, match="96 is no multiple of 64") as caught:
        pretrain(BaseRecipe(steps=1, rows=1, hidden=96), lines.append)
    assert caught.value.field == "hidden"
    assert lines == []


def test_exact_match_counts_whole_answers():
    """An untrained model is right about nothing."""
    assert exact_match(build_model(1), [Row("#A 'kavo'", "ovak")] * 3) == 0.0


def test_greedy_answers_do_not_see_the_batch(base):
    """Each prompt's continuation is the one that it has alone, whatever the others' lengths."""
    prompts = [list(b"ab"), list(b"a longer prompt"), list(b"mid one")]
    together = greedy(base.decoder, prompts, {258}, 6)
    assert together == [greedy(base.decoder, [p], {258}, 6)[0] for p in prompts]
    assert all(len(answer) <= 6 for answer in together)


def test_greedy_takes_the_most_likely_token_of_the_whole_text(base):
    """With its cache it gives what computing each whole text anew gives."""
    prompts = [list(b"some words"), list(b"and a few more of them")]
    for prompt, answer in zip(prompts, greedy(base.decoder, prompts, set(), 8), strict=True):
        for n, token in enumerate(answer):
            ids = torch.tensor(prompt + answer[:n])
            attention = DenseCausal(1, len(ids))
            with torch.no_grad():
                hidden = base.decoder.hidden(ids, torch.arange(len(ids)), attention)
            assert base.decoder.logits(hidden[-1:]).argmax() == token


def test_greedy_stops_at_the_end_token(base):
    """The end token is not part of the answer."""
    first = greedy(base.decoder, [list(b"hello")], set(), 3)[0]
    assert greedy(base.decoder, [list(b"hello")], {first[1]}, 3) == [first[: first.index(first[1])]]
