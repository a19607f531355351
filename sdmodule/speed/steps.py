"""Which steps are guided, and which run the whole UNet: planned before the first step, independent of the images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from sdmodule.speed.speed_settings import SpeedSettings


class StepPlan(NamedTuple):
    """What one step does.

    Attributes:
        guided: also run the UNet on the negative prompt.
        fresh: run the whole UNet; otherwise its cached deep features are used.
    """

    guided: bool
    fresh: bool


def plan_steps(timesteps: Iterable[float], total: int, settings: SpeedSettings, guided: bool) -> list[StepPlan]:
    """Plan every step.

    Args:
        timesteps: timesteps of the steps, from noise to image.
        total: number of timesteps that the model was trained with.
        settings: guidance interval and DeepCache interval.
        guided: whether this batch is guided at all.
    """
    low, high = settings.guidance_interval
    plans: list[StepPlan] = []
    age = 0  # steps since the whole UNet ran
    for timestep in timesteps:
        # schedules of continuous time have timesteps that are negative, or above the model's
        is_guided = guided and low <= min(max(float(timestep) / total, 0.0), 1.0) <= high
        # a step without guidance caches no features of the negative prompt
        no_negative = is_guided and bool(plans) and not plans[-1].guided
        fresh = not plans or age >= settings.cache_every or no_negative
        age = 1 if fresh else age + 1
        plans.append(StepPlan(is_guided, fresh))
    return plans
