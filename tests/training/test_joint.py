"""Joint training: adapters and router learn together, and what held-out adapters lose is undone."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
import torch

from mora_serve.adapters import card
from mora_serve.config import AdaptersConfig
from mora_serve.errors import InvalidArgument
from mora_serve.router.format import read_router
from mora_serve.router.router import Router
from router_training.__main__ import main
from router_training.batched import AdapterRecipe, MixedRow, load_peft, row_losses
from router_training.batches import TokenRow
from router_training.demo.out_of_domain import out_of_domain
from router_training.demo.tasks import TASKS
from router_training.joint import Example, JointRecipe, train_jointly
from router_training.router import FitOptions, fit_router
from router_training.router_data import RouterData

NAMES = ("reverse", "uppercase", "roman", "json")
RECIPE = JointRecipe(AdapterRecipe(rank=2, alpha=4, steps=8, rows=16, warmup=1, lr=2e-2))


def quiet(line):
    pass


@pytest.fixture(scope="module")
def examples():
    """Tasks' prompts, but answers of one token an adapter; pairs answer with two."""
    found = []
    for i, name in enumerate(NAMES):
        for prompt, _ in TASKS[name].examples(1, 40):
            found.append(Example(prompt, TokenRow(tuple(prompt.encode()), (65 + i, 258)), (i,)))
    for n, example in enumerate(found[:20]):
        answer = TokenRow(example.tokens.prompt, (65, 68, 258))
        found.append(Example(f"{example.prompt} as json {n}", answer, (0, 3)))
    return found


@pytest.fixture(scope="module")
def outside():
    rng = random.Random(0)
    return [out_of_domain(rng) for _ in range(96)]


@pytest.fixture(scope="module")
def router(examples, outside):
    prompts = {
        name: [e.prompt for e in examples if e.adapters == (i,)] for i, name in enumerate(NAMES)
    }
    data, options = RouterData.of(prompts, outside), FitOptions(dims=512, folds=2)
    return read_router(fit_router(data, options=options)[0])[0]


@pytest.fixture(scope="module")
def joint(base, examples, outside, router):
    return train_jointly(base.decoder, examples, outside, router, RECIPE, quiet)


def loss(base, adapters, examples, adapters_of=lambda e: e.adapters):
    rows = [MixedRow(e.tokens, tuple((i, 1.0) for i in adapters_of(e))) for e in examples]
    with torch.no_grad():
        return row_losses(base.decoder, adapters, rows).mean().item()


def test_adapters_learn_alone_and_in_pairs(base, joint, examples):
    """Each row's loss falls under its own mixture, below what other adapters give it."""
    singles, pairs = examples[::16][:10], examples[-8:]
    for rows in (singles, pairs):
        own = loss(base, joint.adapters, rows)
        assert own < loss(base, joint.adapters, rows, lambda e: ()) - 1
        assert own < loss(base, joint.adapters, rows, lambda e: (2 - min(e.adapters[0], 1),)) - 0.5


def test_the_router_s_terms_are_part_of_training(base, joint, examples, outside, router):
    """Without routed rows and gates' terms the adapters come out otherwise, by the same seed."""
    alone = dataclasses.replace(RECIPE, routed=0.0, gates=0.0, outliers=0.0)
    other = train_jointly(base.decoder, examples, outside, router, alone, quiet)
    pairs = zip(joint.adapters.parameters(), other.adapters.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


def test_the_router_is_one_that_loads_and_loses_nothing(joint, router):
    """It is the plain one, or a corrected one that is as good on held-out adapters and better."""
    figures = joint.figures
    Router.load(joint.router.to_bytes())
    if figures["kept"]:
        assert figures["held_out_corrected"] >= figures["held_out_plain"]
    else:
        assert joint.router is router
    assert 0.5 < figures["known_plain"] <= 1


def test_the_same_seed_gives_the_same(base, joint, examples, outside, router):
    """Adapters and router, bit for bit."""
    again = train_jointly(base.decoder, examples, outside, router, RECIPE, quiet)
    assert again.router.to_bytes() == joint.router.to_bytes()
    pairs = zip(joint.adapters.parameters(), again.adapters.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("fault", ["few", "outside", "start"])
def test_too_little_is_refused(base, joint, examples, outside, router, fault):
    """With the field, the count and what to give."""
    few = [e for e in examples if e.adapters != (2,)] + [e for e in examples if 2 in e.adapters][:9]
    changed = {
        "few": (few, outside, None, "data: adapter 2 has 9 distinct prompts"),
        "outside": (examples, [], None, "outside: there is no prompt"),
        "start": (examples[:120], outside, joint.adapters, "adapters: 4 to go on with"),
    }
    rows, others, start, message = changed[fault]
    with pytest.raises(InvalidArgument, match=message):
        train_jointly(base.decoder, rows, others, router, RECIPE, quiet, start=start)


def write_rows(file, examples):
    lines = [
        {
            "prompt": e.prompt,
            "answer": "ABCD"[e.adapters[0]],
            "adapters": [NAMES[i] for i in e.adapters],
        }
        for e in examples
    ]
    file.write_text("\n".join(map(json.dumps, lines)))


def test_the_command_trains_writes_and_goes_on(base_directory, base, examples, tmp_path, capsys):
    """From rows to directories and a router; then fine-tuned from these, with layer scales."""
    write_rows(tmp_path / "rows.jsonl", examples)
    common = f"base: {base_directory}\ndata: [{tmp_path}/rows.jsonl]\nsteps: 2\nrows: 8\n"
    first = tmp_path / "first.yaml"
    first.write_text(f"{common}out: {tmp_path}/one\nrank: 2\n")
    assert main(["joint", str(first)]) == 0
    directories = [tmp_path / "one/adapters" / name for name in NAMES]
    second = tmp_path / "second.yaml"
    second.write_text(
        f"{common}out: {tmp_path}/two\nmode: finetune\nlayer_scales: true\n"
        f"adapters: {json.dumps(list(map(str, directories)))}\n"
    )
    assert main(["joint", str(second)]) == 0
    assert load_peft(base.shape, directories).count == 4
    assert load_peft(base.shape, [tmp_path / "two/adapters" / NAMES[1]]).rank == 2
    config = (tmp_path / "two/adapters/roman/adapter_config.json").read_text()
    assert len(json.loads(config)["alpha_pattern"]) == 7 * base.shape.layers
    routing = card.parse_card((directories[0] / card.FILE).read_bytes(), AdaptersConfig())
    router = Router.load((tmp_path / "one/router.safetensors").read_bytes(), base.fingerprint)
    assert router.key(routing.prompts) is not None
    assert len(routing.prompts) == 16
    assert routing.tasks == ("reverse",)
    assert main(["joint", str(first)]) == 2
    assert "out: 'one' is not empty" in capsys.readouterr().err


def test_the_command_finds_tasks_that_nobody_named(base_directory, base, examples, tmp_path):
    """Rows without adapters become a pool of directories with cards, and a router over them."""
    lines = [{"prompt": e.prompt, "answer": "ABCD"[e.adapters[0]]} for e in examples[:160]]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    file = tmp_path / "joint.yaml"
    file.write_text(
        f"base: {base_directory}\ndata: [{tmp_path}/rows.jsonl]\nout: {tmp_path}/out\n"
        "mode: unlabelled\npool: 4\nsteps: 80\nrows: 8\nrank: 2\nlr: 0.02\n"
    )
    assert main(["joint", str(file)]) == 0
    found = sorted((tmp_path / "out/adapters").iterdir())
    assert 2 <= load_peft(base.shape, found).count <= 4
    router = Router.load((tmp_path / "out/router.safetensors").read_bytes(), base.fingerprint)
    for directory in found:
        routing = card.parse_card((directory / card.FILE).read_bytes(), AdaptersConfig())
        assert router.key(routing.prompts) is not None
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert sum(report.values()) == 160


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 0", "steps: 0 is too few"),
        ("wrong: 1.5", "wrong: 1.5 is not between 0 and 1"),
        ("gates: -1", "gates: -1.0 is negative"),
        ("lr: 0.0", "lr: 0.0 is not between"),
        ("mode: finetune", "adapters: give directories to mode finetune"),
        ("mode: unlabelled", "pool: give the number of tasks to mode unlabelled"),
        ("pool: 3", "pool: give the number of tasks to mode unlabelled"),
        ("adapters: [x]", "adapters: give directories to mode finetune"),
        ("stepz: 3", "stepz: this key is not known; did you mean 'steps'?"),
        ("mode: finetune\nadapters: [ROOT/revers]", "adapters: 'revers': it cannot be read"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(
    base_directory, examples, tmp_path, capsys, text, message
):
    """It names key, value and remedy; the status is 2 and nothing is written."""
    write_rows(tmp_path / "rows.jsonl", examples)
    file = tmp_path / "joint.yaml"
    text = text.replace("ROOT", str(tmp_path))
    file.write_text(
        f"base: {base_directory}\ndata: [{tmp_path}/rows.jsonl]\nout: {tmp_path}/out\n{text}\n"
    )
    assert main(["joint", str(file)]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(message)
    assert not (tmp_path / "out").exists()
