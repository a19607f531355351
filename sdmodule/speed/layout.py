"""The channels_last memory format, through every layer of UNet and VAE."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel, Transformer2DModelOutput
from torch import Tensor, nn
from typing_extensions import override

from sdmodule.speed.swap_class import swap_class


@contextmanager
def channels_last(*modules: nn.Module) -> Iterator[None]:
    """Keep the weights of modules in channels_last inside a ``with`` block.

    Convolutions then return their result in that format too, so that no layer converts.
    """
    weights = [weight for module in modules for weight in module.parameters() if weight.ndim == 4]
    before = [weight.is_contiguous() for weight in weights]
    try:
        for weight in weights:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        with tokens_in_place(*modules):
            yield
    finally:
        for weight, contiguous in zip(weights, before, strict=True):
            if contiguous:
                weight.data = weight.data.contiguous()


def is_channels_last(module: nn.Module) -> bool:
    """Whether a module's convolutions have channels_last weights; 1x1 ones, which are in both, do not count."""
    weights = [weight for weight in module.parameters() if weight.ndim == 4 and weight.shape[2:].numel() > 1]
    return bool(weights) and all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


@contextmanager
def tokens_in_place(*modules: nn.Module) -> Iterator[None]:
    """Let the transformers of modules return channels_last results inside a ``with`` block."""
    every = (layer for module in modules for layer in module.modules())
    with swap_class(TokensInPlace, [layer for layer in every if type(layer) is Transformer2DModel]):
        yield


class TokensInPlace(Transformer2DModel):
    """A ``Transformer2DModel`` whose result is channels_last, as its tokens are; assigned through ``__class__``.

    That of diffusers returns a contiguous result, and the layers after it keep that format: from the first transformer
    on, no convolution would get channels_last images.
    """

    @override
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        **options: Any,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Run the blocks on an image ``[B, C, h, w]``; ``options`` go to the blocks."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:  # diffusers' forward wraps each block
            context = (encoder_hidden_states, timestep, added_cond_kwargs, class_labels)
            return super().forward(hidden_states, *context, return_dict=return_dict, **options)
        height = hidden_states.shape[2]
        tokens = self.norm(hidden_states)
        tokens = self.proj_in(_tokens(tokens)) if self.use_linear_projection else _tokens(self.proj_in(tokens))
        for block in self.transformer_blocks:
            tokens = block(
                tokens,
                encoder_hidden_states=encoder_hidden_states,
                timestep=timestep,
                class_labels=class_labels,
                **options,
            )
        if self.use_linear_projection:
            image = _image(self.proj_out(tokens), height)
        else:
            image = self.proj_out(_image(tokens, height))
        image = image + hidden_states
        return Transformer2DModelOutput(sample=image) if return_dict else (image,)


def _tokens(image: Tensor) -> Tensor:
    """``[B, C, h, w]`` to ``[B, h * w, C]``; a view of a channels_last image."""
    return image.permute(0, 2, 3, 1).flatten(1, 2)


def _image(tokens: Tensor, height: int) -> Tensor:
    """``[B, h * w, C]`` to ``[B, C, h, w]``, a view."""
    return tokens.unflatten(1, (height, -1)).permute(0, 3, 1, 2)
