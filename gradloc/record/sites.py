"""Finds the modules whose units' firings are worth watching."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from gradloc.core.names import listed, matching
from gradloc.core.plan import OperatorChain
from gradloc.core.sites import FiringSite, SiteKind
from gradloc.core.wrappers import is_compiled, plain_modules
from gradloc.errors import ConfigError
from gradloc.record.config import RecordConfig

COMPILED = (
    "firings are not recorded: the model is compiled, and torch.compile leaves out the hooks that see them; everything else is recorded. "
    "Train without torch.compile for them, or say firings=False"
)
_KINDS: dict[type[nn.Module], SiteKind] = {
    nn.Conv1d: "channels",
    nn.Conv2d: "channels",
    nn.Conv3d: "channels",
    nn.RNNBase: "recurrent",
}


def firing_sites(
    model: nn.Module, chains: Sequence[OperatorChain], config: RecordConfig
) -> tuple[tuple[FiringSite, ...], tuple[str, ...]]:
    """Sites of a model, and notes on what can't be watched.

    By themselves: hidden units of operator chains, channels of convolutions, units of recurrent layers. On request: the output
    of any module, and heads.

    Raises:
        ConfigError: a name or glob that was asked for matches no module, or a number of heads doesn't fit; all are named.
    """
    if not config.firings or config.source == "optimizer_state":
        return (), ()
    modules = plain_modules(model)
    faults = [f"firing_modules: {glob!r}" for glob in config.firing_modules if not _matching(glob, modules)]
    faults += [f"firing_heads: {glob!r}" for glob in config.firing_heads if not _matching(glob, modules)]
    if faults:
        raise ConfigError(
            f"{'; '.join(faults)} match no module; modules: {listed(filter(None, modules), (*config.firing_modules, *config.firing_heads)[0])}."
        )
    found = {
        operator: FiringSite(operator, "features", activation)
        for chain in chains
        if chain.kind == "chain"
        for operator, activation in zip(chain.operators, chain.activations, strict=False)
    }
    for chain in chains:
        if chain.kind == "gated" and chain.conditional_reason is None:
            # Where the gate is shut nothing comes back to the up projection, though never exactly nothing.
            found[chain.fires_at] = FiringSite(chain.fires_at)
        elif chain.kind == "conv" and chain.conditional_reason is None:
            found[chain.fires_at] = FiringSite(chain.fires_at, "channels", chain.activations[0])
    for name, module in modules.items():
        kind = next((_KINDS[base] for base in type(module).__mro__ if base in _KINDS), None)
        if kind is not None:
            found.setdefault(name, FiringSite(name, kind))
    for glob in config.firing_modules:
        for name in _matching(glob, modules):
            found.setdefault(name, FiringSite(name))
    for glob, heads in config.firing_heads.items():
        for name in _matching(glob, modules):
            width = getattr(modules[name], "in_features", 0)
            if not width or width % heads:
                raise ConfigError(
                    f"firing_heads: {name} has {width or 'no'} input units, which don't split into {heads} heads."
                )
            found[name] = FiringSite(name, "heads", groups=heads)
    notes = []
    if is_compiled(model):
        notes.append(COMPILED)
        found = {}
    elif not found:
        notes.append(
            "no firings are recorded: no chain linear → activation → linear, convolution or recurrent layer was found; name "
            "modules with firing_modules=[…]"
        )
    if any(isinstance(module, nn.MultiheadAttention) for module in modules.values()):
        notes.append(
            "heads of torch.nn.MultiheadAttention are not watched: it never calls its output projection as a module"
        )
    return tuple(found.values()), tuple(notes)


def _matching(glob: str, modules: dict[str, nn.Module]) -> list[str]:
    return matching(glob, filter(None, modules))
