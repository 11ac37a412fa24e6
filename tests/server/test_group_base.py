"""A GPTQ checkpoint as the base of a server: what the default configuration makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import families, oracle
from benchmarks.group_bases import wrong_tokens
from benchmarks.group_checkpoints import Recipe, write
from benchmarks.group_checkpoints import oracle as of_checkpoint
from mora_serve.client import Client
from mora_serve.demo.process import ServerProcess
from mora_serve.errors import Unavailable


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("group-base")
    families.make_base("llama3", root / "plain")
    return write(root / "plain", root / "base", Recipe(act_order=True))


def test_it_is_served_as_it_is_and_an_adapter_answers_on_it(base: Path, tmp_path: Path) -> None:
    """--base.model is all that is said; tokens are those of PEFT on the checkpoint's weights."""
    model = of_checkpoint(base, lambda: families.make_base("llama3", tmp_path / "again"))
    peft = oracle.make_adapters(model, tmp_path / "adapters", {"rank-8": oracle.VARIANTS["rank-8"]})
    flags = {"base.model": base, "base.dtype": "fp32", "base.device": "cpu"}
    with ServerProcess(flags) as process, Client(process.address, timeout=120.0) as client:
        process.wait_until_ready(client)
        assert client.server_info().base.quantization == "gptq-int4"
        client.upload_adapter("one", tmp_path / "adapters" / "rank-8")
        prompt = "four bits"
        plain = client.generate(prompt, base=True, max_tokens=12, ignore_eos=True)
        adapted = client.generate(prompt, adapters={"one": 1.0}, max_tokens=12, ignore_eos=True)
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(str(base)).encode(prompt)
    assert len(plain.tokens) == len(adapted.tokens) == 12
    assert wrong_tokens(peft, ids, [t.id for t in adapted.tokens]) == 0
    with peft.disable_adapter(), torch.no_grad():
        assert wrong_tokens(peft, ids, [t.id for t in plain.tokens]) == 0


def test_what_is_not_taken_ends_the_server_with_the_reason(base: Path) -> None:
    """No traceback, and no path."""
    flags = {"base.model": base, "base.quantization": "nf4"}
    with ServerProcess(flags) as process, Client(process.address) as client:
        with pytest.raises(Unavailable):
            process.wait_until_ready(client)
        assert "base.quantization: 'nf4' asks for NF4" in process.log
        assert "use 'auto'" in process.log
        assert "Traceback" not in process.log
        assert process.stop() != 0
