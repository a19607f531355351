"""`Family`: what one family of checkpoints has that no other file may know."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from sdmodule.families.conditioning import Conditioning, ImageSizes


class Family(ABC):
    """What a family of checkpoints consists of, and how its denoiser is called.

    Attributes:
        title: its name in messages.
        pipelines: the pipelines of diffusers with its parts, as ``model_index.json`` names them.
        pipelines_in_words: the same, for messages.
        models: class of each network, by the name of its part.
        text_encoders: part that encodes what each tokenizer gives.
        optional_parts: parts that its pipelines may have and that are not read.
        other_inputs: what the configuration of a network says of inputs beside latents, timestep and text.
        adapter_prefixes: for each part that low-rank adapters change, the prefixes of its layers in kohya's layout.
        original_adapter_names: whether kohya's scripts name the denoiser's layers as the original implementation does.
        adapter_headers: what kohya's scripts call its models in the header of an adapter.
        word_keys: for each text encoder, the key of its vectors in the file of a learned word; empty if the vectors of
            one text encoder are found by the word.
        original_prefixes: of each network's weights in a single file of the original layout.
        original_marks: beginnings of keys that only its single files have.
        original_configs: shipped configuration of a single file, by the UNet's input channels and its width of text.
        velocity_configs: for a shipped configuration, that of a model with the same shapes which predicts the velocity.
        not_a_base: what a single file with such a UNet is, if it cannot sample on its own.
        text_widths: name of the models whose denoiser attends to text of a width.
        guidance_scale: its usual guidance scale.
        pools_text: whether the denoiser takes a pooled embedding of each prompt.
        takes_sizes: whether it is told the sizes of images.
        trained_sizes: heights and widths in pixels that it was trained on, if it is told sizes.
        upcasts_vae: whether a VAE whose configuration says ``force_upcast`` decodes in float32 instead of float16.
        refines: whether it only goes on where another model stopped.
        refinable: whether a refiner can go on after it.
        sharded_blocks: classes of the blocks of its networks that a sharded training gathers one at a time.
    """

    title: ClassVar[str]
    pipelines: ClassVar[re.Pattern[str]]
    pipelines_in_words: ClassVar[str]
    models: ClassVar[Mapping[str, Any]]
    text_encoders: ClassVar[Mapping[str, str]]
    optional_parts: ClassVar[tuple[str, ...]]
    other_inputs: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    adapter_prefixes: ClassVar[Mapping[str, tuple[str, ...]]]
    original_adapter_names: ClassVar[bool] = False
    adapter_headers: ClassVar[re.Pattern[str]]
    word_keys: ClassVar[Mapping[str, str]] = {}
    original_prefixes: ClassVar[Mapping[str, str]]
    original_marks: ClassVar[tuple[str, ...]]
    original_configs: ClassVar[Mapping[tuple[int, int], str]]
    velocity_configs: ClassVar[Mapping[str, str]] = {}
    not_a_base: ClassVar[Mapping[tuple[int, int], str]] = {}
    text_widths: ClassVar[Mapping[int, str]]
    guidance_scale: ClassVar[float]
    pools_text: ClassVar[bool] = False
    takes_sizes: ClassVar[bool] = False
    trained_sizes: ClassVar[frozenset[tuple[int, int]]] = frozenset()
    upcasts_vae: ClassVar[bool] = False
    refines: ClassVar[bool] = False
    refinable: ClassVar[bool] = False
    sharded_blocks: ClassVar[tuple[type, ...]] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts of a checkpoint."""
        return (*self.models, *self.text_encoders, "scheduler")

    def recognizes(self, index: Mapping[str, Any]) -> bool:
        """Whether a checkpoint with this ``model_index.json`` is of the family."""
        return self.pipelines.match(str(index.get("_class_name"))) is not None

    def zeroes_empty_prompts(self, index: Mapping[str, Any]) -> bool:
        """Whether an empty negative prompt has embeddings of zeros, as the index of a checkpoint says."""
        return False

    @abstractmethod
    def pipeline(self, inpainting: bool, zero_empty_prompts: bool) -> dict[str, Any]:
        """The pipeline of diffusers with its settings, as ``model_index.json`` has them."""

    @abstractmethod
    def architecture(self, width: int, inpainting: bool, prediction_type: str) -> tuple[str, str]:
        """Name of an architecture, and address of its first implementation, as Stability AI's modelspec has them.

        Args:
            width: of the text that the denoiser attends to.
            inpainting: whether it takes a mask.
            prediction_type: what it predicts.
        """

    @abstractmethod
    def encode(
        self, text_encoder: Any, tokens: Tensor, attention_mask: Tensor | None, clip_skip: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states ``[B, L, D]`` of tokens ``[B, L]``, and their pooled embedding ``[B, P]`` if it is used.

        ``clip_skip`` more layers than usual are skipped at the end of the text encoder.
        """

    def time_ids(self, sizes: Sequence[ImageSizes]) -> Tensor | None:
        """What the denoiser is told of the sizes of B images, ``[B, 6]`` on the CPU; None where it is told none."""
        return None

    def with_sizes(self, conditioning: Conditioning, sizes: Sequence[ImageSizes]) -> Conditioning:
        """The conditioning of B images with the sizes of each, or as it is where the denoiser takes none."""
        return conditioning.with_time_ids(self.time_ids(sizes))

    def denoiser_arguments(self, conditioning: Conditioning) -> dict[str, Any]:
        """Keyword arguments of the denoiser beside latents and timestep."""
        arguments: dict[str, Any] = {"encoder_hidden_states": conditioning.hidden_states}
        if conditioning.images is not None:
            arguments["added_cond_kwargs"] = {"image_embeds": [conditioning.images]}
        return arguments

    def unused_layers(self, part: str, network: Any) -> list[Any]:
        """Layers of a network that no output depends on which is used: they cannot learn."""
        return []
