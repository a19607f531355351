"""What the commands of the tests have in common, done once in the process that they are forked from.

The shipped files of the configuration are parsed, two commands composed and the embedded model read: half of the time
of a short command. Processes that a test starts in another way do all of it themselves, as a user's do.
"""

from __future__ import annotations

import gc
from contextlib import ExitStack

from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from sdmodule.cli.overrides import quote_overrides
from sdmodule.components.checkpoint import load_components
from sdmodule.components.source import ASSETS
from tests.isolation import fast_composition, networks_read_once, plugins_found_once

FOR_GOOD = ExitStack()
FOR_GOOD.enter_context(fast_composition())
FOR_GOOD.enter_context(plugins_found_once())
FOR_GOOD.enter_context(networks_read_once(only=ASSETS))
with initialize_config_module("sdmodule.conf", version_base="1.3"):
    for command, given in (("predict", ["prompt=a cat"]), ("train", ["data.root=photos", "experiment=lora"])):
        OmegaConf.to_container(compose(command, quote_overrides(given)), resolve=True)
load_components("tiny")
gc.freeze()
