"""The annealer ends exact, or says why not, and stays within its budget."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import gradloc
from gradloc import errors
from gradloc.anneal.schedule import SCHEDULES, remaining
from gradloc.core.masks import MaskSet
from gradloc.route.certificate import _gated
from tests.conftest import make_net, train


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_fall_from_one_to_zero(name: str) -> None:
    values = [remaining(name, p) for p in np.linspace(0, 1, 50)]
    assert values[0] == 1.0
    assert values[-1] == 0.0
    assert all(a >= b for a, b in pairwise(values))


@pytest.mark.parametrize("null", ["zero", "init"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_mask_is_exact_at_the_end_and_stays_so(schedule: str, null: str) -> None:
    model, optimizer = make_net()
    keep = torch.rand(model.ffn.up.weight.shape) < 0.5
    values = {"ffn.up.weight": torch.full_like(model.ffn.up.weight, 0.25).detach()} if null == "init" else None
    masks = MaskSet({"ffn.up.weight": keep}, null=null, null_values=values)
    annealer = gradloc.Annealer(model, optimizer, masks, schedule=schedule, steps=20)
    for _ in range(25):
        train(model, optimizer, 1)
        annealer.step()
    assert annealer.done
    assert annealer.outcome == "completed"
    assert annealer.exact
    assert (model.ffn.up.weight.detach()[~keep] == (0.25 if null == "init" else 0.0)).all()
    assert (model.ffn.up.weight.detach()[keep] != 0).all()
    state = optimizer.state[model.ffn.up.weight]
    assert (state["exp_avg"][~keep] == 0).all()


def test_a_hostile_stage_ends_within_its_budget(tmp_path: Path) -> None:
    """Removing everything must end at a state whose loss the gate accepted."""
    for seed in range(5):
        model, optimizer = make_net(seed)
        train(model, optimizer, 30)
        for group in optimizer.param_groups:
            group["lr"] = 1e-5
        tokens = torch.randint(11, (16, 9), generator=torch.Generator().manual_seed(9))

        def validate(model=model, tokens=tokens) -> float:
            with torch.no_grad():
                return float(nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()))

        masks = MaskSet({"head.weight": np.zeros((11, 20), bool), "tokens.weight": np.zeros((11, 20), bool)})
        annealer = gradloc.Annealer(
            model,
            optimizer,
            masks,
            steps=20,
            validate=validate,
            budget=0.001,
            validate_every=2,
            log=tmp_path / f"{seed}.jsonl",
        )
        for _ in range(60):
            if annealer.done:
                break
            train(model, optimizer, 1)
            annealer.step()
        assert annealer.outcome.startswith("stopped: validation")
        assert not annealer.exact
        assert validate() <= annealer.log[0]["limit"] * (1 + 1e-6)
        decisions = [json.loads(line)["decision"] for line in (tmp_path / f"{seed}.jsonl").read_text().splitlines()]
        assert decisions[-3:] == ["roll back", "roll back", "stop"]


def test_conditional_fading_ends_at_the_gated_reference_and_routes(recorded) -> None:
    model, optimizer, path = recorded(steps=60, firing_tokens=16)
    plan = gradloc.plan_blocks(model, path, kind="conditional", blocks=6, keep=0.34)
    annealer = gradloc.Annealer(model, optimizer, plan, steps=30)
    while not annealer.done:
        train(model, optimizer, 1, seed=annealer.steps_taken)
        annealer.step()
    finished = annealer.finish()
    chain = finished.chains[0]
    ffn, x = model.ffn.eval(), torch.randn(9, 20)
    router = [torch.from_numpy(chain.router.weight), torch.from_numpy(chain.router.bias)]
    with torch.no_grad():
        expected = _gated(
            x, [ffn.up.weight, ffn.down.weight], [ffn.up.bias, ffn.down.bias], torch.relu,
            torch.from_numpy(chain.labels[1]), router, chain.active,
        )  # fmt: skip
        torch.testing.assert_close(ffn(x), expected)
        fast = gradloc.route_model(model, finished)
        torch.testing.assert_close(fast.ffn(x), expected)
    assert fast.certificate.passed
    annealer.close()
    assert not torch.allclose(ffn(x), expected)
    assert 0 < chain.statistics["router_agreement"] <= 1


def test_refusals() -> None:
    model, optimizer = make_net()
    masks = MaskSet({"ffn.up.weight": np.ones((36, 20), bool)})
    for settings, message in (
        ({"schedule": "steep"}, "schedule='steep'"),
        ({"steps": 0}, "steps=0"),
        ({"settle": 1.0}, "settle=1.0"),
        ({"validate": 3}, "validate=3"),
        ({"validate": lambda: 1.0, "budget": -1}, "budget=-1"),
    ):
        with pytest.raises(errors.ConfigError, match=message):
            gradloc.Annealer(model, optimizer, masks, **settings)
    with pytest.raises(errors.NonFiniteError, match="nothing to compare"):
        gradloc.Annealer(model, optimizer, masks, validate=lambda: float("nan"))
    with pytest.raises(errors.ModelMismatchError):
        gradloc.Annealer(nn.Linear(2, 2), optimizer, masks)
    with pytest.raises(errors.UnsupportedError):
        gradloc.Annealer(model, optimizer, {"ffn.up.weight": None})
