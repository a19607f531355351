"""Text embeddings equal those of diffusers, and no word of a long prompt is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdmodule.conditioning.prompt_syntax import escape_prompt, parse_weights
from sdmodule.conditioning.text import TokenChunks, apply_prompt_weights, count_chunks, encode_prompts, tokenize
from sdmodule.errors import SettingsError

WIDTH = 32
ORDINARY = [
    "",
    "a photo of a cat, sitting (on a mat)",
    "50% off = {fun}",
    "naïve café 東京 🐈 at 10:30  \n wow!!! it's [ok]",
    "C:\\cats (cat:abc) :) :(",
]
LONG = " ".join(f"cat{index}" for index in range(70))  # 200 tokens: each cat, and each digit
SPLIT_AT_A_COMMA = " ".join(["cat"] * 65) + ", " + " ".join(["a"] * 30)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of a byte-level tokenizer that knows one word, cat."""
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "ca", "cat</w>", "cat"]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\nca t\n")
    return folder


@pytest.fixture(scope="module", params=["<|endoftext|>", "!"], ids=["sd1", "sd2"])
def tokenizer(request: pytest.FixtureRequest, vocabulary: Path) -> CLIPTokenizer:
    """A tokenizer that pads as Stable Diffusion 1 and 2 do."""
    return CLIPTokenizer.from_pretrained(vocabulary, model_max_length=77, pad_token=request.param)


def tiny_text_encoder(tokenizer: CLIPTokenizer, **config: bool) -> CLIPTextModel:
    """A text encoder whose hidden states have a nonzero mean, as a trained one's have."""
    torch.manual_seed(0)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **config,
        )
    ).eval()
    torch.nn.init.normal_(text_encoder.get_parameter(final_norm_bias(text_encoder)), mean=0.5)
    return text_encoder


def final_norm_bias(text_encoder: CLIPTextModel) -> str:
    """The name of the last LayerNorm's bias, which has a prefix in some versions of transformers."""
    return next(name for name, _ in text_encoder.named_parameters() if name.endswith("final_layer_norm.bias"))


@pytest.fixture
def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The tiny text encoder attending to padding, as Stable Diffusion's do."""
    return tiny_text_encoder(tokenizer)


def reference(prompts: list[str], tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> torch.Tensor:
    """Embeddings from diffusers, ``[B, 77, D]``."""
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            block_out_channels=(8,),
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            norm_num_groups=4,
            attention_head_dim=4,
            cross_attention_dim=WIDTH,
        ),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipeline.encode_prompt(prompts, torch.device("cpu"), 1, False)[0]


def words(tokens: TokenChunks, row: int) -> list[int]:
    """The ids of one prompt without start, end and padding tokens."""
    chunks = zip(tokens.input_ids[row], tokens.attention_mask[row], strict=True)
    return [token for ids, mask in chunks for token in ids[mask.bool()].tolist()[1:-1]]


@pytest.mark.parametrize("prompt", [*ORDINARY, "((a) b", "a) b", "(:3)", "()", "1:2) (a:-) (b:nan)"])
def test_a_prompt_without_weights_is_unchanged(prompt: str) -> None:
    assert parse_weights(prompt) == [(prompt, 1.0)]


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a (red:1.3) cat", [("a ", 1.0), ("red", 1.3), (" cat", 1.0)]),
        ("(a (red:1.5) cat:2) runs", [("a ", 2.0), ("red", 3.0), (" cat", 2.0), (" runs", 1.0)]),
        ("(a (b) c:0.5)", [("a (b) c", 0.5)]),
        ("(cat:1.0) (dog:1)", [("cat dog", 1.0)]),
        ("((cat:2):0.5)", [("cat", 1.0)]),
        ("(cat:0)(dog:10)", [("cat", 0.0), ("dog", 10.0)]),
        ("(10:30 : .5 )", [("10:30 ", 0.5)]),
        (r"cat \(animal:1.3\)", [("cat (animal:1.3)", 1.0)]),
        (r"(cat \(animal\):1.3)", [("cat (animal)", 1.3)]),
        ("(東京\n🐈:1.2)!", [("東京\n🐈", 1.2), ("!", 1.0)]),
        (":( (50% = {x}:1.2)", [(":( ", 1.0), ("50% = {x}", 1.2)]),
    ],
)
def test_weights_are_parsed(prompt: str, pieces: list[tuple[str, float]]) -> None:
    assert parse_weights(prompt) == pieces


@pytest.mark.parametrize("text", [*ORDINARY, "a clock (12:30)", "(4:3)", r"a \(cat:2\)", r"\(:1)", "((cat:2):0.5)"])
def test_an_escaped_text_is_a_prompt_without_weights(text: str) -> None:
    assert parse_weights(escape_prompt(text)) == [(text, 1.0)]


@pytest.mark.parametrize("weight", ["-1", "10.5", "30", "1e999"])
def test_a_weight_out_of_range_is_refused(weight: str) -> None:
    with pytest.raises(SettingsError, match=rf"weight {weight} must be from 0 to 10"):
        parse_weights(f"a (cat:{weight})")


@pytest.mark.parametrize("use_attention_mask", [False, True])
@torch.no_grad()
def test_embeddings_of_ordinary_prompts_equal_diffusers_to_the_bit(
    tokenizer: CLIPTokenizer, use_attention_mask: bool
) -> None:
    text_encoder = tiny_text_encoder(tokenizer, use_attention_mask=use_attention_mask)
    prompts = [*ORDINARY, " ".join(["cat"] * 75)]
    embeddings = encode_prompts(prompts, tokenizer, text_encoder)
    assert torch.equal(embeddings, reference(prompts, tokenizer, text_encoder))


def test_no_token_of_a_long_prompt_is_lost(tokenizer: CLIPTokenizer) -> None:
    tokens = tokenize([LONG, "a cat"], tokenizer)
    assert tokens.input_ids.shape == tokens.weights.shape == (2, count_chunks(LONG, tokenizer), 77) == (2, 3, 77)
    assert words(tokens, 0) == tokenizer(LONG).input_ids[1:-1]
    assert tokenizer.decode(words(tokens, 0)) == tokenizer.decode(tokenizer(LONG).input_ids, skip_special_tokens=True)
    assert words(tokens, 1) == tokenizer("a cat").input_ids[1:-1]


def test_each_chunk_has_its_own_start_end_and_padding(tokenizer: CLIPTokenizer) -> None:
    tokens = tokenize([LONG, "a cat"], tokenizer, chunks=4)
    ordinary = tokenizer(["a cat", ""], padding="max_length", max_length=77, return_tensors="pt")
    assert (tokens.input_ids[..., 0] == tokenizer.bos_token_id).all()
    assert (tokens.input_ids[0, :2, 76] == tokenizer.eos_token_id).all()
    assert tokens.input_ids[0, 2, 51:].tolist() == [tokenizer.eos_token_id, *[tokenizer.pad_token_id] * 25]
    assert torch.equal(tokens.input_ids[1, :2], ordinary.input_ids)
    assert torch.equal(tokens.attention_mask[1, :2], ordinary.attention_mask)
    assert torch.equal(tokens.input_ids[1, 2], ordinary.input_ids[1])


def test_a_long_prompt_is_split_after_a_nearby_comma(tokenizer: CLIPTokenizer) -> None:
    tokens = tokenize([SPLIT_AT_A_COMMA], tokenizer)
    assert tokens.attention_mask.sum(-1).tolist() == [[68, 32]]
    assert words(tokens, 0) == tokenizer(SPLIT_AT_A_COMMA).input_ids[1:-1]


@pytest.mark.parametrize(("length", "chunks"), [(0, 1), (75, 1), (76, 2), (150, 2), (151, 3)])
def test_chunks_are_counted(tokenizer: CLIPTokenizer, length: int, chunks: int) -> None:
    assert count_chunks(" ".join(["cat"] * length), tokenizer) == chunks


@pytest.mark.parametrize("chunks", [0, 2])
def test_too_few_chunks_are_refused(tokenizer: CLIPTokenizer, chunks: int) -> None:
    with pytest.raises(SettingsError, match=f"needs 3 chunks of 75 tokens and chunks={chunks}"):
        tokenize(["a cat", LONG], tokenizer, chunks)


def test_a_tokenizer_without_a_length_is_refused(text_encoder: CLIPTextModel, vocabulary: Path) -> None:
    with pytest.raises(SettingsError, match="set model_max_length to 77"):
        encode_prompts(["a cat"], CLIPTokenizer.from_pretrained(vocabulary), text_encoder)


@torch.no_grad()
def test_chunks_are_encoded_separately_and_concatenated(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> None:
    embeddings = encode_prompts([SPLIT_AT_A_COMMA, "a cat"], tokenizer, text_encoder, chunks=3)
    first, second = SPLIT_AT_A_COMMA.split(", ")
    apart = reference([f"{first},", second, "", "a cat", "", ""], tokenizer, text_encoder)
    assert torch.equal(embeddings, apart.reshape(2, 3 * 77, WIDTH))


@torch.no_grad()
def test_weights_scale_tokens_and_keep_the_mean(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> None:
    plain = encode_prompts(["a cat a", "a cat"], tokenizer, text_encoder)
    weighted = encode_prompts(["a (cat:1.5) a", "(a cat:1.0)"], tokenizer, text_encoder)
    ratio = weighted[0] / plain[0]
    torch.testing.assert_close(ratio[2] / ratio[1], torch.full([WIDTH], 1.5))
    torch.testing.assert_close(ratio[3:], ratio[:1].expand(74, -1))
    torch.testing.assert_close(weighted[0].mean(), plain[0].mean())
    assert torch.equal(weighted[1], plain[1])


def test_weights_follow_their_words_across_chunks(tokenizer: CLIPTokenizer) -> None:
    tokens = tokenize([f"({LONG}:1.2) (a:0.5)"], tokenizer)
    weights = tokens.weights[0][tokens.attention_mask[0].bool()]
    assert torch.equal(weights, torch.tensor([1, *[1.2] * 75, 1, 1, *[1.2] * 75, 1, 1, *[1.2] * 50, 0.5, 1]))
    assert (tokens.weights[0, :, 0] == 1).all()
    assert (tokens.weights[tokens.attention_mask == 0] == 1).all()


def test_a_chunk_of_zero_mean_is_multiplied_but_not_rescaled() -> None:
    centred = torch.tensor([[[1.0, -1.0], [2.0, -2.0]]], requires_grad=True)
    weighted = apply_prompt_weights(centred, torch.tensor([[1.0, 3.0]]))
    weighted.square().sum().backward()
    assert torch.equal(weighted, torch.tensor([[[1.0, -1.0], [6.0, -6.0]]]))
    assert centred.grad is not None
    assert centred.grad.isfinite().all()


def test_gradients_reach_the_text_encoder(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> None:
    encode_prompts(["a (cat:1.5)", "a cat"], tokenizer, text_encoder).square().sum().backward()
    gradient = text_encoder.get_input_embeddings().weight.grad
    assert gradient[tokenizer("cat").input_ids[1]].abs().sum() > 0
    assert gradient.isfinite().all()


@torch.no_grad()
def test_embeddings_have_the_text_encoders_dtype(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> None:
    assert encode_prompts(["a (cat:1.5)"], tokenizer, text_encoder.bfloat16()).dtype == torch.bfloat16


def test_break_starts_a_chunk_of_its_own(tokenizer):
    encoder = tiny_text_encoder(tokenizer)
    joined = encode_prompts(["a (cat:1.5) BREAK a photo"], tokenizer, encoder)
    apart = [encode_prompts([text], tokenizer, encoder) for text in ("a (cat:1.5)", "a photo")]
    torch.testing.assert_close(joined, torch.cat(apart, dim=1))
    assert count_chunks("(a BREAK b BREAK c:1.2)", tokenizer) == 3
    for text in ("a BREAKDOWN", "a break", r"a \BREAK b", escape_prompt("a BREAK (b)")):
        assert count_chunks(text, tokenizer) == 1
    literal, plain = (tokenize([text], tokenizer).input_ids for text in (r"a \BREAK b", "a break b"))
    assert torch.equal(literal, plain)
