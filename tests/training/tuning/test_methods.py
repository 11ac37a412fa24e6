"""Methods whose adapters are to be served as plain LoRA: AdaLoRA, EVA, rsLoRA, DoRA, patterns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.methods import demo_engine
from mora_serve.core import SamplingParams
from mora_serve.model.loading import read_base
from router_training.tuning import adalora
from router_training.tuning.begin import with_adapter
from router_training.tuning.encoding import IGNORED
from router_training.tuning.model import load
from router_training.tuning.prepared import prepare
from router_training.tuning.run import train
from router_training.tuning.sft import sft_trainer

PROMPT = "please spell the word 'kavo'"


def logits(model: Any) -> torch.Tensor:
    tokenizer = read_base("demo").tokenizer
    ids = torch.tensor([tokenizer.plain(tokenizer.render([("user", PROMPT)]))])
    with torch.no_grad():
        return model(ids).logits.float()


def test_adalora_is_saved_as_lora_that_gives_the_same_logits(make, tmp_path: Path) -> None:
    from peft import PeftModel

    settings = make(adalora=True, max_steps=8, adalora_init_r=6)
    base = read_base("demo")
    prepared = prepare(settings, base.tokenizer)
    model = with_adapter(settings, load(settings, base.directory), base.shape, 8, prepared.train)
    for name, parameter in model.named_parameters():
        if "lora_E" in name:  # some directions are gone, of one module all
            parameter.data.normal_()
            parameter.data[: 6 if "layers.0.self_attn.q_proj" in name else 2] = 0
        elif "lora_B" in name:
            parameter.data.normal_(std=0.1)
    adalora.save_as_lora(model.eval(), tmp_path / "plain")
    plain = PeftModel.from_pretrained(load(settings, base.directory), str(tmp_path / "plain"))
    assert torch.allclose(logits(plain.eval()), logits(model), atol=1e-4)
    without = load(settings, base.directory).eval()
    assert not torch.allclose(logits(without), logits(model), atol=1e-2)


def test_adalora_learns_with_its_penalty(make, tmp_path: Path) -> None:
    """PEFT's own figure of it, added to the loss."""
    settings = make(adalora=True, max_steps=8)
    base = read_base("demo")
    prepared = prepare(settings, base.tokenizer)
    model = with_adapter(settings, load(settings, base.directory), base.shape, 8, ())
    trainer = sft_trainer(settings, model, base.tokenizer.hf, prepared, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    model.train()
    plain = float(trainer.compute_loss(model, dict(batch)))
    adalora.regularised(trainer)
    whole = float(trainer.compute_loss(model, dict(batch)))
    tokens = {key: batch[key] for key in ("input_ids", "attention_mask")}
    labelled = model(**tokens, labels=batch["labels"]).loss
    alone = model.base_model.model(**tokens, labels=batch["labels"]).loss
    assert whole - plain == pytest.approx(float(labelled - alone), rel=1e-3)
    assert whole > plain + 0.01


def test_packed_rows_do_not_see_each_other(make, tmp_path: Path) -> None:
    """The loss of packed rows is the mean over their tokens alone."""
    base = read_base("demo")
    losses = []
    for packed in (False, True):
        settings = make(
            sample_packing=packed, micro_batch_size=64, val_set_size=0, sequence_len=256
        )
        prepared = prepare(settings, base.tokenizer)
        torch.manual_seed(0)
        model = with_adapter(settings, load(settings, base.directory), base.shape, 8, ())
        out = tmp_path / str(packed)
        trainer = sft_trainer(settings, model, base.tokenizer.hf, prepared, out)
        model.eval()
        total = count = 0.0
        for batch in trainer.get_train_dataloader():
            learned = float((batch["labels"] != IGNORED).sum())
            with torch.no_grad():
                total += float(trainer.compute_loss(model, dict(batch))) * learned
            count += learned
        losses.append((total / count, count))
    assert losses[1][1] == losses[0][1]
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-4)


@pytest.mark.parametrize(
    "values",
    [
        {"adalora": True, "max_steps": 12},
        {"peft_init_lora_weights": "eva"},
        {"peft_use_rslora": True, "loraplus_lr_ratio": 4.0},
        {"peft_use_dora": True},
        {"lora_rank_pattern": {"q_proj": 2}, "lora_alpha_pattern": {"down_proj": 8.0}},
        {"sample_packing": True},
    ],
    ids=lambda values: next(iter(values)),
)
def test_what_was_trained_is_served_as_peft_has_it(make, values: dict[str, Any]) -> None:
    """Greedy tokens of the server's engine and of transformers with PEFT."""
    from peft import PeftModel

    settings = make(**values)
    directory = train(settings, lambda line: None).adapters["made"]
    base = read_base("demo")
    model = PeftModel.from_pretrained(load(settings, base.directory), str(directory)).eval()
    asked = base.tokenizer.plain(base.tokenizer.render([("user", PROMPT)]))
    with torch.no_grad():
        theirs = model.generate(
            torch.tensor([asked]), max_new_tokens=8, do_sample=False, use_cache=True
        )[0, len(asked) :].tolist()
    with demo_engine() as local:
        local.register("made", directory.parent, directory.name)
        sampling = SamplingParams(max_tokens=8, temperature=0.0)
        ours = local.generate([(asked, {"made": 1.0}, sampling)])[0]
    assert ours == theirs[: len(ours)]
    assert len(ours) == len(theirs) or theirs[len(ours)] in base.tokenizer.eos_ids


def test_a_model_that_was_evaluated_trains_as_before(make) -> None:
    """Also where bitsandbytes would pack weights anew, without a gradient, in eval mode."""
    settings = make()
    base = read_base("demo")
    model = with_adapter(settings, load(settings, base.directory), base.shape, 4, ())
    ids = torch.tensor([base.tokenizer.plain(base.tokenizer.render([("user", PROMPT)]))])

    def gradients() -> list[torch.Tensor]:
        model.train().zero_grad()
        model(ids, labels=ids).loss.backward()
        return [p.grad.clone() for n, p in model.named_parameters() if "lora_B" in n]

    before = gradients()
    logits(model.eval())
    assert all(map(torch.equal, before, gradients()))
    assert before[0].any()  # of the first layer, through all the others
