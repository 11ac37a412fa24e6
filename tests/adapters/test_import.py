"""Directories of Unsloth, Axolotl, LLaMA-Factory and TRL: registered as they are, and exact.

What each of them writes, and where that stands in its sources, is in trainers.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import families
from benchmarks.local import LocalEngine
from mora_serve.adapters.check import Report, check_directory
from mora_serve.adapters.validate import read_directory
from mora_serve.config import AdaptersConfig, BaseConfig, Config, EngineConfig
from mora_serve.errors import InvalidArgument
from mora_serve.model.attention import DenseCausal
from mora_serve.model.lora import PooledAdapters, plan_mixtures
from tests.adapters import trainers

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's and TRL's own

IDS = torch.tensor([5, 40, 7, 99, 230, 17, 8, 64])


class Served:
    """A small base, and the logits that the server's decoder computes on it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base_directory = root / "base"
        self.model = families.make_base("llama3", self.base_directory)
        base = BaseConfig(str(self.base_directory), quantization="none", dtype="fp32", device="cpu")
        self.engine = LocalEngine(Config(base, EngineConfig(kernels="torch"), AdaptersConfig()))
        self._made: dict[str, Any] = {}

    def made(self, name: str) -> tuple[Path, Any]:
        """A trainer's directory and its PEFT model, made once."""
        if name not in self._made:
            make = trainers.TRAINERS[name]
            self._made[name] = make(self.model, self.base_directory, self.root / name)
        return self.root / name, self._made[name]

    def check(self, path: Path) -> Report:
        return check_directory(path, AdaptersConfig(), self.engine.base.shape)

    @torch.inference_mode()
    def logits(self, path: Path) -> torch.Tensor:
        name = str(path.relative_to(self.root))
        self.engine.register(name, self.root, name)
        self.engine.make_resident([name])
        pool, decoder = self.engine.engine.pool, self.engine.base.decoder
        mixture = ((pool.slot(self.engine.digests[name]), 1.0),)
        adapters = PooledAdapters(pool.slots, plan_mixtures(pool.slots, [mixture], [len(IDS)]))
        attention = DenseCausal(1, len(IDS))
        hidden = decoder.hidden(IDS, torch.arange(len(IDS)), attention, adapters)
        return decoder.logits(hidden)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = Served(tmp_path_factory.mktemp("import"))
    yield made
    made.engine.engine.stop()


@torch.inference_mode()
def peft_logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS[None]).logits[0]


@pytest.mark.parametrize("name", trainers.TRAINERS)
def test_a_trainers_directory_is_served_as_it_is_with_pefts_logits(
    served: Served, name: str
) -> None:
    path, model = served.made(name)
    report = served.check(path)
    assert report.refusal is None
    assert report.base == "shapes"
    assert set(report.modules) == set(trainers.SEVEN)
    expected = peft_logits(model)
    torch.testing.assert_close(served.logits(path), expected, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert (peft_logits(model) - expected).abs().max() > 0.1  # it does change the answer


def test_files_beside_the_adapter_are_named_as_not_read(served: Served) -> None:
    """Pickles among them: they are not opened, and do not keep the adapter out."""
    path, _ = served.made("axolotl")
    ignored = served.check(path).ignored
    assert {"checkpoint-10", "training_args.bin", "tokenizer.json", "README.md"} <= set(ignored)
    assert not {"adapter_config.json", "adapter_model.safetensors"} & set(ignored)


def test_a_checkpoint_of_a_trainer_is_an_adapter_itself(served: Served) -> None:
    path, _ = served.made("trl")
    assert served.check(path / "checkpoint-1").refusal is None
    assert served.check(path / "checkpoint-2").digest == served.check(path).digest


def test_an_output_directory_without_weights_names_its_last_checkpoint(
    served: Served, tmp_path: Path
) -> None:
    """A run that was stopped; Axolotl writes the configuration before it trains."""
    path, _ = served.made("axolotl")
    out = tmp_path / "out"
    shutil.copytree(path, out)
    (out / "adapter_model.safetensors").unlink()
    shutil.copytree(out / "checkpoint-10", out / "checkpoint-9")
    for gone in (None, "adapter_config.json"):
        if gone:
            (out / gone).unlink()
        with pytest.raises(InvalidArgument, match="in the folder 'checkpoint-10'; give") as e:
            read_directory(tmp_path, "out", served.engine.base.shape, AdaptersConfig())
        assert e.value.reason == "MISSING_FILE"


def test_a_converted_pissa_adapter_gives_the_logits_of_the_trained_one(
    served: Served,
) -> None:
    """And its steps, which say nothing of the changed base, are warned of."""
    path = served.root / "pissa"
    model = trainers.llama_factory_pissa(served.model, served.base_directory, path)
    logits = served.logits(path / "pissa_converted")
    torch.testing.assert_close(logits, peft_logits(model), rtol=1e-3, atol=1e-3)
    assert served.check(path).refusal is not None
    assert "'pissa_converted'" in served.check(path).refusal["message"]
    assert not any("PiSSA" in w for w in served.check(path / "pissa_converted").warnings)
    for step in ("pissa_init", "pissa_backup"):
        assert any("pissa_converted" in w for w in served.check(path / step).warnings)


def test_transposed_weights_that_peft_ignores_change_nothing(
    served: Served, tmp_path: Path
) -> None:
    """``lora_fan_in_fan_out: true`` of a 4-bit run stays in the file; PEFT takes it back."""
    import copy

    from peft import PeftModel

    path, _ = served.made("llama-factory")
    transposed = served.root / "transposed"
    shutil.copytree(path, transposed)
    file = transposed / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"fan_in_fan_out": True}))
    theirs = PeftModel.from_pretrained(copy.deepcopy(served.model), transposed).eval()
    torch.testing.assert_close(served.logits(transposed), peft_logits(theirs), rtol=1e-4, atol=1e-4)


def test_a_resized_vocabulary_is_refused_with_the_way_out(served: Served) -> None:
    """PEFT saves the whole embedding then, be it trained or not (LLaMA-Factory, Axolotl)."""
    model = trainers.lora(served.model, r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    out = served.root / "resized"
    model.save_pretrained(out, save_embedding_layers=True)
    report = served.check(out)
    assert report.refusal is not None
    assert report.refusal["reason"] == "UNSUPPORTED_ADAPTER"
    assert "save_embedding_layers=False" in report.refusal["message"]
    model.save_pretrained(out, save_embedding_layers=False)
    assert served.check(out).refusal is None
