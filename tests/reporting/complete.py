"""A small real run with everything that a report can show: masks, tests, plans, an annealed stage, a certificate, costs."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pandas as pd
import torch
from torch import nn

import gradloc
from gradloc.errors import WeakEvidenceWarning
from gradloc.reporting.report import Report
from tests.conftest import make_net, train

CHAIN = ["ffn.*"]


def complete_report(directory: Path) -> Report:
    """Trains, tests, plans, anneals, routes and reports."""
    torch.set_num_threads(1)
    model, optimizer = make_net()
    gradloc.wrap(optimizer, model, run=directory / "run", every=1, flush_every=4, firing_every=1)
    train(model, optimizer, 32)
    gradloc.recorder_of(optimizer).close()
    run = gradloc.load_run(directory / "run")

    generator = torch.Generator().manual_seed(9)
    tokens = torch.randint(11, (8, 9), generator=generator)

    def loss_of(net: nn.Module) -> float:
        with torch.no_grad():
            return float(nn.functional.cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()))

    support = gradloc.find_support(run, include=CHAIN, model=model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WeakEvidenceWarning)  # after 32 steps; the page says it
        masks = support.masks(0.05, "conservative")
    removal = gradloc.removal_cost(
        run, model, lambda: loss_of(model), support=support, include=CHAIN, alphas=(0.05, 0.2), densities=(0.7, 0.4), validations=2
    )  # fmt: skip
    plan = gradloc.plan_blocks(model, run, blocks=4, operators=["chain"])
    routed = copy.deepcopy(model)
    plan.masks.apply(routed)
    certificate = gradloc.route_model(routed, plan).certificate
    annealer = gradloc.Annealer(
        model, optimizer, gradloc.find_masks(run, density=0.5, include=CHAIN), steps=12, validate_every=3, validate=lambda: loss_of(model), budget=0.5
    )  # fmt: skip
    while not annealer.done:
        train(model, optimizer, 1, seed=annealer.steps_taken)
        annealer.step()
    results = pd.DataFrame(
        [
            {"model": "dense", "loss": loss_of(model), "speed": 1.0, "control of": ""},
            {"model": "4 blocks", "loss": loss_of(routed), "speed": 1.1, "control of": ""},
            {"model": "random blocks", "loss": loss_of(routed) + 0.1, "speed": 1.1, "control of": "4 blocks"},
        ]
    )
    return gradloc.report(
        run, masks=masks, plan=plan, annealing=annealer.log, certificate=certificate, support=support, removal=removal,
        results=results, show=False, wandb=False,
    )  # fmt: skip
