"""Directories of Unsloth, Axolotl, LLaMA-Factory and TRL: registered as they are, and exact.

What each of them writes, and where that stands in its sources, is in benchmarks/other_trainers.py.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import other_trainers
from benchmarks.imports import Imports, peft_logits
from mora_serve.adapters.validate import read_directory
from mora_serve.config import AdaptersConfig
from mora_serve.errors import InvalidArgument

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's and TRL's own


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Imports]:
    with Imports(tmp_path_factory.mktemp("import")) as made:
        yield made


@pytest.mark.parametrize("name", other_trainers.TRAINERS)
def test_a_trainers_directory_is_served_as_it_is_with_pefts_logits(
    served: Imports, name: str
) -> None:
    path, model = served.made(name)
    report = served.check(path)
    assert report.refusal is None
    assert report.base == "shapes"
    assert set(report.modules) == set(other_trainers.SEVEN)
    expected = peft_logits(model)
    torch.testing.assert_close(served.logits(path), expected, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert (peft_logits(model) - expected).abs().max() > 0.1  # it does change the answer


def test_files_beside_the_adapter_are_named_as_not_read(served: Imports) -> None:
    """Pickles among them: they are not opened, and do not keep the adapter out."""
    path, _ = served.made("axolotl")
    ignored = served.check(path).ignored
    assert {"checkpoint-10", "training_args.bin", "tokenizer.json", "README.md"} <= set(ignored)
    assert not {"adapter_config.json", "adapter_model.safetensors"} & set(ignored)


def test_a_checkpoint_of_a_trainer_is_an_adapter_itself(served: Imports) -> None:
    path, _ = served.made("trl")
    assert served.check(path / "checkpoint-1").refusal is None
    assert served.check(path / "checkpoint-2").digest == served.check(path).digest


def test_an_output_directory_without_weights_names_its_last_checkpoint(
    served: Imports, tmp_path: Path
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
    served: Imports,
) -> None:
    """And its steps, which say nothing of the changed base, are warned of."""
    path = served.root / "pissa"
    model = other_trainers.llama_factory_pissa(served.model, served.base_directory, path)
    logits = served.logits(path / "pissa_converted")
    torch.testing.assert_close(logits, peft_logits(model), rtol=1e-3, atol=1e-3)
    assert served.check(path).refusal is not None
    assert "'pissa_converted'" in served.check(path).refusal["message"]
    assert not any("PiSSA" in w for w in served.check(path / "pissa_converted").warnings)
    for step in ("pissa_init", "pissa_backup"):
        assert any("pissa_converted" in w for w in served.check(path / step).warnings)


def test_transposed_weights_that_peft_ignores_change_nothing(
    served: Imports, tmp_path: Path
) -> None:
    """``lora_fan_in_fan_out: true`` of a 4-bit run stays in the file; PEFT takes it back."""
    from peft import PeftModel

    path, _ = served.made("llama-factory")
    transposed = served.root / "transposed"
    shutil.copytree(path, transposed)
    file = transposed / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"fan_in_fan_out": True}))
    theirs = PeftModel.from_pretrained(copy.deepcopy(served.model), transposed).eval()
    torch.testing.assert_close(served.logits(transposed), peft_logits(theirs), rtol=1e-4, atol=1e-4)


def test_a_resized_vocabulary_is_refused_with_the_way_out(served: Imports) -> None:
    """PEFT saves the whole embedding then, be it trained or not (LLaMA-Factory, Axolotl)."""
    model = other_trainers.lora(served.model, r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    out = served.root / "resized"
    model.save_pretrained(out, save_embedding_layers=True)
    report = served.check(out)
    assert report.refusal is not None
    assert report.refusal["reason"] == "UNSUPPORTED_ADAPTER"
    assert "save_embedding_layers=False" in report.refusal["message"]
    model.save_pretrained(out, save_embedding_layers=False)
    assert served.check(out).refusal is None
