"""The same answers on a card: mixtures in fp32, NF4, and the bundled models served.

Each test also runs on the CPU, so that it is known to be sound before a card sees it.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from benchmarks import families, memory, oracle
from benchmarks.local import LocalEngine
from mora_serve.client import Client
from mora_serve.config import AdaptersConfig, BaseConfig, Config, EngineConfig
from mora_serve.core import SamplingParams
from mora_serve.demo.bundle import bundle_path, read_examples
from mora_serve.demo.process import ServerProcess
from mora_serve.demo.scenes import ask_all
from mora_serve.model.attention import DenseCausal
from mora_serve.model.loading import load_base
from mora_serve.model.quant import DenseWeight

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
MIXTURES = ({}, {"rank-8": 1.0}, {"dora": 1.0}, {"rank-4": 0.7, "rank-64": -0.6})
TOKENS = 32


@pytest.mark.parametrize("device", DEVICES)
def test_a_mixed_batch_in_fp32_gives_the_tokens_of_peft(device: str, tmp_path: Path) -> None:
    model = families.make_base("llama3", tmp_path / "base")
    names = sorted({name for mixture in MIXTURES for name in mixture})
    variants = {name: oracle.VARIANTS[name] for name in names}
    peft = oracle.make_adapters(copy.deepcopy(model), tmp_path / "adapters", variants)
    config = Config(
        BaseConfig(str(tmp_path / "base"), quantization="none", dtype="fp32", device=device),
        EngineConfig(max_batch=8),
        AdaptersConfig(slots=8),
    )
    generator = torch.Generator().manual_seed(3)
    prompts = torch.randint(4, 320, (len(MIXTURES), 20), generator=generator).tolist()
    sampling = SamplingParams(TOKENS, ignore_eos=True)
    with LocalEngine(config) as engine:
        for name in names:
            engine.register(name, tmp_path / "adapters", name)
        jobs = [(p, m, sampling) for p, m in zip(prompts, MIXTURES, strict=True)]
        answers = engine.generate(jobs)
    for prompt, mixture, answer in zip(prompts, MIXTURES, answers, strict=True):
        with oracle.by_hand(peft, mixture) as reference:
            assert answer == oracle.greedy(reference, prompt, TOKENS)


@pytest.mark.parametrize("device", DEVICES)
def test_nf4_logits_are_those_of_the_dequantised_weights(device: str, tmp_path: Path) -> None:
    families.make_base("qwen3", tmp_path)
    base = load_base(BaseConfig(str(tmp_path), quantization="nf4", dtype="fp32", device=device))
    ids = torch.randint(4, 320, (40,), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(40)
    attention = DenseCausal(1, 40, base.shape.sliding_window)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            hidden = base.decoder.hidden(ids.to(device), positions.to(device), attention)
            return base.decoder.logits(hidden).float().cpu()

    got = logits()
    for layer in base.decoder.layers:
        for site in layer.sites.values():
            site.parts = tuple(DenseWeight(p.dequantise(torch.float32)) for p in site.parts)
    want = logits()
    assert got.isfinite().all()
    assert (got - want).norm() / want.norm() < 2e-2


@pytest.mark.gpu
def test_loading_takes_one_layer_in_sixteen_bits_beside_what_stays(tmp_path: Path) -> None:
    """The base is quantised on the card as it is read, matrix by matrix."""
    config = memory.llama_config(2048, 5632, 3, 4096)
    memory.write_model(tmp_path, config)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    base = load_base(BaseConfig(str(tmp_path), device="cuda"))
    stays = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    assert base.linear_bytes < stays
    assert peak - stays <= 2 * base.shape.linear_parameters // base.shape.layers


@pytest.mark.parametrize("device", DEVICES)
def test_the_bundled_models_answer_right_when_served(device: str) -> None:
    examples = [e for e in read_examples(bundle_path()) if e.kind in ("auto", "task", "abstain")]
    with (
        ServerProcess({"base.device": device, "engine.threads": 1}) as server,
        Client(server.address) as client,
    ):
        server.wait_until_ready(client)
        rows = ask_all(client, examples)
        assert client.server_info().base.device.startswith(device)
    assert [row.problem for row in rows if row.problem] == []
