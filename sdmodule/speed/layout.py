"""The layout in memory that convolutions are fastest in."""

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
    """Keep the weights of modules with their channels innermost, and put them back afterwards.

    A convolution then gives its result in that layout too, so that no layer converts.
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
    """Whether the weights of a module's convolutions have their channels innermost, those of 1x1 apart, which may."""
    weights = [weight for weight in module.parameters() if weight.ndim == 4 and weight.shape[2:].numel() > 1]
    return bool(weights) and all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


@contextmanager
def tokens_in_place(*modules: nn.Module) -> Iterator[None]:
    """Let the transformers of modules leave their results as their tokens lie, inside a ``with`` block."""
    every = (part for module in modules for part in module.modules())
    with swap_class(TokensInPlace, [part for part in every if type(part) is Transformer2DModel]):
        yield


class TokensInPlace(Transformer2DModel):
    """A ``Transformer2DModel`` that leaves its result as its tokens lie; one becomes it, and ceases, by ``__class__``.

    Tokens have their channels innermost. That of diffusers turns them outermost at its end, and what is added to its
    result stays so: from the first transformer on no layer would find the layout that it is fastest in.
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
        """Run the blocks on an image ``[B, C, h, w]``; ``options`` are the blocks' own."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:  # which needs more than the blocks
            given = (encoder_hidden_states, timestep, added_cond_kwargs, class_labels)
            return super().forward(hidden_states, *given, return_dict=return_dict, **options)
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
    """``[B, C, h, w]`` to ``[B, h * w, C]``, of the same memory where channels are innermost."""
    return image.permute(0, 2, 3, 1).flatten(1, 2)


def _image(tokens: Tensor, height: int) -> Tensor:
    """``[B, h * w, C]`` to ``[B, C, h, w]``, of the same memory."""
    return tokens.unflatten(1, (height, -1)).permute(0, 3, 1, 2)
