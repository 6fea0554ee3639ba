"""Feed-forward networks that a larger forward spells out, against the model whose weights outside blocks are zero."""

from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradloc
from gradloc import errors
from gradloc.core.plan import HUB, BlockPlan, ChainPlan, OperatorChain
from gradloc.core.router import RouterWeights
from gradloc.route.dense import dense_state_dict
from gradloc.route.find import find_operators
from gradloc.route.inline import inline_chains

D, H = 8, 16


class Up(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.act = nn.Linear(D, H), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.dense(x))


class Down(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(H, D), nn.LayerNorm(D)

    def forward(self, hidden: Tensor, x: Tensor) -> Tensor:
        return self.norm(self.dense(hidden) + x)


class Attending(nn.Module):
    """Stands for attention: gives a pair, as many do, and can't be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor, mask: Tensor | None = None, **options: object) -> tuple[Tensor, None]:
        if bool(x.sum() > 1e9):
            raise ValueError
        return self.out(torch.softmax(self.query(x), -1)), None


class InChildren(nn.Module):
    """As BERT's layers are written."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.intermediate, self.output = Attending(), Up(), Down()

    def forward(self, x: Tensor, mask: Tensor | None = None, **options: object) -> Tensor:
        x, _ = self.attention(x, mask, **options)
        return self._chunk(x)

    def _chunk(self, x: Tensor) -> Tensor:
        return self.output(self.intermediate(x), x)


class InRow(nn.Module):
    """As OPT's and Whisper's layers are written."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm, self.act = Attending(), nn.LayerNorm(D), nn.ReLU()
        self.fc1, self.fc2, self.p = nn.Linear(D, H), nn.Linear(H, D), 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)[0]
        hidden = self.act(self.fc1(self.norm(x)))
        hidden = F.dropout(hidden, p=self.p, training=self.training)
        x = x + self.fc2(hidden)
        if x.dtype == torch.float16:
            x = x.clamp(max=torch.finfo(x.dtype).max - 1000)
        return x


class WithDropout(InRow):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.drop(self.act(self.fc1(x))))


class DropsFirst(WithDropout):
    """Dropout before the activation scales what that gets, and not what it gives."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self.drop(self.fc1(x))))


class AsFunction(InRow):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.relu(self.fc1(self.norm(x))))


class SeenHidden(InRow):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.fc1(x))
        return self.fc2(hidden) + hidden.mean()


class ActsTwice(InRow):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.fc2(self.act(self.fc1(x))))


class Drops(InRow):
    def __init__(self) -> None:
        super().__init__()
        self.p = 0.1


class ByData(InRow):
    """Whether the hidden units are seen otherwise depends on data."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.fc1(x))
        extra = hidden.mean() if x.sum() > 0 else 0.0
        return self.fc2(hidden) + extra


class InTraining(InRow):
    """The hidden units are seen otherwise while it trains."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.fc1(x))
        found = self.fc2(hidden)
        return found + hidden.mean() if self.training else found


class Loops(InRow):
    def forward(self, x: Tensor) -> Tensor:
        while x.abs().max() > 1:
            x = x / 2
        return self.fc2(self.act(self.fc1(x)))


def torchs(**settings: object) -> nn.Module:
    return nn.TransformerEncoderLayer(D, 2, H, batch_first=True, **settings)


MADE = {
    "in children": InChildren,
    "in a row": InRow,
    "with dropout": WithDropout,
    "in a Sequential": lambda: nn.Sequential(
        nn.LayerNorm(D), nn.Linear(D, H), nn.GELU(), nn.Linear(H, D), nn.Dropout(0.0)
    ),
    "torch's": torchs,
    "torch's, norm first, gelu": lambda: torchs(activation="gelu", norm_first=True),
    "torch's, a module": lambda: torchs(activation=nn.SiLU()),
    "torch's decoder layer": lambda: Decoder(),
}


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(D, 2, H, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x)


EVERY = pytest.mark.parametrize("make", MADE.values(), ids=MADE)


def chain_of(model: nn.Module) -> OperatorChain:
    (chain,) = [chain for chain in find_operators(model)[0] if chain.kind == "chain"]
    return chain


def structural(model: nn.Module) -> BlockPlan:
    random = np.random.default_rng(0)
    labels = tuple(random.permutation(np.arange(n) % 4) for n in (D, H, D))
    return BlockPlan("structural", (ChainPlan(chain_of(model), labels, 4),), "none")


def conditional(model: nn.Module, active: int, weighted: bool = False) -> BlockPlan:
    random = np.random.default_rng(0)
    router = replace(RouterWeights.linear(random.normal(size=(4, D)), random.normal(size=4)), weighted=weighted)
    hub = np.full(D, HUB)
    labels = (hub, random.permutation(np.arange(H) % 4), hub)
    plan = ChainPlan(chain_of(model), labels, 4, active, router=router, weighted=weighted)
    return BlockPlan("conditional", (plan,), "none")


@EVERY
@pytest.mark.parametrize("training", [False, True])
def test_structural_blocks_equal_the_masked_model(make, training: bool) -> None:
    torch.manual_seed(0)
    model = make().train(training)
    plan = structural(model)
    plan.masks.apply(model)
    fast = gradloc.route_model(model, plan)
    assert type(fast) is type(model)
    assert fast.certificate.passed
    assert all(module.training == training for module in fast.modules())
    x = torch.randn(2, 3, D)
    for seed in range(3):
        torch.manual_seed(seed)
        expected = model(x)
        torch.manual_seed(seed)
        found = fast(x)
        if not training:
            torch.testing.assert_close(found, expected)
    if not training:
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x))


@EVERY
def test_all_blocks_equal_the_dense_model_and_some_a_gated_one(make) -> None:
    torch.manual_seed(0)
    model = make().eval()
    before = copy.deepcopy(model.state_dict())
    fast = gradloc.route_model(model, conditional(model, 4))
    x = torch.randn(2, 3, D)
    torch.testing.assert_close(fast(x), model(x))
    plan = conditional(model, 2, weighted=True)
    fast = gradloc.route_model(model, plan)
    chain = plan.chains[0]
    gate = Gate(chain)
    hooks = [
        model.get_submodule(chain.chain.operators[0]).register_forward_pre_hook(gate.read),
        model.get_submodule(chain.chain.operators[1]).register_forward_pre_hook(gate.shut),
    ]
    expected = model(x)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(fast(x), expected)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Gate:
    """What a conditional plan means, told to the dense model by hooks."""

    def __init__(self, plan: ChainPlan) -> None:
        self.plan = plan

    def read(self, module: nn.Module, inputs: tuple[Tensor]) -> None:
        router = self.plan.router
        weight, bias = torch.from_numpy(router.weights[0]), torch.from_numpy(router.biases[0])
        scores = inputs[0] @ weight.T + bias
        picks = torch.zeros_like(scores).scatter(-1, scores.topk(self.plan.active, -1).indices, 1.0)
        self.gates = (picks * 2 * torch.sigmoid(scores))[..., self.plan.labels[1]]

    def shut(self, module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0] * self.gates,)


@EVERY
@pytest.mark.parametrize("kind", ["structural", "conditional"])
def test_it_trains_copies_pickles_exports_and_goes_back(make, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make()
    plan = structural(model) if kind == "structural" else conditional(model, 2, weighted=True)
    if kind == "structural":
        plan.masks.apply(model)
    fast = gradloc.route_model(model, BlockPlan.load(plan.save(tmp_path / "plan.safetensors")))
    state, again = dense_state_dict(fast)
    assert again.chains[0].chain == plan.chains[0].chain
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    x = torch.randn(2, 3, D)
    fast(x).square().sum().backward()
    assert all(p.grad is not None for p in fast.get_submodule(plan.chains[0].chain.name).parameters())
    torch.optim.SGD(fast.parameters(), lr=0.01).step()
    fast.eval()
    torch.testing.assert_close(copy.deepcopy(fast)(x), fast(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(fast))(x), fast(x))
    if not any(isinstance(module, Attending) for module in fast.modules()):
        torch.testing.assert_close(torch.export.export(fast, (x,)).module()(x), fast(x))


@pytest.mark.parametrize("make", [AsFunction, DropsFirst, SeenHidden, ActsTwice, Drops, ByData, InTraining, Loops])
@pytest.mark.parametrize("training", [False, True])
def test_what_cannot_be_taken_out_is_left(make, training: bool) -> None:
    operators, _ = find_operators(make().train(training))
    assert {operator.kind for operator in operators} == {"linear"}


def test_dropout_between_is_kept() -> None:
    model = WithDropout().train()
    fast = gradloc.route_model(model, structural(model))
    assert fast.fc1.dropouts == (0.0, 0.5, 0.0)
    x = torch.randn(64, D)
    assert not torch.equal(fast(x), fast(x))
    fast.eval()
    assert torch.equal(fast(x), fast(x))


def test_a_padded_batch_goes_through_torchs_encoder() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(torchs(), 2).eval()
    chains = tuple(chain for chain in find_operators(encoder)[0] if chain.kind == "chain")
    assert [chain.name for chain in chains] == ["layers.0.linear1", "layers.1.linear1"]
    random = np.random.default_rng(0)
    labels = tuple(random.permutation(np.arange(n) % 2) for n in (D, H, D))
    plan = BlockPlan("structural", tuple(ChainPlan(chain, labels, 2) for chain in chains), "none")
    plan.masks.apply(encoder)
    fast = gradloc.route_model(encoder, plan)
    x, padded = torch.randn(2, 5, D), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # of torch's nested tensors
            expected = encoder(x, src_key_padding_mask=padded)
        found = fast(x, src_key_padding_mask=padded)
    torch.testing.assert_close(found[~padded], expected[~padded])


def test_another_forward_is_refused() -> None:
    plan = structural(InRow())
    with pytest.raises(errors.UnsupportedError, match="fc1: its forward isn't the chain"):
        gradloc.route_model(SeenHidden(), plan)
    with pytest.raises(errors.ModelMismatchError, match="no such linear module"):
        gradloc.route_model(nn.Sequential(nn.Linear(D, H)), plan)


def test_operators_of_several_forwards_are_left() -> None:
    first, second = InRow(), InRow()
    second.fc1 = first.fc1
    assert {operator.kind for operator in find_operators(nn.Sequential(first, second))[0]} == {"linear"}


def test_a_layer_in_several_places_is_one() -> None:
    torch.manual_seed(0)
    layer = InRow()
    model = nn.Sequential(layer, nn.Tanh(), layer).eval()
    plan = structural(model)
    fast = gradloc.route_model(model, plan)
    plan.masks.apply(model)
    x = torch.randn(3, D)
    torch.testing.assert_close(fast(x), model(x))
    state, _ = dense_state_dict(fast)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_only_free_operators_are_taken() -> None:
    assert [chain.name for chain in inline_chains(InRow(), set())] == ["fc1"]
    assert not list(inline_chains(InRow(), {"fc2"}))


class NewGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh((2.0 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3.0))))


class DropsPaths(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        kept = torch.rand(x.shape[:1] + (1,) * (x.ndim - 1)) > 0.2 if self.training else 1.0
        return F.relu(x) * kept


class StraightThrough(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + (F.relu(x) - x).detach()


@pytest.mark.parametrize(
    ("activation", "name"),
    [(NewGELU(), "gelu_tanh"), (DropsPaths(), None), (StraightThrough(), None), (nn.Softmax(-1), None)],
)
def test_activations_in_their_own_words(activation: nn.Module, name: str | None) -> None:
    model = nn.Sequential(nn.Linear(D, H), activation, nn.Linear(H, D))
    chains = [chain for chain in find_operators(model)[0] if chain.kind == "chain"]
    assert [chain.activations for chain in chains] == ([(name,)] if name is not None else [])
