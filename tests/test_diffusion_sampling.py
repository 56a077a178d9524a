"""Samplers against their papers' formulas in float64; guidance; noise that belongs to a sample's number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

from small_diffusion import LINEAR, Oracle, alphas, dit

from maskllm4v.tasks.diffusion.sampling import Sampler, guided, make_scheduler
from maskllm4v.tasks.diffusion.settings import SamplingSettings
from maskllm4v.utils.errors import ConfigError
from maskllm4v.utils.rng import generator, torch_seed

SHAPE = (2, 4, 4)


def settings(**values: Any) -> SamplingSettings:
    return SamplingSettings(**{"sampler": "ddim", "steps": 5, "guidance": 1.0, **values})


def sampler(*, sigma: bool = False, shape: tuple[int, int, int] = SHAPE, **values: Any) -> Sampler:
    return Sampler(settings(**values), LINEAR, shape, no_label=10, learned_sigma=sigma)


class Stub(nn.Module):
    """Elementwise: what it says of a sample depends on that sample alone, to the bit. Notes what it sees."""

    def __init__(self, scale: float = 0.5, *, sigma: bool = False) -> None:
        super().__init__()
        self.scale, self.sigma, self.seen = scale, sigma, []

    def forward(self, inputs: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool) -> tuple[Tensor]:
        self.seen.append((inputs, timestep, class_labels))
        epsilon = self.scale * inputs + 0.01 * class_labels.view(-1, 1, 1, 1)
        return (torch.cat([epsilon, inputs.sin()], 1) if self.sigma else epsilon,)


# Timesteps


@pytest.mark.parametrize("steps", [2, 10, 100, 250, 1000])
def test_ddpm_goes_evenly_through_all_timesteps(steps: int) -> None:
    found = make_scheduler(settings(sampler="ddpm", steps=steps), LINEAR, learned_sigma=True).timesteps
    stride, place, wanted = 999 / (steps - 1), 0.0, []
    for _ in range(steps):  # as DiT's authors space them
        wanted.append(round(place))
        place += stride
    assert found.tolist() == wanted[::-1]
    assert found.tolist() == np.linspace(0, 999, steps).round().astype(int)[::-1].tolist()


@pytest.mark.parametrize("steps", [2, 5, 20, 50, 1000])
def test_ddim_starts_at_the_last_timestep(steps: int) -> None:
    found = make_scheduler(settings(steps=steps), LINEAR, learned_sigma=False).timesteps.tolist()
    assert found == [1000 // steps * (i + 1) - 1 for i in range(steps)][::-1]


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_more_steps_than_timesteps_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="sampling in 1001 steps, but the noise schedule has 1000 timesteps"):
        make_scheduler(settings(sampler=name, steps=1001), LINEAR, learned_sigma=False)


@pytest.mark.parametrize("steps", [3, 600, 999])
def test_ddim_without_equal_strides_is_refused(steps: int) -> None:
    with pytest.raises(
        ConfigError, match=f"sampling in {steps} steps by DDIM, which does not divide the schedule's 1000"
    ):
        make_scheduler(settings(steps=steps), LINEAR, learned_sigma=False)


# One step


def ddpm_step(place: int, steps: int, x: Tensor, epsilon: Tensor, noise: Tensor, share: Tensor | None) -> Tensor:
    """Nichol & Dhariwal 2021 on the respaced betas, from the ``place``-th timestep to the one before; in float64."""
    spaced = alphas()[np.linspace(0, 999, steps).round().astype(int)]
    before = np.concatenate([[1.0], spaced[:-1]])
    betas = 1 - spaced / before
    x, epsilon, noise = x.double(), epsilon.double(), noise.double()
    a, a_before, beta = spaced[place], before[place], betas[place]
    clean = (x - (1 - a) ** 0.5 * epsilon) / a**0.5
    mean = a_before**0.5 * beta / (1 - a) * clean + (1 - beta) ** 0.5 * (1 - a_before) / (1 - a) * x  # Eq. 11
    if place == 0:
        return mean
    lower = beta * (1 - a_before) / (1 - a)  # β̃, Eq. 10
    v = torch.zeros_like(x) if share is None else (share.double() + 1) / 2
    return mean + (v * np.log(beta) + (1 - v) * np.log(lower)).exp().sqrt() * noise  # Eq. 15


@pytest.mark.parametrize("sigma", [True, False])
@pytest.mark.parametrize(("steps", "place"), [(250, 249), (250, 100), (250, 1), (250, 0), (10, 9), (10, 1), (10, 0)])
def test_ddpm_step_is_the_papers(steps: int, place: int, sigma: bool) -> None:
    x, epsilon, share = torch.randn(3, 2, *SHAPE).unbind()
    share = 1.5 * share.tanh()  # the model is free to leave [-1, 1]
    scheduler = make_scheduler(settings(sampler="ddpm", steps=steps), LINEAR, learned_sigma=sigma)
    timestep = scheduler.timesteps.tolist()[steps - 1 - place]
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    outputs = torch.cat([epsilon, share], 1) if sigma else epsilon
    found = scheduler.step(outputs, timestep, x, generator=seeds, return_dict=False)[0]
    noise = torch.stack([torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)])
    wanted = ddpm_step(place, steps, x, epsilon, noise, share if sigma else None)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


def test_learned_variance_moves_the_step() -> None:
    """The test above could tell: half a unit of share is far more than its tolerance."""
    x, epsilon, noise = torch.randn(3, 2, *SHAPE).unbind()
    low, high = (ddpm_step(1, 10, x, epsilon, noise, torch.full_like(x, share)) for share in (-0.5, 0.0))
    assert (high - low).abs().max() > 0.01 * high.abs().max()


def test_ddim_steps_are_the_papers() -> None:
    """Song et al. 2021, Eq. 12 with σ = 0, and no noise left at the end."""
    stub, times = Stub(), [999, 799, 599, 399, 199]
    found = sampler()(stub, torch.tensor([3, 4]), [0, 1])
    x = stub.seen[0][0].double()
    for t, next_alpha in zip(times, [*alphas()[times[1:]], 1.0], strict=True):
        epsilon = 0.5 * x + 0.01 * torch.tensor([3, 4]).view(-1, 1, 1, 1)
        clean = (x - (1 - alphas()[t]) ** 0.5 * epsilon) / alphas()[t] ** 0.5
        x = next_alpha**0.5 * clean + (1 - next_alpha) ** 0.5 * epsilon
    assert [t.tolist() for _, t, _ in stub.seen] == [[t, t] for t in times]
    torch.testing.assert_close(found.double(), x, rtol=1e-3, atol=1e-3)


def test_ddim_leaves_the_variance_aside() -> None:
    labels = torch.tensor([3, 4])
    assert torch.equal(sampler(sigma=True)(Stub(sigma=True), labels, [0, 1]), sampler()(Stub(), labels, [0, 1]))


@pytest.mark.parametrize("sigma", [True, False])
@pytest.mark.parametrize("scale", [0.0, 0.9])
def test_ddpm_draws_each_samples_noise_from_its_number(scale: float, sigma: bool) -> None:
    """The whole way, whatever the model."""
    numbers, steps = [5, 2], 10
    found = sampler(sampler="ddpm", steps=steps, sigma=sigma)(
        Stub(scale, sigma=sigma), torch.tensor([1, 2]), numbers, seed=7, purpose="test"
    )
    for number, label, sample in zip(numbers, (1, 2), found, strict=True):
        draws = torch.Generator().manual_seed(torch_seed(7, "test", number))
        x = torch.from_numpy(generator(7, "test", number).standard_normal(SHAPE))
        for place in reversed(range(steps)):
            noise = torch.randn(SHAPE, generator=draws) if place else torch.zeros(SHAPE)
            x = ddpm_step(place, steps, x, scale * x + 0.01 * label, noise, x.sin() if sigma else None)
        torch.testing.assert_close(sample.double(), x, rtol=1e-3, atol=1e-3 * x.abs().max().item())


# Numbers


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_samples_do_not_depend_on_their_company(name: str) -> None:
    make, labels = sampler(sampler=name), torch.arange(6)
    whole = make(Stub(), labels, range(6), seed=1)
    one_by_one = torch.cat([make(Stub(), labels[i : i + 1], [i], seed=1) for i in range(6)])
    backwards = make(Stub(), labels.flip(0), range(5, -1, -1), seed=1).flip(0)
    assert torch.equal(whole, one_by_one)
    assert torch.equal(whole, backwards)
    assert len({tuple(x.flatten().tolist()) for x in whole}) == 6


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_models_start_from_the_same_noise(name: str) -> None:
    stubs = Stub(0.1), Stub(0.7)
    for stub in stubs:
        sampler(sampler=name)(stub, torch.tensor([1, 2]), [0, 1], seed=3)
    assert torch.equal(stubs[0].seen[0][0], stubs[1].seen[0][0])
    assert not torch.equal(stubs[0].seen[1][0], stubs[1].seen[1][0])


def test_noise_belongs_to_seed_and_purpose_and_nothing_else_is_drawn() -> None:
    stub, state = Stub(), torch.get_rng_state()
    for seed, purpose in ((0, "a"), (0, "a"), (1, "a"), (0, "b")):
        sampler(sampler="ddpm", steps=2)(stub, torch.tensor([1]), [0], seed=seed, purpose=purpose)
    first, again, other_seed, other_purpose = (x for x, _, _ in stub.seen[::2])
    assert torch.equal(first, again)
    assert not torch.equal(first, other_seed)
    assert not torch.equal(first, other_purpose)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_sampling_a_transformer_needs_no_gradient(name: str) -> None:
    model, make = dit(), sampler(sampler=name, shape=(1, 8, 8), guidance=2.0, clip=True)
    labels = torch.tensor([1, 2, 3])
    found = make(model, labels, [0, 1, 2])
    assert found.shape == (3, 1, 8, 8)
    assert found.isfinite().all()
    assert not found.requires_grad


class Wide(nn.Module):
    """A model that computes in float64, where what products of another batch size round otherwise is rounded away."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.double()

    def forward(self, inputs: Tensor, **how: Any) -> Any:
        return self.model(inputs.double(), **how)


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_a_sample_does_not_depend_on_the_others(name: str) -> None:
    model, make = Wide(dit()), sampler(sampler=name, shape=(1, 8, 8), guidance=2.0, clip=True)
    labels = torch.tensor([1, 2, 3])
    alone = torch.cat([make(model, labels[i : i + 1], [i]) for i in range(3)])
    torch.testing.assert_close(alone, make(model, labels, [0, 1, 2]))


@pytest.mark.parametrize(("name", "steps"), [("ddim", 5), ("ddim", 50), ("ddpm", 10)])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_who_knows_the_image_gets_it_back(name: str, steps: int, guidance: float) -> None:
    clean = torch.rand(11, *SHAPE, dtype=torch.float64) * 2 - 1
    clean[10] = clean[4]  # without a label, too
    oracle = Oracle(clean)
    found = sampler(sampler=name, steps=steps, guidance=guidance)(oracle, torch.tensor([4, 4, 4]), [7, 8, 9])
    torch.testing.assert_close(found.double(), clean[[4, 4, 4]], rtol=0, atol=2e-3)
    assert len(oracle.asked) == steps


def test_clipping_is_for_the_predicted_image() -> None:
    found = {clip: sampler(clip=clip)(Stub(-3.0), torch.tensor([0]), [0]) for clip in (True, False)}
    assert found[True].abs().max() <= 1
    assert found[False].abs().max() > 1.5


# Guidance


def denoise(inputs: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
    """Four channels of ε, four of the variance."""
    condition = (1 + labels).view(-1, 1, 1, 1) * (1 + timesteps).view(-1, 1, 1, 1)
    return torch.cat([inputs * condition, inputs.cos() * condition], 1)


def test_no_guidance_is_a_plain_call() -> None:
    assert guided(denoise, settings(guidance=1.0, guided_channels=3), 10) is denoise
    stub = Stub()
    sampler()(stub, torch.tensor([1, 2]), [0, 1])
    assert [labels.tolist() for _, _, labels in stub.seen] == [[1, 2]] * 5


@pytest.mark.parametrize("weight", [1.5, 4.0])
@pytest.mark.parametrize("channels", [None, 1, 3, 4])
def test_guidance_is_the_formula_and_the_rest_is_the_labels(weight: float, channels: int | None) -> None:
    x, times, labels = torch.randn(2, 4, 3, 3), torch.tensor([3, 3]), torch.tensor([1, 2])
    found = guided(denoise, settings(guidance=weight, guided_channels=channels), 10)(x, times, labels)
    with_label, without = (denoise(x.double(), times, y) for y in (labels, torch.tensor([10, 10])))
    guided_channels = channels or 4
    assert found.shape == (2, 8, 3, 3)
    wanted = (without + weight * (with_label - without))[:, :guided_channels]
    torch.testing.assert_close(found[:, :guided_channels].double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[:, guided_channels:].double(), with_label[:, guided_channels:])
