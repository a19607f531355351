"""The plan of all steps."""

from __future__ import annotations

import pytest

from sdmodule.speed.speed_settings import SpeedSettings
from sdmodule.speed.steps import plan_steps

TIMESTEPS = [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]


def plans(guided=True, **settings):
    steps = plan_steps(TIMESTEPS, 1000, SpeedSettings(**settings), guided)
    return "".join("G" if s.guided else "-" for s in steps), "".join("F" if s.fresh else "-" for s in steps)


@pytest.mark.parametrize(
    ("settings", "guided", "fresh"),
    [
        ({}, "GGGGGGGGGG", "FFFFFFFFFF"),
        ({"guidance_interval": [0.2, 0.8]}, "--GGGGGG--", "FFFFFFFFFF"),
        ({"cache_every": 3}, "GGGGGGGGGG", "F--F--F--F"),
        ({"guidance_interval": [0, 0.75], "cache_every": 3}, "--GGGGGGGG", "F-F--F--F-"),
        ({"guidance_interval": [0.35, 1], "cache_every": 4}, "GGGGGG----", "F---F---F-"),
    ],
)
def test_guidance_interval_and_cached_steps(settings, guided, fresh):
    assert plans(**settings) == (guided, fresh)


def test_without_guidance_no_step_is_guided():
    assert plans(guided=False, cache_every=2) == ("----------", "F-F-F-F-F-")
