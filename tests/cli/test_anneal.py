"""``gradloc anneal`` around a training step of the user's own."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import gradloc
from gradloc.cli.main import main
from tests.conftest import make_net, train

STAGE = '''
"""A user's module."""
import torch
from tests.conftest import make_net, train

calls = 0

def parts(limit=10**9, loss=None, error=OSError("the data is gone")):
    model, optimizer = make_net()
    weights = {name: torch.from_numpy(w) for name, w in WEIGHTS.items()}
    model.load_state_dict(weights)

    def train_step():
        global calls
        calls += 1
        if calls > limit:
            raise error
        train(model, optimizer, 1, seed=calls)

    tokens = torch.randint(11, (16, 9), generator=torch.Generator().manual_seed(9))

    @torch.no_grad()
    def validate():
        if loss is not None:
            return next(loss)
        logits = model(tokens[:, :-1])
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))

    return model, optimizer, train_step, validate

def stage():
    return parts()

def without_gate():
    return *parts()[:3], None

def idle():
    return *parts()[:2], lambda: None, None

def deaf():
    model, optimizer, train_step, validate = parts()
    return model, optimizer, lambda annealer: train_step(), validate

def breaking():
    return parts(limit=0)

def hostile():
    return parts(loss=iter([1.0] * 2 + [9.0] * 50))

def failing():
    return parts(limit=5)

def interrupted():
    return parts(limit=5, error=KeyboardInterrupt())

def leaving():
    return parts(limit=5, error=SystemExit(7))

def validating(validate):
    return *parts()[:3], validate

def no_data():
    return validating(lambda: 1 / 0)

def no_number():
    return validating(lambda: {"loss": 1.0})

def wrong():
    return [1, 2, 3, "four"]

def short():
    return None
'''


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recorded run, its last weights, masks and a conditional plan, and a user's module beside them."""
    folder = tmp_path_factory.mktemp("made")
    torch.set_num_threads(1)
    model, optimizer = make_net()
    gradloc.wrap(optimizer, model, run=folder / "run", every=1, flush_every=10, firing_every=1, firing_tokens=16)
    train(model, optimizer, 60)
    gradloc.recorder_of(optimizer).close()
    np.savez(folder / "weights.npz", **gradloc.load_run(folder / "run").weights("last"))
    (folder / "my_training.py").write_text("import numpy\nWEIGHTS = dict(numpy.load('weights.npz'))\n" + STAGE)
    assert main(["masks", f"run={folder}/run", "density=0.5", "include=[ffn.*]", f"out={folder}/m.safetensors"]) == 0
    plan = ["kind=conditional", "blocks=6", "keep=0.34", f"out={folder}/p.safetensors"]
    main(["decompose", f"run={folder}/run", *plan])
    return folder


@pytest.fixture
def ask(made: Path, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command in a copy of that folder."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    sys.modules.pop("my_training", None)
    capsys.readouterr()

    def call(*words: str) -> tuple[int, dict[str, Any], str]:
        code = main([*words, "json=true"])
        said = capsys.readouterr()
        return code, json.loads(said.out) if said.out else {}, said.err

    return call


def test_masks_end_exact_and_their_weights_are_written(ask: Any) -> None:
    code, answer, errors = ask("anneal", "stage=my_training:stage", "masks=m.safetensors", "steps=20", "budget=9")
    assert code == 0
    assert errors == "", "quiet when piped"
    assert answer["completed"]
    assert answer["exact"]
    assert answer["steps"] == 20
    assert answer["validation"] <= answer["limit"]
    masks, weights = gradloc.MaskSet.load(answer["masks"]), load_file(answer["model"])
    for name in masks:
        assert (weights[name][~masks[name]] == 0).all()
        assert (weights[name][masks[name]] != 0).all()
    assert len(Path(answer["log"]).read_text().splitlines()) == 11
    code, _, errors = ask("anneal", "stage=my_training:stage", "masks=m.safetensors")
    assert code == 2
    assert "holds something already" in errors


def test_a_plan_ends_with_routers_and_verifies(ask: Any) -> None:
    """decompose writes it, verify asks for routers, anneal trains them, verify passes on the annealed weights."""
    code, _, errors = ask("verify", "plan=p.safetensors", "run=run")
    assert code == 2
    assert "no router" in errors
    code, answer, _ = ask("anneal", "stage=my_training:without_gate", "plan=p.safetensors", "steps=20", "out=o")
    assert code == 0
    assert answer["exact"]
    assert answer["validation"] is None
    code, answer, _ = ask("verify", "plan=o/plan.safetensors", "weights=o/model.safetensors")
    assert code == 0
    assert answer["passed"]


def test_a_stage_that_the_gate_stops_is_a_no(ask: Any) -> None:
    code, answer, _ = ask("anneal", "stage=my_training:hostile", "masks=m.safetensors", "steps=20")
    assert code == 1
    assert not answer["completed"]
    assert not answer["exact"]
    assert answer["outcome"].startswith("stopped: validation")
    assert answer["outcome"].endswith("the weights still hold what the masks leave out)")
    assert 0 < answer["remaining"] < 1
    code, answer, _ = ask("anneal", "stage=my_training:hostile", "plan=p.safetensors", "steps=20", "out=o")
    assert code == 1
    assert answer["outcome"].endswith("what the plan leaves out: don't route it with them)")


def test_code_that_fails_keeps_its_traceback_and_the_last_good_state(ask: Any) -> None:
    code, _, errors = ask(
        "anneal", "stage=my_training:failing", "masks=m.safetensors", "steps=20", "validate_every=4", "budget=9", "out=o"
    )  # fmt: skip
    assert code == 2
    assert "OSError: the data is gone" in errors
    assert "your stage raised OSError at step 5: stopped by OSError; the model is back at its last good state" in errors
    assert "It is written to o." in errors
    assert torch.isfinite(load_file("o/model.safetensors")["ffn.up.weight"]).all()
    found = {path.name: path.read_bytes() for path in Path("o").iterdir()}
    code, _, errors = ask(
        "anneal", "stage=my_training:failing", "masks=m.safetensors", "steps=20", "validate_every=4", "budget=9", "out=o", "resume=true"
    )  # fmt: skip
    assert code == 2
    assert "in its first step; nothing was annealed, and o is as it was." in errors
    assert {path.name: path.read_bytes() for path in Path("o").iterdir()} == found


@pytest.mark.parametrize(
    ("function", "words", "message"),
    [
        ("idle", ["plan=p.safetensors"], "no forward pass"),
        ("deaf", ["masks=m.safetensors", "distill=0.5"], "didn't ask for annealer.distillation"),
        ("breaking", ["masks=m.safetensors"], "your stage raised OSError in its first step; nothing was annealed, and a/o is as it was."),
    ],
)  # fmt: skip
def test_what_is_refused_at_its_first_step_leaves_no_directory(
    ask: Any, function: str, words: list[str], message: str
) -> None:
    """A retry with the same words can begin; directories that were there before stay."""
    for there in ([], ["a"], ["a", "a/o"]):
        for folder in there:
            Path(folder).mkdir(exist_ok=True)
        code, _, errors = ask("anneal", f"stage=my_training:{function}", *words, "steps=4", "out=a/o")
        assert code == 2
        assert message in errors
        assert [str(path) for path in sorted(Path().rglob("a/**/*"))] == there[1:]
        assert Path("a").is_dir() == bool(there)


def test_a_validation_that_fails_at_once_is_the_users(ask: Any) -> None:
    """Exit code 1 would say that the gate stopped the stage."""
    code, _, errors = ask("anneal", "stage=my_training:no_data", "masks=m.safetensors", "out=o")
    assert code == 2
    assert errors.splitlines()[-1] == "gradloc: your stage raised ZeroDivisionError before annealing began."
    assert "my_training.py" in errors
    assert "gate.py" not in errors, "the traceback begins where the user's code does"
    assert not Path("o").exists()


def test_an_interrupted_stage_keeps_the_last_good_state(ask: Any) -> None:
    settings = ["masks=m.safetensors", "steps=20", "validate_every=4", "budget=9", "out=o"]
    code, _, errors = ask("anneal", "stage=my_training:interrupted", *settings)
    assert code == 2
    assert len(errors.splitlines()) == 1
    assert errors.startswith("gradloc: interrupted at step 5: stopped by KeyboardInterrupt; the model is back")
    assert Path("o/model.safetensors").exists()


def test_an_interrupt_ends_a_sweep_with_what_was_done(ask: Any) -> None:
    """The second of three is interrupted."""
    settings = [
        "masks=m.safetensors",
        "steps=4",
        "validate_every=2",
        "budget=9",
        "out=o",
        "schedule=linear,cosine,cubic",
    ]
    code, answer, errors = ask("anneal", "stage=my_training:interrupted", *settings, "-m")
    assert code == 2
    assert answer == {}
    assert len(errors.splitlines()) == 1
    assert errors.startswith("gradloc: interrupted at step 1: stopped by KeyboardInterrupt; the model is back")
    assert "It is written to o/cosine." in errors
    assert {path.name for path in Path("o").iterdir()} == {"linear", "cosine", "sweep.json"}
    assert {"model.safetensors", "masks.safetensors"} <= {path.name for path in Path("o/cosine").iterdir()}
    summary = json.loads(Path("o/sweep.json").read_text())
    assert [job["swept"] for job in summary["jobs"]] == [{"schedule": "linear"}]
    assert summary["left"] == [{"schedule": "cosine"}, {"schedule": "cubic"}]


def test_a_stage_that_exits_keeps_the_last_good_state_and_its_exit(ask: Any) -> None:
    settings = ["masks=m.safetensors", "steps=20", "validate_every=4", "budget=9", "out=o"]
    with pytest.raises(SystemExit) as exits:
        ask("anneal", "stage=my_training:leaving", *settings)
    assert exits.value.code == 7
    left = {path.name for path in Path("o").iterdir()}
    assert left == {"model.safetensors", "masks.safetensors", "log.jsonl", "state.safetensors"}
    log = [json.loads(line) for line in Path("o/log.jsonl").read_text().splitlines()]
    assert log[-1]["decision"] == "abandon"
    weights, masks = load_file("o/model.safetensors"), gradloc.MaskSet.load("o/masks.safetensors")
    assert 0 < log[-1]["factor"] < 1, "a look at step 4 had kept a state"
    assert (weights["ffn.up.weight"][~masks["ffn.up.weight"]] != 0).any()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stage=my_training:stage"], "one of masks= and plan="),
        (["stage=my_training", "masks=m.safetensors"], "is not of the form module:function"),
        (["stage=nowhere:stage", "masks=m.safetensors"], "no module 'nowhere' here"),
        (["stage=my_training:short", "masks=m.safetensors"], "returned a NoneType; it must return"),
        (
            ["stage=my_training:wrong", "masks=m.safetensors"],
            "model is a int, not a torch.nn.Module; train_step is a int",
        ),
        (["stage=my_training:no_number", "masks=m.safetensors"], "your validate() returned a dict; return a number"),
        (["stage=my_training:stage", "masks=m.safetensors", "schedule=steep"], "schedule='steep'"),
        (["stage=my_training:stage", "masks=p.safetensors"], "expected a gradloc masks file, found plan"),
    ],
)
def test_wrong_words_get_one_line(ask: Any, words: list[str], message: str) -> None:
    code, _, errors = ask("anneal", *words)
    assert code == 2
    assert message in errors
    assert len(errors.splitlines()) == 1


def test_verify_needs_one_source_of_weights(ask: Any) -> None:
    for words in ([], ["run=x", "weights=y"]):
        code, _, errors = ask("verify", "plan=p.safetensors", *words)
        assert code == 2
        assert "one of run= and weights=" in errors
    code, _, errors = ask("verify", "plan=p.safetensors", "weights=my_training.py")
    assert code == 2
    assert "not a readable safetensors file" in errors


def test_the_bar_says_rate_and_time_left_in_a_terminal() -> None:
    from rich.console import Console

    from gradloc.cli.annealing import _bar
    from tests.anneal.test_annealer import masks_and_loss

    model, optimizer = make_net()
    annealer = gradloc.Annealer(model, optimizer, masks_and_loss(model)[0], steps=10)
    console = Console(force_terminal=True, width=160, record=True)
    shares = []
    with _bar(annealer, 10, console) as advance:
        while not annealer.done:
            train(model, optimizer, 1)
            annealer.step()
            advance()
            shares.append(annealer.share_done)
    assert shares == pytest.approx([n / 10 for n in range(1, 11)])
    said = console.export_text()
    assert "10/10" in said
    assert "% of the unsupported part left" in said
