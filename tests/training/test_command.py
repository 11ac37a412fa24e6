"""``python -m router_training``: what it trains, writes and says."""

from __future__ import annotations

import json

import pytest

from mora_serve.demo.bundle import bundle_path
from mora_serve.errors import InvalidArgument
from mora_serve.router.router import Router
from router_training import command
from router_training.__main__ import main
from router_training.configured import RouterSettings
from router_training.demo.routing import RouterRecipe
from router_training.demo.tasks import TASKS
from router_training.evaluation.scored import RouterScorer
from router_training.router import FitOptions
from router_training.sources import find_adapters, groups_of

WORDS = (
    *("stone", "river", "cloud", "lamp", "grass", "fork"),
    *("plate", "glass", "moon", "tree", "sand", "door"),
)
FORMS = {
    "rev": ("op", "reverse the word {}"),
    "caps": ("op", "write {} in capital letters"),
    "json": ("style", "give {} as a json object"),
    "count": ("", "how many vowels are in {}"),
}


def prompts(name):
    return [FORMS[name][1].format(word) for word in WORDS]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A directory to work in: adapters with cards, outside.txt, and a way to write the YAML."""
    monkeypatch.chdir(tmp_path)
    for name, (group, _) in FORMS.items():
        directory = tmp_path / "adapters" / name
        directory.mkdir(parents=True)
        (directory / "adapter_config.json").write_text("{}")
        card = {"tasks": [f"do-{name}"], "group": group, "prompts": prompts(name)}
        (directory / "routing_card.json").write_text(json.dumps(card))
    lines = [f"{a} {b} was seen near {c}" for a in WORDS for b in WORDS[:3] for c in WORDS[:3]]
    (tmp_path / "outside.txt").write_text("\n".join(lines))
    return tmp_path


def configured(project, *arguments, **settings):
    """Run with these settings; the exit status."""
    given = {"adapters": ["adapters"], "outside": ["outside.txt"], "dims": 64, "folds": 2}
    given |= settings
    file = project / "config.yaml"
    file.write_text(json.dumps({k: v for k, v in given.items() if v is not None}))
    return main([str(file), *arguments])


def test_cards_alone_make_a_router_that_picks_their_adapters(project, capsys):
    assert configured(project, source="cards", out="made") == 0
    file = project / "made" / "router.safetensors"
    adapters = find_adapters([project / "adapters"])
    cards = {adapter.name: adapter.card.prompts for adapter in adapters}
    router = RouterScorer(Router.load(file.read_bytes()), cards, groups_of(adapters))
    assert router.route("reverse the word table").adapters == ("rev",)
    assert router.route("how many vowels are in table").adapters == ("count",)
    assert router.route("zebra 77 qqq").adapters == ()
    said = json.loads((project / "made" / "report.json").read_text())
    assert said["adapters"] == sorted(FORMS)
    assert said["prompts"]["together"] > 0
    assert said["prompts"]["far"] == len(set((project / "outside.txt").read_text().split("\n")))
    assert said["figures"]["held_out_4"] >= 0.5
    out, err = capsys.readouterr()
    assert "adapters held out, top-1, from 4 prompts" in out
    assert out.splitlines()[-1] == "made/router.safetensors"
    assert "fitting on ngrams" in err


def test_labelled_rows_of_few_prompts_are_left_for_later(project, capsys):
    """An adapter with too little to learn from stops nobody else's router; --out wins."""
    rows = [{"prompt": p, "tasks": [n]} for n in FORMS for p in prompts(n)]
    rows = [r | {"adapters": r.pop("tasks")} for r in rows]
    rows += [{"prompt": "sing", "adapters": ["sing"]}]
    (project / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert configured(project, "--out", "b", adapters=None, prompts=["rows.jsonl"], out="a") == 0
    said = json.loads((project / "b" / "report.json").read_text())
    assert (said["adapters"], said["left_out"]) == (sorted(FORMS), {"sing": 1})
    assert "sing: left out" in capsys.readouterr().err
    assert not (project / "a").exists()


def test_rows_without_labels_are_taught_by_the_adapters_themselves(project):
    """Four of the demo's adapters on its base; of the kinds of features the best one is kept."""
    names = ["json", "reverse", "roman", "uppercase"]
    rows = [
        {"prompt": prompt, "answer": answer}
        for name in names
        for prompt, answer in TASKS[name].examples(77, 14)
    ]
    (project / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    adapters = [str(bundle_path() / "adapters" / name) for name in names]
    settings = {"source": "unlabelled", "prompts": ["rows.jsonl"], "base": "demo"}
    assert configured(project, adapters=adapters, out="made", **settings) == 0
    said = json.loads((project / "made" / "report.json").read_text())
    assert said["adapters"] == names
    assert said["teacher"]["labelled"] >= 0.9 * len(rows)
    tried = said["features_tried"]
    assert set(tried) == {"ngrams", "hidden", "both"}
    assert tried[said["features"]["kind"]] == max(tried.values())
    data = (project / "made" / "router.safetensors").read_bytes()
    assert Router.load(data, said["base_fingerprint"]).content.known == tuple(names)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adaptors": ["x"]}, "adaptors: this key is not known; did you mean 'adapters'?"),
        (
            {"source": "cards", "outside": None},
            "outside: it is missing; give text files of 64 or more",
        ),
        (
            {"source": "cards", "outside": ["few.txt"]},
            "outside: 2 distinct prompts of no adapter are too few",
        ),
        ({"source": "cards", "outside": ["gone.txt"]}, "gone.txt: it cannot be read"),
        ({"source": "cards", "prompts": ["x"]}, "prompts: the source 'cards' takes none"),
        ({"source": "labelled"}, "prompts: the source 'labelled' reads them from JSONL files"),
        ({"source": "labeled"}, "source: 'labeled' is not one of labelled, cards, unlabelled"),
        ({"source": "cards", "adapters": None}, "adapters: the source 'cards' needs them"),
        ({"source": "cards", "adapters": ["gone"]}, "adapters: 'gone' holds no adapter_config"),
        ({"source": "unlabelled", "prompts": ["x"]}, "base: the source 'unlabelled' needs"),
        ({"source": "cards", "features": "both"}, "base: hidden states are those of a base"),
        ({"source": "cards", "base": "demo", "depth": 5}, "depth: 5 is not between 0 and 4"),
        (
            {"source": "unlabelled", "base": "demo", "prompts": ["answered.jsonl"]},
            "adapter_config.json: peft_type is None",
        ),
        ({"source": "cards", "folds": 1}, "folds: 1 is not between 2 and 100"),
        ({"source": "cards", "dims": "many"}, "dims: 'many' is not a whole number"),
        ({"source": "cards", "threshold": 0}, "threshold: 0.0 is not above 0 and at most 1"),
        ({"source": "cards", "out": "outside.txt"}, "out: it cannot be written to"),
    ],
)
def test_each_mistake_is_one_clear_line_and_status_2(project, capsys, settings, message):
    (project / "few.txt").write_text("one\ntwo\ntwo\n")
    (project / "answered.jsonl").write_text('{"prompt": "a", "answer": "b"}')
    assert configured(project, **settings) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if message in line]
    assert len(lines) == 1, err
    assert err.splitlines()[-1] == lines[0]
    assert "Traceback" not in err
    assert str(project) not in err
    assert out == ""


def test_what_is_neither_a_file_nor_a_command_is_named(project, capsys):
    assert main(["evalaute"]) == 2
    line = "evalaute: there is neither a file nor a command of this name; --help shows both\n"
    assert capsys.readouterr().err == line


def test_the_settings_checks_need_no_file():
    with pytest.raises(InvalidArgument, match="temperature"):
        RouterSettings(("a",), "unlabelled", ("b",), ("c",), base="demo", temperature=-1.0).check()


def test_help_shows_both_ways_and_the_other_commands(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for part in ("CONFIG.yaml", "demo", "evaluate", "router.safetensors"):
        assert part in said
    with pytest.raises(SystemExit):
        main(["router", "--help"])
    said = capsys.readouterr().out
    for part in ("outside:", "source: cards", "unlabelled"):
        assert part in said


def test_no_arguments_are_the_demos_router_and_flags_belong_to_it():
    commands = ("demo", "evaluate", "router")
    assert command.with_default([], commands) == ["router"]
    assert command.with_default(["--out", "x"], commands) == ["router", "--out", "x"]
    assert command.with_default(["c.yaml"], commands) == ["router", "c.yaml"]
    assert command.with_default(["demo", "--out", "x"], commands) == ["demo", "--out", "x"]


def test_the_demos_router_knows_its_adapters_and_those_registered_later():
    """On fewer prompts than by default; all adapters of the bundle are measured."""
    options = FitOptions(dims=128, strengths=(0.3,), blends=(0.33,), folds=2)
    fitted = command.train_demo(RouterRecipe(prompts=24, options=options))
    names = fitted.summary["adapters"] + fitted.summary["registered_later"]
    assert sorted(names) == sorted(p.name for p in (bundle_path() / "adapters").iterdir())
    assert fitted.summary["registered_later"]
    rows = dict(command.table(fitted.summary))
    assert float(rows["fresh prompts: adapters learnt from, top-1"]) >= 0.8
    assert float(rows["fresh prompts: adapters registered later, top-1"]) >= 0.4
    assert float(rows["fresh prompts: exactly both of a pair run"]) >= 0.1
    assert Router.load(fitted.data, fitted.summary["base_fingerprint"]).digest
