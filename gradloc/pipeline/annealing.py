"""The annealer of `gradloc.anneal`, which refuses at the start what routing would refuse when the stage is over."""

from __future__ import annotations

from gradloc.anneal.annealer import Annealer, annealer_of
from gradloc.anneal.arguments import PLAN_CHECKS
from gradloc.route.convert import check_forwards

PLAN_CHECKS.append(check_forwards)

__all__ = ["Annealer", "annealer_of"]
