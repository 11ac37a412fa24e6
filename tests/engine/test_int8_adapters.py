"""An engine whose slots are int8: as PEFT computes with weights that were rounded so.

The oracle rounds PEFT's own weights: each row of A and each column of B to 127 steps. DoRA's
magnitudes are moved with the norms, as the server keeps c = m / ||W + s B A|| of the adapter as
given. By torch with every kind of adapter; by Triton's kernels, interpreted where there is no card,
with fewer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("triton")

from benchmarks import exactness, families, oracle
from benchmarks.group_bases import wrong_tokens
from benchmarks.local import LocalEngine
from mora_serve.config import AdaptersConfig, BaseConfig, Config, EngineConfig, load_config
from mora_serve.core import SamplingParams
from mora_serve.engine import integrity
from mora_serve.engine.native_forward import can_run
from mora_serve.errors import ConfigError, MoraError
from mora_serve.model.shape import PROJECTIONS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT, TOKENS = 40, 8
FEW = {
    "rank-1": oracle.VARIANTS["rank-1"],
    "rank-8": oracle.VARIANTS["rank-8"],
    "rslora": {"r": 5, "lora_alpha": 16, "use_rslora": True},
    "dora": {"r": 3, "lora_alpha": 16, "use_dora": True, "target_modules": ["q_proj", "up_proj"]},
}


def rounded(peft: Any) -> Any:
    """A copy with the weights as int8 slots keep them."""
    peft = copy.deepcopy(peft)
    for module in peft.modules():
        for name in getattr(module, "lora_B", {}):
            a, b, s = module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]
            magnitudes = getattr(module, "lora_magnitude_vector", None) or {}
            before = norms(module, name) if name in magnitudes else None
            a.data = nearest(a.data)
            b.data = nearest((b.data * s).T).T / s
            if before is not None:
                magnitudes[name].weight.data *= norms(module, name) / before
    return peft


def nearest(matrix: Tensor) -> Tensor:
    step = matrix.abs().amax(1, keepdim=True) / 127
    return torch.round(matrix / step) * step


def norms(module: Any, name: str) -> Tensor:
    delta = module.scaling[name] * module.lora_B[name].weight @ module.lora_A[name].weight
    return (module.get_base_layer().weight + delta).norm(dim=1).data


def config(base: Path, kernels: Any, **adapters: Any) -> Config:
    return Config(
        BaseConfig(str(base), quantization="none", dtype="fp32", device=DEVICE),
        EngineConfig(max_batch=32, kernels=kernels, page_size=8, kv_pages=300),
        AdaptersConfig(dtype="int8", **adapters),
    )


def engine_of(settings: Config, adapters: Path, names: Mapping[str, Any]) -> LocalEngine:
    engine = LocalEngine(settings)
    for name in names:
        engine.register(name, adapters, name)
    return engine


def check_books(engine: LocalEngine) -> None:
    own = engine.engine
    integrity.check(own._sequences.values(), own.cache, own.scheduler, own.pool)


@pytest.fixture(scope="module")
def whole(model_root: Path) -> Any:
    """PEFT's model with every variant, as given."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_root / "base", dtype=torch.float32)
    folder, names = model_root / "adapters", list(oracle.VARIANTS)
    peft = PeftModel.from_pretrained(model, str(folder / names[0]), adapter_name=names[0])
    for name in names[1:]:
        peft.load_adapter(str(folder / name), adapter_name=name)
    return peft.eval()


@pytest.fixture(scope="module")
def served(model_root: Path) -> Iterator[LocalEngine]:
    settings = config(model_root / "base", "torch", slots=18)
    with engine_of(settings, model_root / "adapters", oracle.VARIANTS) as engine:
        yield engine


class TestByTorch:
    """Every kind of adapter, all the mixtures of benchmarks/exactness.py."""

    def test_logits_are_those_of_the_rounded_weights(self, served: LocalEngine, whole: Any) -> None:
        """To float32's rounding; and a few hundredths off those of the weights as given."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(4, 320, (len(exactness.MIXTURES), 24), generator=generator)
        got, _ = exactness.mixed_logits(served, ids, list(exactness.MIXTURES))
        peft = rounded(whole)
        for i, name in enumerate(exactness.MIXTURES):
            plain, given, want = (
                exactness.reference(model, case, ids[i])
                for model, case in ((whole, "base"), (whole, name), (peft, name))
            )
            assert exactness.error(got[name], want, plain) < 1e-4, name
            off = exactness.error(got[name], given, plain)
            assert off < 0.05, name
            assert name == "base" or off > 1e-3, name

    def test_the_batched_form_gives_the_same(self, served: LocalEngine, whole: Any) -> None:
        """Which runs where no adapter of the step is DoRA."""
        cases = exactness.NO_DORA
        ids = torch.randint(4, 320, (len(cases), 8), generator=torch.Generator().manual_seed(2))
        got, batched = exactness.mixed_logits(served, ids, cases)
        assert batched
        peft = rounded(whole)
        for i, name in enumerate(cases):
            want, plain = (exactness.reference(peft, case, ids[i]) for case in (name, "base"))
            assert exactness.error(got[name], want, plain) < 1e-4, name

    def test_dora_scales_stay_float_and_the_slots_are_int8(self, served: LocalEngine) -> None:
        served.make_resident(["dora"])
        parts = list(served.engine.pool.slots.parts())
        assert {p.a.dtype for p in parts} == {p.b.dtype for p in parts} == {torch.int8}
        assert {p.dora.dtype for p in parts} == {torch.float32}

    def test_a_reused_slot_keeps_nothing_of_the_adapter_before(self, model_root: Path) -> None:
        """Smaller ones after larger ones, and one that comes back is what it was, to the bit."""
        settings = config(model_root / "base", "torch", slots=4)
        names = ("rank-64", "dora", "rank-32", "rslora", "attention")
        prompt, sampling = [5, 6, 7, 8], SamplingParams(3, ignore_eos=True)
        with engine_of(settings, model_root / "adapters", oracle.VARIANTS) as engine:
            capture = exactness.Capture(engine)
            for name in (*names, "rank-64"):
                engine.generate([(prompt, {name: 1.0}, sampling)])
            pool = engine.engine.pool
            assert pool.evictions == 2
            assert torch.equal(*(torch.stack(capture.logits[r]) for r in ("r1", "r6")))
            slot = pool.slot(engine.digests["attention"])
            adapter = engine.adapters[engine.digests["attention"]]
            filled = {(m.layer, m.projection): m.rank for m in adapter.modules}
            for layer in range(engine.base.shape.layers):
                for projection in PROJECTIONS:
                    part = pool.slots.projection(layer, projection)
                    used = filled.get((layer, projection), 0)
                    assert not any(t[slot, used:].any() for t in part.tensors)
                    assert all(t[slot, :used].any() for t in part.tensors if used)
            check_books(engine)

    def test_an_adapter_whose_numbers_overflow_ends_its_own_requests(
        self, model_root: Path, tmp_path: Path
    ) -> None:
        source = model_root / "adapters" / "rank-4"
        (tmp_path / "bad").mkdir()
        for file in source.iterdir():
            (tmp_path / "bad" / file.name).write_bytes(file.read_bytes())
        weights = tmp_path / "bad" / "adapter_model.safetensors"
        tensors = load_file(weights)
        for name in (n for n in tensors if "q_proj" in n):
            tensors[name][1, 1] = 1e30  # their product is not a float32, nor is it a scale
        save_file(tensors, weights)
        settings = config(model_root / "base", "torch", slots=4)
        prompt, sampling = [5, 6, 7, 8], SamplingParams(3, ignore_eos=True)
        with engine_of(settings, model_root / "adapters", {"rank-4": {}}) as engine:
            engine.register("bad", tmp_path, "bad")
            good = prompt, {"rank-4": 1.0}, sampling
            alone = engine.generate([good])
            with pytest.raises(MoraError):
                engine.generate([(prompt, {"bad": 1.0}, sampling)])
            assert engine.generate([good]) == alone
            check_books(engine)


class TestByKernels:
    """What a card serves with, a layer of it where they are interpreted."""

    MIXTURES: tuple[Mapping[str, float], ...] = (
        {"rank-1": 1.0},
        {"rank-8": 0.7, "rslora": -0.4},
        {"dora": 1.0},
        {"rslora": 1.0, "rank-1": 0.5},
        {},
    )

    def test_answers_and_logits_are_those_of_the_rounded_weights(self, tmp_path: Path) -> None:
        """Two slots for four adapters, so that each is reused by smaller and larger ones."""
        model = families.make_base("llama3", tmp_path / "base", num_hidden_layers=1)
        given = oracle.make_adapters(model, tmp_path / "adapters", FEW)
        peft = rounded(given)
        settings = config(tmp_path / "base", "triton", slots=2, max_mixture=2, max_rank=8)
        sampling = SamplingParams(2, ignore_eos=True)
        with engine_of(settings, tmp_path / "adapters", FEW) as engine:
            capture = exactness.Capture(engine)
            jobs = [([9 + i, 6, 7, 8], m, sampling) for i, m in enumerate(self.MIXTURES)]
            answers = [*engine.generate(jobs[:2]), *engine.generate(jobs[2:])]
            assert engine.engine.pool.evictions >= 3
            check_books(engine)
        for i, (prompt, mixture, _) in enumerate(jobs):
            ids = torch.tensor([[*prompt, *answers[i][:-1]]])
            with torch.no_grad():
                with oracle.by_hand(peft, mixture) as reference:
                    want = reference(input_ids=ids).logits[0, len(prompt) - 1 :]
                with oracle.by_hand(given, mixture) as reference:
                    unrounded = reference(input_ids=ids).logits[0, len(prompt) - 1 :]
            got = torch.stack(capture.logits[f"r{i + 1}"]).cpu()
            assert float((got - want).norm() / want.norm()) < 1e-5, mixture
            assert float((got - unrounded).norm() / unrounded.norm()) < 0.03, mixture
            assert answers[i] == want.argmax(-1).tolist()


def test_answers_are_those_of_the_rounded_weights(model_root: Path, whole: Any) -> None:
    """Through scheduler and pages, with more adapters than slots."""
    settings = config(model_root / "base", "torch", slots=6)
    sampling = SamplingParams(TOKENS, ignore_eos=True)
    generator = torch.Generator().manual_seed(3)
    cases = list(exactness.MIXTURES.values())
    prompts = torch.randint(4, 320, (len(cases), PROMPT), generator=generator).tolist()
    with engine_of(settings, model_root / "adapters", oracle.VARIANTS) as engine:
        answers = engine.generate(
            [(prompt, mixture, sampling) for prompt, mixture in zip(prompts, cases, strict=True)]
        )
        assert engine.engine.pool.evictions > 0
        check_books(engine)
    peft = rounded(whole)
    for prompt, mixture, answer in zip(prompts, cases, answers, strict=True):
        with oracle.by_hand(peft, mixture) as reference:
            assert wrong_tokens(reference, prompt, answer) == 0, mixture


@pytest.mark.parametrize("kernels", ["auto", "native"])
def test_the_compiled_path_refuses_them(model_root: Path, kernels: str) -> None:
    settings = config(model_root / "base", kernels)
    settings = replace(settings, base=replace(settings.base, device="cpu"))
    by_torch = replace(settings.engine, kernels="torch")
    plain = replace(settings, adapters=AdaptersConfig(), engine=by_torch)
    with LocalEngine(plain) as engine:
        if not can_run(engine.base.decoder):
            pytest.skip("the native path was not built: no C compiler")
    with pytest.raises(ConfigError, match=r"compiled CPU path.*'auto'.*engine\.kernels") as e:
        LocalEngine(settings)
    assert e.value.field == "adapters.dtype"


def test_ranks_that_share_a_base_refuse_them() -> None:
    flags = {"adapters.dtype": "int8", "engine.tensor_parallel": 2}
    with pytest.raises(ConfigError, match=r"one device.*tensor_parallel.*2; use 'auto'") as e:
        load_config(environ={}, flags=flags)
    assert e.value.field == "adapters.dtype"
