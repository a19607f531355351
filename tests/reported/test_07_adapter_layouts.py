"""Row 7: adapters in every layout and of every method equal the arithmetic of those who wrote them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from safetensors.torch import save_file
from torch import Tensor, nn

from sdmodule.components.checkpoint import load_components
from sdmodule.errors import SettingsError
from sdmodule.module import StableDiffusionModule

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
SQUARE, WIDE, OUT = f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_k", f"{BLOCK}.attn1.to_out.0"
CONV = "mid_block.resnets.0.conv1"
TEXT = "encoder.layers.0.self_attn.q_proj"
RANK = 2


@pytest.fixture(scope="module")
def base(checkpoint):
    """The weights of the checkpoint alone."""
    return load_components(str(checkpoint))


class Drawn:
    """Factors drawn from one seed, and the weights of the model they are for."""

    def __init__(self, base) -> None:
        self.parts = base
        self.generator = torch.Generator().manual_seed(5)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator) * 0.3

    def weight(self, layer: str, part: str = "unet") -> Tensor:
        return getattr(self.parts, part).get_submodule(layer).weight

    def factors(self, layer: str, part: str = "unet", rank: int = RANK) -> tuple[Tensor, Tensor]:
        weight = self.weight(layer, part)
        up = self.random(weight.shape[0], rank, *[1] * (weight.ndim - 2))
        return self.random(rank, *weight.shape[1:]), up

    def product(self, down: Tensor, up: Tensor) -> Tensor:
        return torch.einsum("or,r...->o...", up.flatten(1), down)


@pytest.fixture
def drawn(base):
    return Drawn(base)


def kohya(layer: str, part: str = "unet") -> str:
    return ("lora_unet_" if part == "unet" else "lora_te_text_model_") + layer.replace(".", "_")


def adapted(checkpoint, file: Path, tensors: dict[str, Tensor], header: dict[str, str] | None = None, **settings):
    """The parts of the model with an adapter in its weights."""
    save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, file, metadata=header)
    adapters = {"files": [{"path": str(file), **settings}], "merge": True}
    return StableDiffusionModule.from_pretrained(str(checkpoint), adapters=adapters).parts


def assert_changed(parts, base, wanted: dict[tuple[str, str], Tensor]) -> None:
    """The layers of ``wanted`` have those weights, and all others are as they were."""
    for part in ("unet", "text_encoder"):
        before = dict(getattr(base, part).named_parameters())
        for name, weight in getattr(parts, part).named_parameters():
            expected = wanted.get((part, name.removesuffix(".weight")))
            if expected is None:
                assert torch.equal(weight, before[name]), name
            else:
                assert not torch.allclose(expected, before[name], atol=1e-3)
                torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)


LAYOUTS: dict[str, Callable[[str, str], tuple[str, str]]] = {
    "peft": lambda part, layer: (f"{part}.{layer}.lora_A.weight", f"{part}.{layer}.lora_B.weight"),
    "processors": lambda part, layer: _processor(f"{part}.", part, layer),
    "processors without prefix": lambda part, layer: _processor("", part, layer),
    "kohya": lambda part, layer: _both(kohya(layer, part)),
    "kohya's te1": lambda part, layer: tuple(
        f"{kohya(layer, part).replace('lora_te_', 'lora_te1_')}.lora_{end}.weight" for end in ("down", "up")
    ),
    "original names": lambda part, layer: tuple(
        f"{_original(part, layer)}.lora_{end}.weight" for end in ("down", "up")
    ),
}


def _both(name: str) -> tuple[str, str]:
    return f"{name}.lora_down.weight", f"{name}.lora_up.weight"


def _processor(prefix: str, part: str, layer: str) -> tuple[str, str]:
    if part == "text_encoder":
        return tuple(f"text_encoder.text_model.{layer}.lora_linear_layer.{end}.weight" for end in ("down", "up"))
    folder, _, last = layer.removesuffix(".0").rpartition(".")
    return tuple(f"{prefix}{folder}.processor.{last}_lora.{end}.weight" for end in ("down", "up"))


def _original(part: str, layer: str) -> str:
    if part == "text_encoder":
        return kohya(layer, part)
    for name, original in {
        "down_blocks.0.attentions.0": "input_blocks.1.1",
        "mid_block.resnets.0.conv1": "middle_block.0.in_layers.2",
    }.items():
        layer = layer.replace(name, original)
    return kohya(layer)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_lora_is_read(checkpoint, base, drawn, tmp_path, layout):
    tensors, wanted = {}, {}
    layers = [("unet", SQUARE), ("unet", WIDE), ("unet", OUT), ("text_encoder", TEXT)]
    if layout in ("peft", "kohya", "kohya's te1", "original names"):
        layers.append(("unet", CONV))
    for part, layer in layers:
        down, up = drawn.factors(layer, part)
        tensors |= dict(zip(LAYOUTS[layout](part, layer), (down, up), strict=True))
        wanted[part, layer] = drawn.weight(layer, part) + drawn.product(down, up)
    assert_changed(adapted(checkpoint, tmp_path / "a.safetensors", tensors), base, wanted)


def header(**settings) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in settings.items()})}


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"r": RANK, "lora_alpha": 6, "alpha_pattern": {}}, 3.0),
        ({"r": RANK, "lora_alpha": 6}, 3.0),
        ({"r": RANK, "lora_alpha": 6, "use_rslora": True}, 6 / RANK**0.5),
        ({"lora_alpha": 2, "alpha_pattern": {"attn1.to_q": 8}}, 4.0),
        ({"lora_alpha": 2, "alpha_pattern": {r"down_blocks\.\d+\..*\.to_q": 8}}, 4.0),
        ({"lora_alpha": 2, "alpha_pattern": {"attn2.*": 8, ".*to_(q|k)": 5}}, 2.5),
        ({"lora_alpha": 6, "alpha_pattern": {"to_qq": 8}}, 3.0),
    ],
)
def test_the_header_scales_as_peft_does(checkpoint, base, drawn, tmp_path, settings, scale):
    down, up = drawn.factors(SQUARE)
    tensors = dict(zip(LAYOUTS["peft"]("unet", SQUARE), (down, up), strict=True))
    parts = adapted(checkpoint, tmp_path / "a.safetensors", tensors, header(**settings))
    assert_changed(parts, base, {("unet", SQUARE): drawn.weight(SQUARE) + scale * drawn.product(down, up)})


@pytest.mark.parametrize("pattern", ["(a+)+b", "(.*)*q", "[" * 3, "x" * 500, "(a|aa)+$", "a\u2028"])
def test_an_expression_that_may_take_long_is_refused(checkpoint, drawn, tmp_path, pattern):
    tensors = dict(zip(LAYOUTS["peft"]("unet", SQUARE), drawn.factors(SQUARE), strict=True))
    with pytest.raises(SettingsError, match=r"alpha_pattern .* in the header is not read"):
        adapted(checkpoint, tmp_path / "a.safetensors", tensors, header(lora_alpha=2, alpha_pattern={pattern: 8}))


def lycoris(
    kind, drawn: Drawn, layer: str, alpha: float, dim: int = RANK, **settings
) -> tuple[dict[str, Tensor], Tensor]:
    """The factors that LyCORIS saves for a layer, and the weight that it makes of them."""
    weight = drawn.weight(layer)
    if weight.ndim == 2:
        own = nn.Linear(*reversed(weight.shape), bias=False)
    else:
        own = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], padding=1, bias=False)
    own.weight = nn.Parameter(weight.detach().clone())
    module = kind(kohya(layer), own, lora_dim=dim, alpha=alpha, **settings)
    with torch.no_grad():
        for name, factor in module.named_parameters():
            if "org_" not in name and factor.requires_grad:
                factor += drawn.random(*factor.shape)
    state = {f"{kohya(layer)}.{name}": value for name, value in module.state_dict().items() if "org_" not in name}
    if kind is LoConModule:
        return state, module.get_merged_weight(multiplier=1.0, shape=weight.shape)[0].detach()
    # get_merged_weight of LoHa and LoKr scales twice, unlike the forward pass that they are trained with
    whole = module.org_weight + module.get_weight(weight.shape)
    return state, (module.apply_weight_decompose(whole) if settings.get("weight_decompose") else whole).detach()


LYCORIS = {
    "lora": (LoConModule, {}),
    "lora, tucker": (LoConModule, {"use_tucker": True}),
    "dora": (LoConModule, {"weight_decompose": True, "wd_on_out": True}),
    "dora by inputs": (LoConModule, {"weight_decompose": True, "wd_on_out": False}),
    "loha": (LohaModule, {}),
    "loha, tucker": (LohaModule, {"use_tucker": True}),
    "loha, dora": (LohaModule, {"weight_decompose": True, "wd_on_out": True}),
    "lokr": (LokrModule, {"factor": 4}),
    "lokr, both factored": (LokrModule, {"factor": 4, "decompose_both": True}),
    "lokr, tucker": (LokrModule, {"factor": 4, "use_tucker": True}),
    "lokr, both whole": (LokrModule, {"factor": 4, "dim": 10000}),
    "lokr, dora": (LokrModule, {"factor": 4, "weight_decompose": True, "wd_on_out": True}),
}


@pytest.mark.parametrize("alpha", [1.0, 5.0])
@pytest.mark.parametrize("kind", LYCORIS)
def test_every_method_of_lycoris_is_read(checkpoint, base, drawn, tmp_path, kind, alpha):
    module, settings = LYCORIS[kind]
    layers = [CONV] if "tucker" in kind else [SQUARE, WIDE, CONV]
    tensors, wanted = {}, {}
    for layer in layers:
        state, weight = lycoris(module, drawn, layer, alpha, **settings)
        tensors |= state
        wanted["unet", layer] = weight
    assert_changed(adapted(checkpoint, tmp_path / "a.safetensors", tensors), base, wanted)


def test_whole_differences_are_read(checkpoint, base, drawn, tmp_path):
    tensors, wanted = {}, {}
    for layer in (SQUARE, CONV):
        change = drawn.random(*drawn.weight(layer).shape)
        tensors[f"{kohya(layer)}.diff"] = change
        wanted["unet", layer] = drawn.weight(layer) + change
    bias = drawn.random(drawn.weight(CONV).shape[0])
    tensors[f"{kohya(CONV)}.diff_b"] = bias
    parts = adapted(checkpoint, tmp_path / "a.safetensors", tensors)
    before = base.unet.get_submodule(CONV).bias
    torch.testing.assert_close(parts.unet.get_submodule(CONV).bias, before + bias)
    parts.unet.get_submodule(CONV).bias = before
    assert_changed(parts, base, wanted)


def test_a_bias_of_pefts_is_added(checkpoint, base, drawn, tmp_path):
    """``lora_bias=True``: on a layer that has a bias, and on one that has none."""
    for layer in (OUT, SQUARE):
        down, up = drawn.factors(layer)
        bias = drawn.random(up.shape[0])
        tensors = dict(zip(LAYOUTS["peft"]("unet", layer), (down, up), strict=True))
        tensors[f"unet.{layer}.lora_B.bias"] = bias
        settings = header(r=RANK, lora_alpha=2 * RANK)
        parts = adapted(checkpoint, tmp_path / "a.safetensors", tensors, settings)
        before = base.unet.get_submodule(layer).bias
        found = parts.unet.get_submodule(layer).bias
        torch.testing.assert_close(found, 2 * bias + (0 if before is None else before))


def test_several_methods_in_one_file_are_read(checkpoint, base, drawn, tmp_path):
    first, wanted_first = lycoris(LokrModule, drawn, SQUARE, 1.0, factor=4)
    second, wanted_second = lycoris(LoConModule, drawn, CONV, 1.0)
    parts = adapted(checkpoint, tmp_path / "a.safetensors", first | second)
    assert_changed(parts, base, {("unet", SQUARE): wanted_first, ("unet", CONV): wanted_second})


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("oft_blocks", "unknown key"),
        ("w_norm", "unknown key"),
        ("on_input", "unknown key"),
        ("lora_up.bias", "unknown key"),
    ],
)
def test_what_is_not_known_is_refused_by_name(checkpoint, drawn, tmp_path, key, message):
    tensors = dict(zip(LAYOUTS["kohya"]("unet", SQUARE), drawn.factors(SQUARE), strict=True))
    with pytest.raises(SettingsError, match=f"{message} .*{key}"):
        adapted(checkpoint, tmp_path / "a.safetensors", tensors | {f"{kohya(SQUARE)}.{key}": torch.ones(2)})


def test_a_part_of_another_family_is_refused_by_name(checkpoint, tmp_path):
    tensors = {
        f"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_{end}.weight": torch.ones(2, 2) for end in ("down", "up")
    }
    with pytest.raises(SettingsError, match="lora_te2_"):
        adapted(checkpoint, tmp_path / "a.safetensors", tensors)
