"""Noised inputs against the closed form in float64, and what is drawn for them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("diffusers")

from diffusers import DDIMScheduler, DDPMScheduler
from small_diffusion import LINEAR, alphas

from maskllm4v.tasks.diffusion.noising import alphas_cumprod, draw, noised, normal, schedule_config, stratified
from maskllm4v.tasks.diffusion.settings import DiffusionSettings
from maskllm4v.utils.errors import ConfigError, UserError
from maskllm4v.utils.rng import generator


def settings(**values: Any) -> DiffusionSettings:
    return DiffusionSettings(name="diffusion", **values)


# The forward process


def scaled_linear() -> np.ndarray:
    return np.linspace(1e-4**0.5, 0.02**0.5, 1000) ** 2


def squared_cosine() -> np.ndarray:
    """Nichol & Dhariwal 2021, Eq. 17."""
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - f[1:] / f[:-1], 0.999)


@pytest.mark.parametrize(
    ("name", "betas"),
    [
        ("linear", np.linspace(1e-4, 0.02, 1000)),
        ("scaled_linear", scaled_linear()),
        ("squaredcos_cap_v2", squared_cosine()),
    ],
)
def test_signal_left_at_each_timestep(name: Any, betas: np.ndarray) -> None:
    found = alphas_cumprod(schedule_config(settings(beta_schedule=name)))
    assert found.shape == (1000,)
    np.testing.assert_allclose(found.double().numpy(), np.cumprod(1 - betas), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("timestep", [0, 1, 499, 998, 999])
def test_noised_inputs_are_the_closed_form(timestep: int) -> None:
    clean, noise = torch.randn(2, 3, 2, 4, 4).unbind()
    found = noised(clean, noise, torch.tensor([timestep, 7, timestep]), alphas_cumprod(LINEAR))
    for i, t in enumerate((timestep, 7, timestep)):
        alpha = alphas()[t]
        wanted = alpha**0.5 * clean[i].double() + (1 - alpha) ** 0.5 * noise[i].double()
        torch.testing.assert_close(found[i].double(), wanted, rtol=1e-4, atol=1e-5)


# Draws


def test_draws_are_uniform_normal_and_hide_some_labels() -> None:
    found = draw(generator(0, "test"), 20_000, (1, 2, 2), 50, 0.1)
    counts = np.bincount(found.timesteps, minlength=50)
    assert 300 < counts.min() < counts.max() < 500
    assert found.dropped.mean() == pytest.approx(0.1, abs=0.01)
    for noise in (found.noise, found.encoder):
        assert noise.shape == (20_000, 1, 2, 2)
        assert noise.dtype == np.float32
        assert noise.mean() == pytest.approx(0, abs=0.02)
        assert noise.std() == pytest.approx(1, abs=0.02)
    assert abs(np.corrcoef(found.noise.ravel(), found.encoder.ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(found.timesteps, found.dropped)[0, 1]) < 0.03


def test_noise_is_drawn_in_float64_and_rounded() -> None:
    found = normal(generator(5, "test"), 3, 40, 2)
    assert (found.shape, found.dtype) == ((3, 40, 2), np.float32)
    np.testing.assert_array_equal(found, np.float32(generator(5, "test").standard_normal((3, 40, 2))))
    assert not np.isin(generator(5, "test").standard_normal((3, 40, 2), dtype=np.float32), found).any()


@pytest.mark.parametrize(("share", "hidden"), [(0.0, 0), (1.0, 100)])
def test_no_label_or_all_are_hidden(share: float, hidden: int) -> None:
    assert draw(generator(0, "test"), 100, (1, 1, 1), 10, share).dropped.sum() == hidden


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_of_draws_make_the_whole(parts: int) -> None:
    whole = draw(generator(3, "test"), 8, (2, 3, 3), 1000, 0.5)
    size = 8 // parts
    divided = [draw(generator(3, "test"), 8, (2, 3, 3), 1000, 0.5).part(slice(i * size, (i + 1) * size)) for i in
               range(parts)]  # fmt: skip
    for name in whole._fields:
        np.testing.assert_array_equal(np.concatenate([getattr(part, name) for part in divided]), getattr(whole, name))


@given(count=st.integers(1, 300), steps=st.integers(1, 300), seed=st.integers(0, 9))
def test_strata_have_a_timestep_each(count: int, steps: int, seed: int) -> None:
    found = stratified(generator(seed, "test"), count, steps)
    assert found.shape == (count,)
    assert 0 <= found.min() <= found.max() < steps
    for place, timestep in enumerate(sorted(found.tolist())):  # its stratum, as a range of real numbers, meets it
        assert timestep * count < (place + 1) * steps + 1e-6
        assert (timestep + 1) * count > place * steps - 1e-6


@pytest.mark.parametrize("count", [1, 10, 250, 1000])
def test_strata_of_whole_timesteps_are_hit_once(count: int) -> None:
    found = stratified(generator(0, "test"), count, 1000)
    assert sorted((found // (1000 // count)).tolist()) == list(range(count))


@pytest.mark.parametrize("times", [1, 3])
def test_more_strata_than_timesteps_hit_each_as_often(times: int) -> None:
    found = stratified(generator(0, "test"), 40 * times, 40)
    assert Counter(found.tolist()) == dict.fromkeys(range(40), times)


def test_strata_come_in_random_order() -> None:
    first, again, other = (stratified(generator(seed, "test"), 200, 1000) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert abs(np.corrcoef(first, np.arange(200))[0, 1]) < 0.3


# The schedule's folder


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler])
def test_schedule_is_read_from_a_folder_of_diffusers(kind: Any, tmp_path: Path) -> None:
    own = {"num_train_timesteps": 77, "beta_schedule": "scaled_linear", "beta_start": 0.002, "beta_end": 0.03}
    scheduler = kind(**own)
    scheduler.save_pretrained(tmp_path)
    found = schedule_config(settings(scheduler=str(tmp_path), train_timesteps=5, beta_start=0.01))
    assert found == own
    assert torch.equal(alphas_cumprod(found), scheduler.alphas_cumprod)


def test_settings_stand_in_for_what_a_folder_leaves_out(tmp_path: Path) -> None:
    (tmp_path / "scheduler_config.json").write_text('{"beta_end": 0.05}')
    found = schedule_config(settings(scheduler=str(tmp_path), train_timesteps=30))
    assert found == {**LINEAR, "num_train_timesteps": 30, "beta_end": 0.05}
    assert schedule_config(settings()) == LINEAR


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"prediction_type": "v_prediction"}, "prediction_type is 'v_prediction'; allowed: 'epsilon'"),
        ({"prediction_type": "sample"}, "prediction_type is 'sample'"),
        ({"trained_betas": [0.1, 0.2]}, "lists its betas one by one, which is not supported"),
        ({"rescale_betas_zero_snr": True}, "rescales its betas to zero signal, which is not supported"),
    ],
)
def test_other_schedules_are_refused(changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    DDPMScheduler(**changes).save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as caught:
        schedule_config(settings(scheduler=str(tmp_path)))
    assert str(caught.value).startswith(str(tmp_path))
    assert expected in str(caught.value)


@pytest.mark.parametrize("content", [None, "{", ""])
def test_folder_without_a_schedule(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "scheduler_config.json").write_text(content)
    with pytest.raises(UserError, match=r"scheduler_config\.json"):
        schedule_config(settings(scheduler=str(tmp_path)))
