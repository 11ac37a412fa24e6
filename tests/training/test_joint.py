"""Joint training: adapters and router learn together, and what held-out adapters lose is undone."""

from __future__ import annotations

import dataclasses
import functools
import json
import random

import pytest
import torch

from mora_serve.adapters import card
from mora_serve.config import AdaptersConfig
from mora_serve.errors import InvalidArgument
from mora_serve.router.router import Router
from router_training.__main__ import main
from router_training.batched import AdapterRecipe, MixedRow, row_losses
from router_training.batches import TokenRow
from router_training.demo.out_of_domain import out_of_domain
from router_training.demo.tasks import TASKS
from router_training.joint import JointRecipe, train_jointly
from router_training.joint_study import Example, JointData, JointStudy
from router_training.peft_files import load_peft
from router_training.router import FitOptions, fit_router

NAMES = ("reverse", "uppercase", "roman", "json")
OPTIONS = FitOptions(strengths=(0.3,), blends=(0.33,), folds=2, correct=False)
RECIPE = JointRecipe(AdapterRecipe(rank=2, alpha=4, steps=8, rows=16, warmup=1, lr=2e-2), OPTIONS)


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
def data(examples, outside):
    return JointData(examples, NAMES, outside)


@pytest.fixture(scope="module")
def joint(base, data):
    return train_jointly(base.decoder, data, RECIPE, quiet)


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


@pytest.fixture(scope="module")
def untouched(base, data):
    """What comes out where nothing connects router and adapters."""
    alone = dataclasses.replace(RECIPE, routed=0.0, gates=0.0, outliers=0.0)
    return learned(base, data, alone)


def learned(base, data, recipe):
    """The corrections after training, of the judged router and of the served one, and adapters."""
    seen = []

    class Watched(JointStudy):
        def judge(self):
            seen.extend(
                torch.from_numpy(r.graded.embed.matrix()) for r in (self.judged, self.served)
            )
            return super().judge()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("router_training.joint.JointStudy", Watched)
        joint = train_jointly(base.decoder, data, recipe, quiet)
    return seen, joint.adapters


def test_a_router_that_no_term_reaches_stays_the_plain_one(untouched):
    corrections, _ = untouched
    assert all(torch.equal(c, torch.eye(len(c))) for c in corrections)


def test_prompts_with_known_adapters_teach_the_router_but_not_adapters(base, data, untouched):
    """The gates' two terms alone."""
    corrections, adapters = learned(base, data, dataclasses.replace(RECIPE, routed=0.0))
    assert all((c - torch.eye(len(c))).norm() > 1e-3 for c in corrections)
    assert same(adapters, untouched[1])


def test_the_language_model_s_loss_teaches_the_router_and_adapters_its_mistakes(
    base, data, untouched
):
    """Routed rows alone, without the gates' terms."""
    recipe = dataclasses.replace(RECIPE, routed=1.0, gates=0.0, outliers=0.0)
    corrections, adapters = learned(base, data, recipe)
    assert all((c - torch.eye(len(c))).norm() > 1e-3 for c in corrections)
    assert not same(adapters, untouched[1])


def same(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_the_router_is_one_that_loads_and_loses_nothing(joint, data):
    """It is the plain one, or a corrected one where nobody that it has not seen loses."""
    figures = joint.figures
    Router.load(joint.router.to_bytes())
    assert len(joint.held_out) == 1
    if figures["kept"]:
        assert figures["held_out_corrected"] >= figures["held_out_plain"]
        assert figures["together_corrected"] >= figures["together_plain"]
    else:
        assert joint.router.to_bytes() == fit_router(data.routing(), options=RECIPE.router)[0]
    assert 0.5 < figures["known_plain"] <= 1


def test_the_same_seed_gives_the_same(base, joint, data):
    """Adapters and router, bit for bit."""
    again = train_jointly(base.decoder, data, RECIPE, quiet)
    assert again.router.to_bytes() == joint.router.to_bytes()
    assert same(again.adapters, joint.adapters)


def test_adapters_to_go_on_with_are_copied(base, joint, data):
    """What is given stays as it is; what is trained starts from it."""
    before = [p.clone() for p in joint.adapters.parameters()]
    recipe = dataclasses.replace(RECIPE, adapters=dataclasses.replace(RECIPE.adapters, steps=1))
    again = train_jointly(base.decoder, data, recipe, quiet, start=joint.adapters)
    after = joint.adapters.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not same(again.adapters, joint.adapters)


@pytest.mark.parametrize("fault", ["few", "none", "outside", "start"])
def test_too_little_is_refused(base, joint, data, examples, outside, fault):
    """With the field, the adapter by its name, the count and what to give."""
    others = [e for e in examples if 2 not in e.adapters]
    few = others + [e for e in examples if 2 in e.adapters][:9]
    replace = functools.partial(dataclasses.replace, data)
    changed = {
        "few": (replace(examples=few), None, "data: 9 distinct prompts of adapter 'roman' alone"),
        "none": (replace(examples=others), None, "data: no row is for adapter 'roman'"),
        "outside": (replace(outside=outside[:9]), None, "outside: 9 distinct prompts"),
        "start": (replace(names=[*NAMES, "x"]), joint.adapters, "adapters: 4 to go on with"),
    }
    given, start, message = changed[fault]
    with pytest.raises(InvalidArgument, match=message) as error:
        train_jointly(base.decoder, given, RECIPE, quiet, start=start)
    assert error.value.field == message.partition(":")[0]


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
        f"adapters: [{tmp_path}/one/adapters]\n"
    )
    old = card.parse_card((directories[0] / card.FILE).read_bytes(), AdaptersConfig())
    assert (old.tasks, len(old.prompts)) == (("reverse",), 16)
    described = dataclasses.replace(old, group="op", description="turns words", tasks=("turn",))
    changed = dataclasses.replace(described, prompts=("old",), base_fingerprint="")
    (directories[0] / card.FILE).write_bytes(changed.to_json())
    assert main(["joint", str(second)]) == 0
    written = (tmp_path / "two/adapters/reverse" / card.FILE).read_bytes()
    assert card.parse_card(written, AdaptersConfig()) == described
    assert load_peft(base.shape, directories).count == 4
    assert load_peft(base.shape, [tmp_path / "two/adapters" / NAMES[1]]).rank == 2
    config = (tmp_path / "two/adapters/roman/adapter_config.json").read_text()
    assert len(json.loads(config)["alpha_pattern"]) == 7 * base.shape.layers
    router = Router.load((tmp_path / "one/router.safetensors").read_bytes(), base.fingerprint)
    assert router.key(old.prompts) is not None
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
        ("steps: 0", "steps: 0 is not between 1 and"),
        ("wrong: 1.5", "wrong: 1.5 is not between 0 and 1"),
        ("gates: -1", "gates: -1.0 is not between 0 and"),
        ("lr: 0.0", "lr: 0.0 is not between"),
        ("alpha: .nan", "alpha: nan is not between"),
        ("alpha: .inf", "alpha: inf is not between"),
        ("alpha: 0.0", "alpha: 0.0 is not between"),
        ("seed: -1", "seed: -1 is not between 0 and"),
        ("threads: -1", "threads: -1 is not between 0 and"),
        ("held_out: 1", "held_out: 1.0 is not between 0 and 0.5"),
        ("mode: finetune", "adapters: mode finetune goes on with some; give directories"),
        ("mode: finetune\nadapters: [x]\nrank: 4", "rank: mode finetune does not take it"),
        ("mode: unlabelled", "pool: 0 tasks to find are too few"),
        ("mode: unlabelled\npool: 2", "pool: 2 tasks to find are too few for a router; give 3"),
        ("mode: unlabelled\npool: 3\nrouted: 0.5", "routed: mode unlabelled does not take it"),
        ("mode: unlabelled\npool: 90\nsteps: 200", "data: 180 are too few for 90 adapters"),
        ("mode: unlabelled\npool: 3\nsteps: 9", "steps: 9 end before"),
        ("pool: 3", "pool: mode labelled does not take it"),
        ("adapters: [x]", "adapters: mode labelled does not take it"),
        ("outside: [ROOT/few.txt]", "outside: 2 distinct prompts are too few; give 64"),
        ("stepz: 3", "stepz: this key is not known; did you mean 'steps'?"),
        ("mode: finetune\nadapters: [ROOT/revers]", "adapters: 'revers' holds no adapter_config"),
        (
            "mode: finetune\nadapters: [ROOT/a/same, ROOT/b/same]",
            "adapters: there are two named 'same'",
        ),
    ],
)
def test_a_mistake_in_the_file_is_one_line(
    base_directory, examples, tmp_path, capsys, text, message
):
    """It names key, value and remedy; the status is 2 and nothing is written."""
    write_rows(tmp_path / "rows.jsonl", examples)
    (tmp_path / "few.txt").write_text("one\ntwo\ntwo\n")
    for place in ("a/same", "b/same"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "adapter_config.json").write_text("{}")
    file = tmp_path / "joint.yaml"
    text = text.replace("ROOT", str(tmp_path))
    file.write_text(
        f"base: {base_directory}\ndata: [{tmp_path}/rows.jsonl]\nout: {tmp_path}/out\n{text}\n"
    )
    assert main(["joint", str(file)]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(message)
    assert not (tmp_path / "out").exists()


def test_an_out_that_cannot_be_a_directory_is_refused_before_training(
    base_directory, examples, tmp_path, capsys
):
    """A file of its name stands there."""
    write_rows(tmp_path / "rows.jsonl", examples)
    (tmp_path / "taken").write_text("")
    file = tmp_path / "joint.yaml"
    file.write_text(
        f"base: {base_directory}\ndata: [{tmp_path}/rows.jsonl]\nout: {tmp_path}/taken\n"
    )
    assert main(["joint", str(file)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("out: it cannot be written to (")


def test_adapters_found_are_written_even_where_no_router_can_be(
    base_directory, base, examples, tmp_path, capsys
):
    """Few distinct prompts a task: the training stays, and the message says what is missing."""
    lines = [
        {"prompt": e.prompt, "answer": "ABCD"[e.adapters[0]]}
        for e in [*examples[:8], *examples[40:48], *examples[80:88]]
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines * 2)))
    file = tmp_path / "joint.yaml"
    file.write_text(
        f"base: {base_directory}\ndata: [{tmp_path}/rows.jsonl]\nout: {tmp_path}/out\n"
        "mode: unlabelled\npool: 3\nsteps: 65\nrows: 4\nrank: 2\nlr: 0.02\n"
    )
    assert main(["joint", str(file)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "of the tasks found have prompts enough for a router, which takes 3" in said
    found = sorted((tmp_path / "out/adapters").iterdir())
    assert load_peft(base.shape, found).count >= 1
    assert (tmp_path / "out/report.json").exists()
    assert not (tmp_path / "out/router.safetensors").exists()
