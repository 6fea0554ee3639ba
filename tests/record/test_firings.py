"""Sampled firings against every token's error signal, for each kind of site."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradloc
from gradloc.analyze.firing_statistics import firing_statistics
from gradloc.record.firings import FIRING_RMS, uniform_sample


def error_signals(model: nn.Module, module: nn.Module, data: torch.Tensor) -> torch.Tensor:
    """The gradient at a module's output for every token, by plain autograd: ``[batch, …, units]``."""
    kept: list[torch.Tensor] = []

    def keep(m: nn.Module, i: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        value.retain_grad()
        kept.append(value)

    handle = module.register_forward_hook(keep)
    objective(model(data)).backward()
    handle.remove()
    model.zero_grad()
    assert kept[0].grad is not None
    return kept[0].grad


def objective(output: torch.Tensor) -> torch.Tensor:
    return (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum()


def record(path: Path, model: nn.Module, data: torch.Tensor, **more: Any) -> gradloc.Run:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    gradloc.wrap(
        optimizer, model, run=path, every=1, firing_every=1, **{"firing_tokens": 10_000, "on_error": "raise"} | more
    )
    objective(model(data)).backward()
    optimizer.step()
    gradloc.recorder_of(optimizer).close()
    return gradloc.load_run(path)


def expected(signal: torch.Tensor, exact: bool) -> np.ndarray:
    """Energies over the mean of tokens that have a signal, zero below κ·rms unless zeros are exact."""
    squares = signal[signal.any(1)].double().square().numpy()
    energy = squares / squares.mean()
    return energy if exact else np.where(energy > FIRING_RMS**2, energy, 0.0)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.SiLU])
def test_hidden_units(tmp_path: Path, activation: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), activation(), nn.Linear(40, 5))
    data = torch.randn(3, 7, 6)
    signal = error_signals(model, model[0], data).reshape(21, 40)
    found = record(tmp_path / "r", model, data).firings("0")
    np.testing.assert_allclose(found, expected(signal, activation is nn.ReLU), rtol=1e-5, atol=1e-9)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 40), nn.Linear(6, 40), nn.Linear(40, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def test_a_gated_ffn_at_its_up_projection(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, data = Gated(), torch.randn(9, 6)
    signal = error_signals(model, model.up, data)
    np.testing.assert_allclose(
        record(tmp_path / "r", model, data).firings("up"), expected(signal, False), rtol=1e-5, atol=1e-9
    )


def test_tokens_that_nothing_looks_at_say_nothing_of_units(tmp_path: Path) -> None:
    """Padding, masked labels, the last token of a causal model: their zeros are no zeros of an activation, and they don't count as heard."""
    torch.manual_seed(0)

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ffn = Gated()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.ffn(x)[:, :4]

    model, data = Masked(), torch.randn(3, 7, 6)
    signal = error_signals(model, model.ffn.up, data).reshape(21, 40)
    run = record(tmp_path / "r", model, data)
    energy = expected(signal, exact=False)
    assert len(energy) == 12
    found = run.firings("ffn.up")
    np.testing.assert_allclose(found, energy, rtol=1e-5, atol=1e-9)
    row = firing_statistics(run).set_index("operator").loc["ffn.up"]
    heard = energy[energy.any(1)]
    assert row["counted"] == "strong"
    assert 0 < row["tokens"] == len(heard) <= 12
    # Of tokens without a strong signal it isn't known whether they have weak ones: noise's share is of all.
    np.testing.assert_allclose(row["fire_share"], (energy > 0).mean())


def test_a_model_without_sites_says_how_to_name_them(tmp_path: Path) -> None:
    run = record(tmp_path / "r", nn.Linear(6, 6), torch.randn(9, 6))
    assert any("firing_modules" in note for note in run.info.notes)


def test_resuming_takes_up_firings_that_were_off(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6)), torch.randn(9, 6)
    assert record(tmp_path / "r", model, data, firings=False).info.sites == ()
    run = record(tmp_path / "r", model, data, resume=True)
    assert [site.module for site in run.info.sites] == ["0"]
    assert run.firings("0").shape == (9, 12)
    assert record(tmp_path / "r", model, data, resume=True, firings=False).firings("0").shape == (9, 12)


def test_resuming_with_a_model_that_lacks_a_watched_module_is_refused(tmp_path: Path) -> None:
    data = torch.randn(9, 6)
    record(tmp_path / "r", nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6)), data)
    part = nn.Sequential(OrderedDict([("2", nn.Linear(12, 6))]))
    with pytest.raises(gradloc.errors.ModelMismatchError, match=r"firings of 0, .* firings=False"):
        record(tmp_path / "r", part, torch.randn(9, 12), resume=True)
    run = record(tmp_path / "r", part, torch.randn(9, 12), resume=True, firings=False)
    assert len(run.firings("0")) == 9
    otherwise = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))
    with pytest.raises(gradloc.errors.ModelMismatchError, match="firings of 0 were recorded otherwise"):
        record(tmp_path / "r", otherwise, data, resume=True)


def test_convolution_channels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    data = torch.randn(2, 3, 5, 4)
    signal = error_signals(model, model[0], data).permute(0, 2, 3, 1).reshape(-1, 8)
    found = record(tmp_path / "r", model, data).firings("0")
    np.testing.assert_allclose(found, expected(signal, True), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU])
def test_a_pointwise_network_fires_as_its_linear_twin(tmp_path: Path, activation: type[nn.Module]) -> None:
    """The same weights and tokens: each place is one."""
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(6, 40, 1), activation(), nn.Conv2d(40, 5, 1))
    linear = nn.Sequential(nn.Linear(6, 40), activation(), nn.Linear(40, 5))
    linear.load_state_dict(
        {name: value.flatten(1) if value.dim() > 1 else value for name, value in conv.state_dict().items()}
    )
    images = torch.randn(2, 6, 5, 4)

    class ChannelsLast(nn.Module):
        """So that both models' outputs, and what comes back to them, are alike."""

        def __init__(self) -> None:
            super().__init__()
            self.ffn = conv

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.ffn(x).permute(0, 2, 3, 1)

    run = record(tmp_path / "conv", ChannelsLast(), images)
    (site,) = [site for site in run.info.sites if site.module == "ffn.0"]
    assert (site.kind, site.activation) == ("channels", activation.__name__.lower())
    twin = record(tmp_path / "linear", linear, images.permute(0, 2, 3, 1))
    expected = twin.firings("0")
    assert expected.shape == (40, 40)
    np.testing.assert_allclose(run.firings("ffn.0"), expected, rtol=1e-4, atol=1e-7)
    small = {"firing_tokens": 7}
    some = record(tmp_path / "some", ChannelsLast(), images, **small).firings("ffn.0")
    np.testing.assert_allclose(
        some > 0, record(tmp_path / "few", linear, images.permute(0, 2, 3, 1), **small).firings("0") > 0
    )


def test_a_convolution_of_a_single_input(tmp_path: Path) -> None:
    """Without a batch axis, and of any length."""
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Conv1d(3, 6, 3), nn.ReLU(), nn.Conv1d(6, 2, 3)), torch.randn(3, 20)
    signal = error_signals(model, model[0], data).T
    run = record(tmp_path / "r", model, data)
    np.testing.assert_allclose(run.firings("0"), expected(signal, True), rtol=1e-5, atol=1e-9)
    record(tmp_path / "r", model, torch.randn(3, 25), resume=True)
    assert set(gradloc.report(tmp_path / "r", show=False, wandb=False).data.firings["operator"]) == {"0", "2"}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(4, 10, batch_first=True), nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cell(x)[0])


def test_recurrent_units(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, data = Recurrent(), torch.randn(3, 6, 4)
    signal = error_signals(model, model.cell, data).reshape(18, 10)
    found = record(tmp_path / "r", model, data).firings("cell")
    np.testing.assert_allclose(found, expected(signal, False), rtol=1e-5, atol=1e-9)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.project = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (4, 3)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.project(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_attention_heads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, data = Attention(), torch.randn(2, 5, 12)
    kept: list[torch.Tensor] = []
    handle = model.project.register_forward_pre_hook(lambda m, i: (i[0].retain_grad(), kept.append(i[0]))[0])
    objective(model(data)).backward()
    handle.remove()
    model.zero_grad()
    per_head = kept[0].grad.reshape(10, 4, 3).norm(dim=-1)
    found = record(tmp_path / "r", model, data, firing_heads={"project": 4}).firings("project")
    np.testing.assert_allclose(found, expected(per_head, False), rtol=1e-4, atol=1e-9)
    with pytest.raises(gradloc.errors.ConfigError, match="don't split into 5 heads"):
        record(tmp_path / "s", model, data, firing_heads={"project": 5})


class Mixture(nn.Module):
    """Two of four experts a token, by a router."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, chosen = self.router(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            out = out.index_add(0, token, weight[token, place, None] * expert(x[token]))
        return out


def test_mixture_of_experts(tmp_path: Path) -> None:
    """Experts are chains, each with the tokens that came to it; the router is watched by name."""
    torch.manual_seed(0)
    model, data = Mixture(), torch.randn(30, 6)
    chosen = model.router(data).softmax(-1).topk(2).indices
    run = record(tmp_path / "r", model, data, firing_modules=["router"])
    assert run.firings("router").shape == (30, 4)
    for number in range(4):
        assert len(run.firings(f"experts.{number}.0")) == int((chosen == number).sum())


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first = nn.Linear(6, 6)
        self.ffn = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.ffn, self.first(x), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_modules(tmp_path: Path, reentrant: bool) -> None:
    """Their forward runs twice; each token is still seen once."""
    torch.manual_seed(0)
    model, data = Checkpointed(reentrant), torch.randn(9, 6)
    plain = nn.Sequential(model.first, model.ffn)
    signal = error_signals(plain, model.ffn[0], data)
    found = record(tmp_path / "r", model, data).firings("ffn.0")
    np.testing.assert_allclose(found, expected(signal, True), rtol=1e-5, atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 50), st.integers(1, 60), st.integers(0, 99))
def test_a_sample_has_distinct_positions_and_increasing_rarity(count: int, wanted: int, seed: int) -> None:
    positions, keys = uniform_sample(np.random.default_rng(seed), count, wanted)
    assert len(set(positions.tolist())) == len(positions) == min(count, wanted)
    assert ((positions >= 0) & (positions < count)).all()
    assert ((keys >= 0) & (keys <= 1)).all()


def test_sampled_shares_are_those_of_all_tokens(tmp_path: Path) -> None:
    """Two micro-batches of different size and different data: the sample's firing shares agree with every token's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, firing_every=1, firing_tokens=8)
    fired, steps = np.zeros(24), 400

    def count(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        np.add(fired, (output > 0).sum(0).numpy(), out=fired)

    handle = model[0].register_forward_hook(count)
    for step in range(steps):
        for size, shift in ((30, 1.5), (10, -1.5)):
            data = torch.randn(size, 6, generator=torch.Generator().manual_seed(step)) + shift
            model(data).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    handle.remove()
    gradloc.recorder_of(optimizer).close()
    sampled = gradloc.load_run(tmp_path / "r").firings("0") > 0
    assert len(sampled) == 8 * steps
    share = fired / (40 * steps)
    error = np.sqrt(share * (1 - share) / (8 * steps))
    assert (np.abs(sampled.mean(0) - share) < 4.5 * error + 1e-3).all()


def test_samples_join_uniformly() -> None:
    """The smallest keys of two samples are a uniform sample of both: 4 of 12 + 6 positions."""
    hits = np.zeros(18)
    for seed in range(6000):
        random = np.random.default_rng(seed)
        parts = [uniform_sample(random, count, 4) for count in (12, 6)]
        keys = np.concatenate([keys for _, keys in parts])
        places = np.concatenate([parts[0][0], 12 + parts[1][0]])
        np.add.at(hits, places[np.argsort(keys)[:4]], 1)
    rates = hits / 6000
    error = np.sqrt(4 / 18 * 14 / 18 / 6000)
    assert np.abs(rates - 4 / 18).max() < 4.5 * error


def test_activations_without_training(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 5)), torch.randn(3, 7, 6)
    with gradloc.record_forward(model, tmp_path / "r", firing_tokens=1000, flush_every=2), torch.no_grad():
        for _ in range(3):
            model(data)
    model(data)  # after it has ended nothing is watched
    run = gradloc.load_run(tmp_path / "r")
    active = torch.relu(model[0](data)).reshape(21, 40).detach()
    np.testing.assert_allclose(run.firings("0"), np.tile(expected(active, True), (3, 1)), rtol=1e-5)
    assert gradloc.plan_blocks(model, run, kind="conditional", blocks=4).chains[0].blocks == 4
    with pytest.raises(gradloc.errors.ConfigError, match="firing_modules"):
        gradloc.record_forward(nn.Linear(2, 2), tmp_path / "s")


def test_a_token_for_which_no_unit_is_active_is_one(tmp_path: Path) -> None:
    """Unlike one without an error signal."""
    model = nn.Sequential(nn.Linear(1, 4, bias=False), nn.ReLU(), nn.Linear(4, 1))
    nn.init.ones_(model[0].weight)
    with gradloc.record_forward(model, tmp_path / "r"), torch.no_grad():
        model(torch.tensor([[1.0], [-1.0], [1.0]]))
    firings = gradloc.load_run(tmp_path / "r").firings("0")
    np.testing.assert_allclose(firings, np.array([[1.5], [0.0], [1.5]]).repeat(4, 1))


@pytest.mark.parametrize("shape", [(12, 20), (3, 4, 20)])
def test_an_activation_in_place_leaves_the_signal(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Over several batch axes a linear layer's output is a view, which an in-place activation takes out of the graph."""
    signals = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 37), nn.ReLU(inplace), nn.Linear(37, 5))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gradloc.wrap(optimizer, model, run=tmp_path / f"{inplace}", every=1, firing_every=1, firing_tokens=64)
        for _ in range(3):
            model(torch.randn(shape)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        gradloc.recorder_of(optimizer).close()
        signals.append(gradloc.load_run(tmp_path / f"{inplace}").firings("0"))
    assert signals[0].shape == (36, 37)
    np.testing.assert_array_equal(signals[0], signals[1])


def test_energy_that_was_left_out_counts_as_energy(tmp_path) -> None:
    """Behind GELU weak signals aren't stored; the strongest tenth must not seem to hold all because of it."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"ffn": nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=10, firing_every=1)
    shares = []
    for _ in range(20):
        x, target = torch.randn(64, 16), torch.randn(64, 16)
        hidden = model["ffn"][0](x)
        hidden.retain_grad()
        (model["ffn"][2](model["ffn"][1](hidden)) - target).square().sum().backward()
        energy = hidden.grad.square()
        shares.append(float((energy.topk(6, dim=1).values.sum(1) / energy.sum(1)).mean()))
        optimizer.zero_grad()
        (model["ffn"](x) - target).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    (held,) = gradloc.report(tmp_path / "r").data.firings["top10_energy"]
    true = sum(shares) / len(shares)
    assert 0.5 * true < held < true + 0.05


def test_a_window_without_firings_is_named_once_and_others_are_not(tmp_path: Path) -> None:
    """A first step whose loss passes no watched module says nothing of the windows after it, sampled or not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=2, firing_every=4)
    with pytest.warns(
        RuntimeWarning, match=r"1 and 2, though 1 steps .* nothing before them is trained.* PackedSequence"
    ):
        for number in range(16):
            optimizer.zero_grad()
            loss = model(torch.randn(9, 6)).square().mean() if number else model[0].weight.square().sum()
            loss.backward()
            optimizer.step()
        gradloc.recorder_of(optimizer).close()
    run = gradloc.load_run(tmp_path / "r")
    assert len(run.problems) == 1
    assert len(run.firings("0")) == 3 * 9


@pytest.mark.parametrize("spread", [0.0, 1.5])
def test_noise_has_the_share_that_noise_is_said_to_have(tmp_path: Path, spread: float) -> None:
    """Also where tokens differ in strength: those without any strong unit were left out of the mean, and noise had 26 % for 4.6."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 256))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    gradloc.wrap(optimizer, model, run=tmp_path / "run", every=1, flush_every=25, firing_every=1)
    for _ in range(25):
        given = torch.randn(64, 256) * torch.exp(spread * torch.randn(64, 1))
        (model(0.01 * torch.randn(64, 16)) * given).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    run = gradloc.load_run(tmp_path / "run")
    (row,) = firing_statistics(run).to_dict("records")
    assert row["counted"] == "strong"
    assert row["fire_share"] == pytest.approx((run.firings(row["operator"]) > 0).mean())
    assert row["fire_share"] < 0.06
