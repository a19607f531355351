"""Which steps are guided, and which run the whole UNet: settled before the first, whatever the images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from sdmodule.speed.settings import SpeedSettings


class StepPlan(NamedTuple):
    """What is done at one step.

    Attributes:
        guided: ask the UNet for the negative prompt too.
        fresh: run all of the UNet; otherwise its deep layers' last result serves.
    """

    guided: bool
    fresh: bool


def plan_steps(timesteps: Iterable[float], total: int, settings: SpeedSettings, guided: bool) -> list[StepPlan]:
    """Settle what each step does.

    Args:
        timesteps: of the steps, from noise to image.
        total: timesteps of the schedule that the model was trained with.
        settings: the interval of guidance, and how often the whole UNet is run.
        guided: whether anything is guided at all.
    """
    low, high = settings.guidance_interval
    plans: list[StepPlan] = []
    since = 0  # steps since the deep layers were run
    for timestep in timesteps:
        asks_twice = guided and low <= float(timestep) / total <= high
        # a step without guidance leaves nothing for the negative prompt's half of the next
        lacking = asks_twice and bool(plans) and not plans[-1].guided
        fresh = not plans or since >= settings.cache_every or lacking
        since = 1 if fresh else since + 1
        plans.append(StepPlan(asks_twice, fresh))
    return plans
