"""Arrow and X-LoRA from PEFT on a small random base with small random adapters."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from mora_serve.model.attention import DenseCausal
from mora_serve.model.stacked import StackedAdapters
from router_training.baselines.arrow import ArrowModel, _Coefficients
from router_training.baselines.plain import batches, exact_match, plain_model, prompt_mean
from router_training.baselines.xlora import XLoraModel, XLoraRecipe
from router_training.batches import TokenRow, collate
from router_training.demo.base import tokens
from router_training.demo.coded import Row
from router_training.evaluation.cases import Case
from router_training.peft_files import save_peft

NAMES = ("first", "second", "third")


def encode(case):
    return tokens(Row(case.prompt, case.answer))


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    stacked = StackedAdapters(base.shape, len(NAMES), 2, 4.0).requires_grad_(False)
    for b in stacked.b.values():
        b.normal_(0, 0.3)
    for i, name in enumerate(NAMES):
        save_peft(stacked, i, directory / name)
    return {name: directory / name for name in NAMES}


@pytest.fixture(scope="module")
def arrow(base_directory, adapters):
    return ArrowModel(base_directory, adapters, encode, top_k=2)


def test_the_plain_model_computes_what_the_decoder_does(base, base_directory):
    """Its weights are the 4-bit ones, written out."""
    ids = torch.tensor(base.tokenizer.chat([("user", "some words")]))
    with torch.no_grad():
        hidden = base.decoder.hidden(ids, torch.arange(len(ids)), DenseCausal(1, len(ids)))
        wanted = base.decoder.logits(hidden)
        found = plain_model(base_directory)(input_ids=ids[None]).logits[0]
    assert torch.allclose(found, wanted, atol=1e-4)


def test_exact_match_is_what_generation_gives(base_directory):
    """Of any batch; one other token in the answer makes it wrong."""
    model = plain_model(base_directory)
    rows = []
    for prompt in ([1, 2, 3], [4, 5, 6, 7, 8], [9]):
        ids = torch.tensor([prompt])
        for _ in range(4):
            with torch.no_grad():
                token = model(input_ids=ids).logits[0, -1].argmax()
            ids = torch.cat([ids, token.view(1, 1)], 1)
        answer = ids[0, len(prompt) :].tolist()
        wrong = [*answer[:2], (answer[2] + 1) % 256, answer[3]]
        rows += [TokenRow(tuple(prompt), tuple(a)) for a in (answer, wrong)]
    assert exact_match(model, rows).tolist() == [1, 0, 1, 0, 1, 0]


def test_batches_have_every_row_once():
    """In whatever order."""
    rows = [TokenRow((1,) * (i % 5 + 1), (2,)) for i in range(20)]
    parts = list(batches(rows, size=6))
    assert sorted(i for at, _ in parts for i in at) == list(range(20))


def test_a_prompts_mean_leaves_the_answer_and_the_padding_out():
    """Only what stands in the prompt counts."""
    batch = collate([TokenRow((1, 2), (3,)), TokenRow((1, 2, 3, 4), (5, 6))])
    weights = torch.zeros(*batch.inputs.shape, 1)
    weights[0, :2] = 1.0
    weights[1, :4] = torch.tensor([0.0, 0.0, 2.0, 2.0])[:, None]
    weights[0, 2:] = 9.0
    weights[1, 4:] = 9.0
    assert prompt_mean(weights, batch).flatten().tolist() == [1.0, 1.0]


def test_arrows_coefficients_are_its_own(arrow):
    """What is collected, put in by hand, gives the linear's output; two adapters a token."""
    from peft.tuners.lora.arrow import ArrowLoraLinearLayer

    with torch.no_grad():
        arrow._model(input_ids=torch.tensor([[1, 2, 3]]))
    layers = [m for m in arrow._model.modules() if isinstance(m, ArrowLoraLinearLayer)]
    x = torch.randn(1, 5, layers[0].in_features)
    seen = _Coefficients(layers[0])
    host = next(
        m for m in arrow._model.modules() if layers[0] in getattr(m, "lora_arrow", {}).values()
    )
    with torch.no_grad():
        delta = layers[0](
            x, host.lora_A, host.lora_B, torch.nn.Identity(), dict.fromkeys(host.scaling, 2.0)
        )
        weights = seen.mean()
        by_hand = sum(
            weights[..., i : i + 1] * 2.0 * host.lora_B[f"task_{i}"](host.lora_A[f"task_{i}"](x))
            for i in range(len(NAMES))
        )
    assert ((weights > 0).sum(-1) == 2).all()
    assert torch.allclose(weights.sum(-1), torch.ones(1, 5))
    assert torch.allclose(delta, by_hand, atol=1e-5)


def test_arrow_scores_prompts_alone_as_in_a_batch(arrow):
    """Padding and neighbours change nothing."""
    prompts = ["a", "some more words", "mid one"]
    together = arrow(prompts)
    assert np.allclose(together.ranking.sum(1), 1, atol=1e-5)
    for i, prompt in enumerate(prompts):
        assert np.allclose(arrow([prompt]).ranking[0], together.ranking[i], atol=1e-5)
    assert together.names == NAMES


def test_training_x_lora_moves_its_gates_alone(base_directory, adapters):
    """The loss falls; base and adapters stay as they are."""
    model = XLoraModel(base_directory, adapters, encode, XLoraRecipe(steps=50, rows=4, lr=0.05))
    parameters = dict(model._model.named_parameters())
    gates = {n for n, p in parameters.items() if p.requires_grad}
    assert gates
    assert all("xlora_classifier" in name for name in gates)
    frozen = {n: p.clone() for n, p in parameters.items() if n not in gates}
    rng = random.Random(0)
    cases = [Case(f"say {rng.randrange(10)}", ("first",), "ab") for _ in range(8)]
    before = model(["say 3"]).ranking
    lines = []
    model.train(cases, lines.append)
    assert not np.allclose(model(["say 3"]).ranking, before, atol=1e-3)
    losses = [float(line.split()[-1]) for line in lines]
    assert losses[-1] < losses[0]
    for name, before_training in frozen.items():
        assert torch.equal(parameters[name], before_training)
    assert np.allclose(before.sum(1), 1, atol=1e-5)


def test_x_lora_runs_the_adapters_that_its_gates_weigh(base_directory, adapters):
    """All weight on one adapter is that adapter alone, which PEFT can run itself."""
    from peft import PeftModel

    model = XLoraModel(base_directory, adapters, encode, XLoraRecipe())
    last = model._model.base_model.internal_xlora_classifier.layers[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor([0.0, 100.0, 0.0]))
    ids = torch.tensor([[1, 2, 3, 4]])
    alone = PeftModel.from_pretrained(plain_model(base_directory), str(adapters["second"]))
    with torch.no_grad():
        found, wanted = model._model(input_ids=ids).logits, alone(input_ids=ids).logits
    assert torch.allclose(found, wanted, atol=1e-4)
