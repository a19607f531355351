"""Each row of the documentation's table of adapter layouts: who reads it, and whether it is written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor

from sdmodule.components.adapter_file import read_tensors, write_diffusers, write_kohya
from sdmodule.components.checkpoint import Components, load_components
from sdmodule.components.folder_kinds import DIFFUSERS_FILE, KOHYA_FILE
from sdmodule.components.lora_layers import extract_adapter
from sdmodule.components.original_names import unet_layer
from sdmodule.components.peft_layout import write_peft
from sdmodule.errors import SettingsError
from sdmodule.module import StableDiffusionModule

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The following alpha_pattern keys"),  # diffusers' misreading
]

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "interop.md"


def table() -> dict[str, list[str]]:
    """The cells of each row by its layout."""
    text = PAGE.read_text(encoding="utf-8").partition("## Layouts of adapters")[2].partition("\n## ")[0]
    rows = [re.split(r"\s*\|\s*", line.strip("| ")) for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows[1:]}


@dataclass
class Update:
    """A low-rank update of one layer."""

    part: str
    layer: str
    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def change(self) -> Tensor:
        return self.alpha / self.rank * torch.einsum("or,r...->o...", self.up.flatten(1), self.down)

    @property
    def full_name(self) -> str:
        """The layer's name with what transformers 5 leaves out."""
        return self.layer if self.part == "unet" or "text_model." in self.layer else f"text_model.{self.layer}"


ATTENTION = r"transformer_blocks\.0.*\.(to_[qkv]|to_out\.0)$|layers\.0\.\w+\.(q|out)_proj$"
LAYERS = rf"{ATTENTION}|mid_block\.resnets\.0\.conv\d$|downsamplers\.0\.conv$|layers\.0\.\w+\.fc1$"


def updates(parts: Components, layers: str = LAYERS, varied: bool = False) -> list[Update]:
    """Updates of rank 2 and alpha 3, or of several ranks and alphas."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for part in parts.family.adapter_prefixes:
        for layer, module in getattr(parts, part).named_modules():
            if not hasattr(module, "weight") or not re.search(layers, layer):
                continue
            rank, alpha = (2 + len(found) % 3, 1.0 + len(found) % 2) if varied else (2, 3.0)
            weight = module.weight
            down = 0.3 * torch.randn(rank, *weight.shape[1:], generator=generator)
            up = 0.3 * torch.randn(len(weight), rank, *[1] * (weight.ndim - 2), generator=generator)
            found.append(Update(part, layer, down, up, alpha))
    return found


# ---------------------------------------------------------------------------------------------- writers of each layout


def diffusers(parts: Components, own: list[Update], folder: Path) -> Path:
    tensors, header = {}, {}
    for part in {one.part for one in own}:
        header |= {f"{part}.r": 2, f"{part}.lora_alpha": 3.0, f"{part}.target_modules": ["x"]}
        header[f"{part}.alpha_pattern"] = {one.layer: one.alpha for one in own if one.part == part and one.alpha != 3}
        header[f"{part}.rank_pattern"] = {one.layer: one.rank for one in own if one.part == part and one.rank != 2}
        header[f"{part}.target_modules"] = [one.layer for one in own if one.part == part]
    for one in own:
        tensors[f"{one.part}.{one.full_name}.lora_A.weight"] = one.down
        tensors[f"{one.part}.{one.full_name}.lora_B.weight"] = one.up
    return saved(tensors, folder, {"lora_adapter_metadata": json.dumps(header)})


def processors(prefix: str) -> Callable[[Components, list[Update], Path], Path]:
    def write(parts: Components, own: list[Update], folder: Path) -> Path:
        tensors = {}
        for one in own:
            if one.part == "unet":
                attention, _, last = one.layer.removesuffix(".0").rpartition(".")
                name = f"{prefix}{attention}.processor.{last}_lora"
            else:
                name = f"{one.part}.{one.full_name}.lora_linear_layer"
            tensors |= {f"{name}.down.weight": one.down, f"{name}.up.weight": one.up * (one.alpha / one.rank)}
        return saved(tensors, folder)

    return write


def kohya_tensors(parts: Components, own: list[Update], original: bool = False) -> dict[str, Tensor]:
    tensors = {}
    for one in own:
        name = unet_layer(one.layer, parts.unet) if original and one.part == "unet" else one.full_name
        flat = f"{parts.family.adapter_prefixes[one.part][0]}_{name}".replace(".", "_")
        tensors |= {f"{flat}.lora_down.weight": one.down, f"{flat}.lora_up.weight": one.up}
        tensors[f"{flat}.alpha"] = torch.tensor(one.alpha)
    return tensors


def kohya(parts: Components, own: list[Update], folder: Path) -> Path:
    return saved(kohya_tensors(parts, own), folder)


def original(parts: Components, own: list[Update], folder: Path) -> Path:
    return saved(kohya_tensors(parts, own, original=True), folder)


def with_scale(parts: Components, own: list[Update], folder: Path) -> Path:
    tensors = kohya_tensors(parts, own)
    for one, key in zip(own, [key for key in tensors if key.endswith(".alpha")], strict=True):
        del tensors[key]
        tensors[key.replace(".alpha", ".scale")] = torch.tensor(one.alpha / one.rank)
    return saved(tensors, folder)


def differences(parts: Components, own: list[Update], folder: Path) -> Path:
    tensors = {}
    for one in own:
        flat = f"{parts.family.adapter_prefixes[one.part][0]}_{one.full_name}".replace(".", "_")
        tensors[f"{flat}.diff"] = one.change
    return saved(tensors, folder)


def adapted(parts: Components, own: list[Update]) -> tuple[Components, dict[str, PeftModel]]:
    """A fresh copy with the updates as layers of peft, and its networks as models of peft."""
    fresh, models = load_components(parts.source), {}
    for part in parts.family.adapter_prefixes:
        layers = {one.layer: one for one in own if one.part == part}
        ranks = {re.escape(layer): one.rank for layer, one in layers.items()}
        alphas = {re.escape(layer): one.alpha for layer, one in layers.items()}
        config = LoraConfig(r=2, lora_alpha=3, target_modules=list(layers), rank_pattern=ranks, alpha_pattern=alphas)
        models[part] = get_peft_model(getattr(fresh, part), config)
        for layer, one in layers.items():
            module = getattr(fresh, part).get_submodule(layer)
            module.lora_A["default"].weight.data, module.lora_B["default"].weight.data = one.down, one.up
    return fresh, models


def peft(parts: Components, own: list[Update], folder: Path) -> Path:
    """Written by peft itself."""
    for part, model in adapted(parts, own)[1].items():
        model.save_pretrained(str(folder / part))
    return folder


def saved(tensors: dict[str, Tensor], folder: Path, header: dict[str, str] | None = None) -> Path:
    file = folder / "adapter.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, file, metadata=header)
    return file


ROWS = {
    "diffusers from 0.21": (diffusers, {}),
    "diffusers 0.17 to 0.21": (processors("unet."), {"layers": ATTENTION}),
    "diffusers 0.14 to 0.16": (processors(""), {"layers": ATTENTION}),
    "kohya's scripts, LyCORIS": (kohya, {}),
    "the same, original names": (original, {}),
    "the same, ranks and alphas by layer": (kohya, {"varied": True}),
    "the same, a scale instead of alpha": (with_scale, {}),
    "the same, whole differences": (differences, {}),
    "peft": (peft, {"varied": True}),
}


@pytest.fixture(scope="module", params=["checkpoint", "xl_checkpoint"])
def base(request) -> Components:
    return load_components(str(request.getfixturevalue(request.param)))


def read_here(parts: Components, path: Path) -> Components:
    return StableDiffusionModule.from_pretrained(parts.source, adapters={"files": [str(path)], "merge": True}).parts


def read_by_diffusers(parts: Components, path: Path) -> Any:
    kind = StableDiffusionXLPipeline if parts.tokenizer_2 else StableDiffusionPipeline
    pipeline = kind.from_pretrained(parts.source)
    pipeline.load_lora_weights(path)
    pipeline.fuse_lora()
    return pipeline


def assert_updated(found: Any, base: Components, own: list[Update]) -> None:
    """All layers have their updates."""
    for one in own:
        module = getattr(found, one.part).get_submodule(one.layer)
        expected = getattr(base, one.part).get_submodule(one.layer).weight + one.change
        torch.testing.assert_close(getattr(module, "base_layer", module).weight, expected, rtol=1e-4, atol=1e-5)


def test_the_table_has_these_rows():
    assert list(table()) == list(ROWS)


@pytest.mark.parametrize("layout", ROWS)
def test_a_layout_is_read_as_the_table_says(base, layout, tmp_path):
    write, settings = ROWS[layout]
    own = updates(base, **settings)
    assert {one.part for one in own} == set(base.family.adapter_prefixes)
    path = write(base, own, tmp_path)
    assert_updated(read_here(base, path), base, own)
    by_diffusers = table()[layout][1]
    if by_diffusers == "yes" or (by_diffusers == "for XL" and base.tokenizer_2):
        assert_updated(read_by_diffusers(base, path), base, own)
        return
    with pytest.raises((ValueError, OSError, AssertionError)):  # refused, or the weights are others
        assert_updated(read_by_diffusers(base, path), base, own)


def test_what_is_written_is_what_the_table_says(base, tmp_path):
    own = updates(base)
    adapter = extract_adapter(adapted(base, own)[0], "lora")
    write_diffusers(adapter, tmp_path, "float32")
    write_kohya(adapter, tmp_path, "float32", base)
    write_peft(adapter, tmp_path / "peft", "float32")
    header = read_tensors(tmp_path / KOHYA_FILE)[1]
    assert (
        header["modelspec.architecture"]
        == {
            "Stable Diffusion XL": "stable-diffusion-xl-v1-base/lora",
            "Stable Diffusion 1.x and 2.x": "stable-diffusion-v1/lora",
        }[base.family.title]
    )
    written = ("yes", "for XL" if base.tokenizer_2 else "but for XL")
    kohyas = "the same, original names" if base.tokenizer_2 else "kohya's scripts, LyCORIS"
    assert any("input_blocks" in key for key in read_tensors(tmp_path / KOHYA_FILE)[0]) == bool(base.tokenizer_2)
    rows = {"diffusers from 0.21": DIFFUSERS_FILE, kohyas: KOHYA_FILE, "peft": "peft"}
    assert set(rows) == {layout for layout, cells in table().items() if cells[2] in written}
    for layout, name in rows.items():
        assert_updated(read_here(base, tmp_path / name), base, own)
        if layout != "peft":
            assert_updated(read_by_diffusers(base, tmp_path / name), base, own)
            continue
        fresh = load_components(base.source)
        for part in base.family.adapter_prefixes:
            PeftModel.from_pretrained(getattr(fresh, part), tmp_path / name / part).merge_adapter()
        assert_updated(fresh, base, own)


def test_ranks_and_alphas_by_layer_are_written_in_each_layout(base, tmp_path):
    own = updates(base, varied=True)
    adapter = extract_adapter(adapted(base, own)[0], "lora")
    write_diffusers(adapter, tmp_path, "float32")
    write_kohya(adapter, tmp_path, "float32", base)
    write_peft(adapter, tmp_path / "peft", "float32")
    for name in (DIFFUSERS_FILE, KOHYA_FILE, "peft"):
        assert_updated(read_here(base, tmp_path / name), base, own)
    assert_updated(read_by_diffusers(base, tmp_path / DIFFUSERS_FILE), base, own)


@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("dora", LoraConfig(r=2, lora_alpha=3, use_dora=True)),
        ("loha", LoHaConfig(r=2, alpha=3)),
        ("lokr", LoKrConfig(r=2, alpha=3)),
        ("lokr", LoKrConfig(r=512, alpha=128, rank_pattern={".*to_k": 256})),  # two whole matrices, and yet a scale
    ],
)
def test_other_methods_of_peft_round_trip(checkpoint, tmp_path, method, config):
    base = load_components(str(checkpoint))
    fresh = load_components(str(checkpoint))
    config.target_modules = [one.layer for one in updates(base, r"down_blocks\.0.*attn1.to_[qk]$|mid_block.*conv1$")]
    model = get_peft_model(fresh.unet, config)
    generator = torch.Generator().manual_seed(1)
    for key, weight in model.named_parameters():
        if "lora_B" in key or "hada" in key or "lokr" in key:
            weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(str(tmp_path / "theirs"))
    write_peft(extract_adapter(fresh, method), tmp_path / "ours", "float32")
    model.merge_adapter()
    for path in (tmp_path / "theirs" / "adapter_model.safetensors", tmp_path / "ours"):
        found = read_here(base, path)
        for layer in config.target_modules:
            expected = fresh.unet.get_submodule(layer).base_layer.weight
            torch.testing.assert_close(found.unet.get_submodule(layer).weight, expected, rtol=1e-4, atol=1e-5)


def test_bad_folders_of_peft_are_refused_in_one_sentence(checkpoint, tmp_path):
    parts = load_components(str(checkpoint))
    folder = peft(parts, updates(parts), tmp_path) / "unet"
    config, file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    text = config.read_text()
    for content, said in (
        (text.replace("LORA", "OFT"), "is of peft's method OFT; give one of LOHA, LOKR, LORA"),
        ("{", "adapter_config.json cannot be read"),
        (text.replace('"alpha_pattern": {', '"alpha_pattern": {"(a+)+b": 1,'), "alpha_pattern .* is not read"),
    ):
        config.write_text(content)
        with pytest.raises(SettingsError, match=said):
            read_here(parts, tmp_path)
    config.write_text(text)
    shutil.copytree(folder, tmp_path / "other")
    with pytest.raises(SettingsError, match="has several adapters of the unet; give the folder of one"):
        read_here(parts, tmp_path)
    config.unlink()
    with pytest.raises(SettingsError, match=r"adapter_config\.json cannot be read"):
        read_here(parts, file)
    with pytest.raises(SettingsError, match=r"unknown key base_model\..* or of peft with its adapter_config\.json"):
        read_here(parts, file.rename(tmp_path / "renamed.safetensors"))


@pytest.mark.parametrize(
    ("key", "header", "other"),
    [
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", {"ss_base_model_version": "sdxl_base_v1-0"}, "Diffusion XL"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", {}, "Diffusion XL"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", {}, "Diffusion 1.x and 2.x"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", {"modelspec.architecture": "stable-diffusion-v1/lora"}, "1.x"),
    ],
)
def test_an_adapter_of_text_encoders_alone_is_refused_by_its_family(
    checkpoint, xl_checkpoint, tmp_path, key, header, other
):
    tensors = {f"{key}.lora_down.weight": torch.zeros(2, 32), f"{key}.lora_up.weight": torch.zeros(64, 2)}
    file = saved(tensors, tmp_path, header)
    base = load_components(str(checkpoint if "XL" in other else xl_checkpoint))
    with pytest.raises(SettingsError, match=f"is for .*{other}"):
        read_here(base, file)
