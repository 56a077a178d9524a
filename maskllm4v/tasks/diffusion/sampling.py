"""The reverse process: images from noise, by DDPM or DDIM, with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from maskllm4v.tasks.diffusion.noising import normal
from maskllm4v.tasks.diffusion.settings import SamplingSettings
from maskllm4v.utils.errors import ConfigError
from maskllm4v.utils.progress import bar
from maskllm4v.utils.rng import generator, torch_seed

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]  # x_t, timesteps, labels -> the model's outputs


def make_scheduler(settings: SamplingSettings, noise: dict[str, Any], *, learned_sigma: bool) -> Any:
    """Diffusers' scheduler, its timesteps set.

    DDPM goes through evenly spaced timesteps from the last to 0, both included: with 250 of 1,000 exactly those of
    DiT's authors. Models that also give out their variance use it, as a share between β_t and β̃_t in the log
    domain (Nichol & Dhariwal 2021, Eq. 15); for the others it is β̃_t. DDIM (Song et al. 2021) adds no noise; it goes
    in equal strides from the last timestep, where there is nothing but noise (Lin et al. 2024, Tab. 2, "trailing").

    Args:
        settings: sampler and steps.
        noise: of :func:`maskllm4v.tasks.diffusion.noising.schedule_config`.
        learned_sigma: whether the model gives out its variance.

    Raises:
        ConfigError: more steps than the schedule has timesteps, or DDIM would have no equal strides.
    """
    steps, most = settings.steps, noise["num_train_timesteps"]
    if steps > most:
        raise ConfigError(f"sampling in {steps} steps, but the noise schedule has {most} timesteps")
    if settings.sampler == "ddim" and most % steps:
        raise ConfigError(f"sampling in {steps} steps by DDIM, which does not divide the schedule's {most} timesteps")
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    if settings.sampler == "ddim":
        scheduler = DDIMScheduler(
            **noise, clip_sample=settings.clip, set_alpha_to_one=True, timestep_spacing="trailing"
        )
    else:
        variance = "learned_range" if learned_sigma else "fixed_small"
        scheduler = DDPMScheduler(
            **noise, clip_sample=settings.clip, variance_type=variance, timestep_spacing="linspace"
        )
    scheduler.set_timesteps(steps)
    return scheduler


def guided(denoise: Denoise, settings: SamplingSettings, no_label: int) -> Denoise:
    """The model with classifier-free guidance: ε = ε(∅) + w·(ε(y) − ε(∅)), its other outputs those of y.

    With ``guided_channels`` only the first channels of ε are guided; DiT's authors guide three of four.
    """
    if settings.guidance == 1:
        return denoise

    def guide(inputs: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        channels = settings.guided_channels or inputs.shape[1]
        nothing = torch.full_like(labels, no_label)
        both = denoise(torch.cat([inputs, inputs]), torch.cat([timesteps, timesteps]), torch.cat([labels, nothing]))
        with_label, without = both.chunk(2)
        epsilon, none = with_label[:, :channels], without[:, :channels]
        return torch.cat([none + settings.guidance * (epsilon - none), with_label[:, channels:]], 1)

    return guide


@dataclass(frozen=True)
class Sampler:
    """Makes samples with any model of one kind.

    All noise of a sample is a function of (seed, purpose, its number): the same for every model, however many
    samples are made at once, and on every device.

    Attributes:
        settings: sampler, steps, guidance.
        noise: the noise schedule, of :func:`maskllm4v.tasks.diffusion.noising.schedule_config`.
        shape: of a sample, ``(C, H, W)``.
        no_label: the label that stands for none.
        learned_sigma: whether the models give out their variance, too: 2·C channels.
    """

    settings: SamplingSettings
    noise: dict[str, Any]
    shape: tuple[int, int, int]
    no_label: int
    learned_sigma: bool

    @torch.no_grad()
    def __call__(
        self,
        model: nn.Module,
        labels: Tensor,
        numbers: Sequence[int],
        *,
        seed: int = 0,
        purpose: str = "sample",
        text: str = "sampling",
    ) -> Tensor:
        """Samples ``[B, C, H, W]``.

        Args:
            model: a DiT in evaluation mode.
            labels: int64 ``[B]``, on the model's device.
            numbers: of the samples.
            seed, purpose: of the noise.
            text: of the progress bar.
        """

        def denoise(inputs: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
            outputs: Tensor = model(inputs, timestep=timesteps, class_labels=labels, return_dict=False)[0]
            return outputs.float()

        device, channels = labels.device, self.shape[0]
        first = [torch.from_numpy(normal(generator(seed, purpose, number), *self.shape)) for number in numbers]
        later = [torch.Generator().manual_seed(torch_seed(seed, purpose, number)) for number in numbers]
        images = torch.stack(first).to(device)
        guide = guided(denoise, self.settings, self.no_label)
        scheduler = make_scheduler(self.settings, self.noise, learned_sigma=self.learned_sigma)
        ddim = self.settings.sampler == "ddim"
        for timestep in bar(scheduler.timesteps.tolist(), text):
            outputs = guide(images, torch.full_like(labels, timestep), labels)
            outputs = outputs[:, :channels] if ddim else outputs  # DDIM has no use for the variance
            images = scheduler.step(outputs, timestep, images, generator=None if ddim else later, return_dict=False)[0]
        return images
