"""Row 40: the scales of adapters can be changed while a model is in use."""

from __future__ import annotations

import pytest
import torch

from sdmodule.components.checkpoint import load_components
from sdmodule.errors import SettingsError
from sdmodule.module import StableDiffusionModule
from tests.reported.test_07_adapter_layouts import CONV, LYCORIS, SQUARE, WIDE, Drawn, lycoris

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files(checkpoint, tmp_path_factory):
    """Paths of an adapter of each method, two LoRAs among them, and of a learned word."""
    from safetensors.torch import save_file

    folder, drawn = tmp_path_factory.mktemp("adapters"), Drawn(load_components(str(checkpoint)))
    paths = {}
    for name in ("lora", "other lora", "dora", "loha", "lokr"):
        kind, settings = LYCORIS[name.removeprefix("other ")]
        tensors = {}
        for layer in (SQUARE, WIDE, CONV):
            tensors |= lycoris(kind, drawn, layer, 2.0, **settings)[0]
        paths[name] = str(folder / f"{name}.safetensors")
        save_file({key: value.clone().contiguous() for key, value in tensors.items()}, paths[name])
    paths["word"] = str(folder / "word.safetensors")
    save_file({"<thing>": drawn.random(2, 32)}, paths["word"])
    return paths


def loaded(checkpoint, files, *chosen: tuple[str, float], merge: bool = False) -> StableDiffusionModule:
    adapters = [{"path": files[name], "scale": scale} for name, scale in chosen]
    return StableDiffusionModule.from_pretrained(str(checkpoint), adapters={"files": adapters, "merge": merge})


def sampled(module: StableDiffusionModule) -> torch.Tensor:
    options = {"num_inference_steps": 2, "seed": 3, "return_type": "tensor", "show_progress": False}
    return module.infer("a red <thing>", **options)["samples"]


@pytest.mark.parametrize("scales", [(0.3, -1.0), (0.0, 0.7), (1, 0), (0, 0)])
def test_images_are_those_of_a_model_loaded_with_these_scales(checkpoint, files, scales):
    module = loaded(checkpoint, files, ("lora", 0.8), ("word", 1.0), ("other lora", 0.5))
    before = sampled(module)
    module.set_adapters([scales[0], 1, scales[1]])
    again = loaded(checkpoint, files, ("lora", scales[0]), ("word", 1.0), ("other lora", scales[1]))
    torch.testing.assert_close(sampled(module), sampled(again), rtol=0, atol=1e-6)
    described = [one["scale"] for one in module.describe()["adapters"]]
    assert described == [scales[0], 1, scales[1]] and module.describe() == again.describe()
    module.set_adapters([0.8, 1, 0.5])
    assert torch.equal(sampled(module), before)


@pytest.mark.parametrize("name", ["loha", "dora"])
def test_every_method_is_turned_off_and_on(checkpoint, files, name):
    module = loaded(checkpoint, files, (name, 1.0))
    before = sampled(module)
    module.set_adapters([0])
    assert torch.equal(sampled(module), sampled(loaded(checkpoint, files)))
    module.set_adapters([1])
    assert torch.equal(sampled(module), before)


@pytest.mark.parametrize(
    ("chosen", "merge", "scales", "words"),
    [
        (["lora"], False, [1.0, 1.0], "1 adapters are loaded; give a list of one scale for each"),
        (["lora"], False, "1", "give a list"),
        (["lora"], False, ["strong"], "adapters.scale=strong"),
        (["lora"], False, [float("nan")], "adapters.scale=nan"),
        (["lora"], True, [0.5], "part of the weights, so its scale stays 1.0"),
        (["lora", "loha"], False, [0.5, 1.0], "part of the weights"),
        (["lokr"], False, [0], "part of the weights"),  # its matrices have other sides than peft's
        (["word"], False, [0.5], "learned word"),
        (["dora"], False, [0.5], "switched between 0 and 1"),
    ],
)
def test_what_cannot_be_changed_is_said_and_nothing_is(checkpoint, files, chosen, merge, scales, words):
    module = loaded(checkpoint, files, *((name, 1.0) for name in chosen), merge=merge)
    before, said = sampled(module), module.describe()
    with pytest.raises(SettingsError, match=r"set_adapters|adapters\.scale") as error:
        module.set_adapters(scales)
    assert words in str(error.value)
    assert torch.equal(sampled(module), before) and module.describe() == said
