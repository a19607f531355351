"""Token merging as a setting: checked, off again without a trace, the same image for the same seed in any batch."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from peft import LoraConfig

from sdmodule import SettingsError, StableDiffusionModule
from sdmodule.tome.settings import ENGINES, TokenMerging
from tests.tome.conftest import small_unet, tomesd_applied

OURS = ("exact", "window")


def image(checkpoint, prompt="a red circle", steps=3, **tome):
    """What samples an image with these settings, again and again."""
    module = StableDiffusionModule.from_pretrained(str(checkpoint), tome=tome)

    def sample(**settings):
        named = {"num_inference_steps": steps, "seed": 1, "return_type": "tensor", **settings}
        return module.infer(prompt, **named)["samples"]

    return sample


@pytest.mark.parametrize("engine", ENGINES)
def test_merging_changes_the_image_and_the_seed_still_names_it(checkpoint, engine):
    plain, merged = image(checkpoint), image(checkpoint, ratio=0.5, engine=engine)
    before = torch.get_rng_state()
    first = merged()
    torch.rand(3)
    assert torch.equal(first, merged())
    torch.set_rng_state(before)
    assert not torch.equal(first, plain())


def test_it_is_on_or_off_for_each_image(checkpoint):
    off, on = image(checkpoint), image(checkpoint, ratio=0.5)
    assert torch.equal(off(tome={"ratio": 0.5}), on())
    assert torch.equal(on(tome={"ratio": 0}), off())
    with pytest.raises(SettingsError, match=r"to 0\.75"):
        off(tome={"ratio": 0.9})


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("engine", ENGINES)
def test_an_image_is_the_same_alone_and_in_a_batch(checkpoint, engine, guidance):
    sample = image(checkpoint, ratio=0.5, engine=engine, max_downsample=2)
    together = sample(num_images_per_prompt=3, guidance_scale=guidance)
    for k in range(3):
        alone = sample(seed=1 + k, guidance_scale=guidance)
        assert torch.allclose(together[k], alone[0], atol=1e-4)


def test_each_image_has_draws_of_its_own(checkpoint):
    """With the same noise, images of two seeds differ by which tokens stay, and by nothing if the first do."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    for use_rand in (True, False):
        sample = image(checkpoint, ratio=0.5, use_rand=use_rand)
        first, second = sample(num_images_per_prompt=2, latents=noise)
        assert torch.allclose(first, second, atol=1e-5) is not use_rand


@pytest.mark.parametrize("engine", ENGINES)
def test_ratio_zero_and_removal_are_exactly_off(unet, inputs, engine):
    with torch.no_grad():
        plain = unet(*inputs).sample
        with TokenMerging(ratio=0.0, engine=engine).applied(unet):
            assert torch.equal(plain, unet(*inputs).sample)
        with pytest.raises(KeyboardInterrupt), TokenMerging(engine=engine).applied(unet):
            assert not torch.equal(plain, unet(*inputs).sample)
            raise KeyboardInterrupt
        assert torch.equal(plain, unet(*inputs).sample)
    blocks = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]
    assert all(type(block) is BasicTransformerBlock and "merging" not in vars(block) for block in blocks)


def test_nothing_of_it_is_in_a_state_dict(unet):
    before = list(unet.state_dict())
    with TokenMerging().applied(unet):
        assert list(unet.state_dict()) == before


@pytest.mark.parametrize("engine", OURS)
def test_the_result_depends_on_seed_and_step_and_not_on_the_calls_before(unet, inputs, engine):
    def run(seed, steps):
        with TokenMerging(engine=engine).applied(unet, [seed], steps=3) as start_step, torch.no_grad():
            for step in steps:
                start_step(step)
                output = unet(*inputs).sample
            return output

    assert torch.equal(run(1, [0, 1, 2]), run(1, [0, 0, 2]))
    assert not torch.equal(run(1, [2]), run(1, [1]))
    assert not torch.equal(run(1, [2]), run(2, [2]))


@pytest.mark.parametrize("engine", OURS)
def test_a_plan_is_kept_for_reuse_steps(unet, inputs, engine):
    latents, timestep, text = inputs
    other = latents.flip(-1)

    def run(reuse_steps, planned_for):
        merging = TokenMerging(engine=engine, reuse_steps=reuse_steps)
        with merging.applied(unet, steps=3) as start_step, torch.no_grad():
            unet(planned_for, timestep, text)
            start_step(1)
            second = unet(latents, timestep, text).sample
            start_step(2)
            return second, unet(latents, timestep, text).sample

    kept, anew = run(2, other)
    assert not torch.equal(kept, run(2, latents)[0])  # planned for what the first step saw
    assert torch.equal(run(1, other)[0], run(1, latents)[0])
    assert torch.equal(anew, run(1, latents)[1])


@pytest.mark.parametrize("engine", OURS)
def test_merges_where_the_sample_is_given_by_name(unet, inputs, engine):
    latents, timestep, text = inputs
    with TokenMerging(engine=engine).applied(unet), torch.no_grad():
        named = unet(sample=latents, timestep=timestep, encoder_hidden_states=text).sample
        assert torch.equal(named, unet(*inputs).sample)


@pytest.mark.parametrize("engine", OURS)
def test_lives_with_lora(unet, inputs, engine):
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    adapted = unet(*inputs).sample
    with TokenMerging(engine=engine).applied(unet):
        merged = unet(*inputs).sample
        unet.disable_adapters()
        assert not torch.equal(merged, unet(*inputs).sample)
        unet.enable_adapters()
        merged.sum().backward()
    assert all(p.grad is not None for name, p in unet.named_parameters() if "lora" in name)
    assert torch.equal(adapted, unet(*inputs).sample)


@pytest.mark.parametrize("engine", OURS)
def test_works_under_autocast(unet, inputs, engine):
    with torch.no_grad(), TokenMerging(engine=engine).applied(unet):
        wanted = unet(*inputs).sample
        with torch.autocast("cpu", torch.bfloat16):
            found = unet(*inputs).sample
    assert (found - wanted).norm() < 0.05 * wanted.norm()


def test_residuals_of_a_controlnet_give_what_they_give_with_tomesd(unet, inputs):
    shapes = [(32, 16), (32, 16), (32, 8), (64, 8)]
    generator = torch.Generator().manual_seed(4)
    down = [torch.randn(2, channels, side, side, generator=generator) for channels, side in shapes]
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": down[-1]}
    with torch.no_grad():
        plain = unet(*inputs).sample
        with tomesd_applied(unet, seed=3, ratio=0.5):
            wanted = unet(*inputs, **residuals).sample
        with TokenMerging().applied(unet, [3]):
            found = unet(*inputs, **residuals).sample
    assert torch.allclose(found, wanted, atol=1e-4) and not torch.allclose(found, plain, atol=0.1)


def test_lora_gives_what_it_gives_with_tomesd(unet, inputs):
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    with torch.no_grad():
        with tomesd_applied(unet, seed=3, ratio=0.5):
            wanted = unet(*inputs).sample
        with TokenMerging().applied(unet, [3]):
            assert torch.allclose(unet(*inputs).sample, wanted, atol=1e-5)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("engine", OURS)
def test_gradient_checkpointing_changes_no_gradient(inputs, engine, whole):
    grads = []
    for checkpointed in (False, True):
        unet = small_unet().train()
        if checkpointed:
            unet.enable_gradient_checkpointing()
        with TokenMerging(engine=engine, merge_crossattn=whole, merge_mlp=whole).applied(unet):
            unet(*inputs).sample.square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in unet.parameters()]))
    assert torch.allclose(*grads, rtol=1e-5, atol=1e-7)
    assert grads[0].abs().sum() > 0


@pytest.mark.parametrize("engine", OURS)
def test_a_merged_unet_can_be_pickled_and_copied(unet, inputs, engine):
    with TokenMerging(engine=engine).applied(unet), torch.no_grad():
        merged = unet(*inputs).sample
        assert torch.equal(merged, pickle.loads(pickle.dumps(unet))(*inputs).sample)
        assert torch.equal(merged, copy.deepcopy(unet)(*inputs).sample)
    again = pickle.loads(pickle.dumps(unet))
    with TokenMerging(engine=engine).applied(again), torch.no_grad():
        assert torch.equal(merged, again(*inputs).sample)


def test_other_latents_than_it_was_applied_for_are_refused(unet, inputs):
    latents, timestep, text = inputs
    with TokenMerging().applied(unet), pytest.raises(SettingsError, match="16 by 16 = 256 tokens and a block got 512"):
        unet(torch.cat([latents, latents], dim=-1), timestep, text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.8}, r"to 0\.75"),
        ({"ratio": 0.7, "sx": 1}, r"to 0\.5"),
        ({"ratio": -1}, "from 0"),
        ({"sx": 0}, "at least 1"),
        ({"reuse_steps": 0}, "at least 1"),
        ({"max_downsample": 3}, "1, 2, 4 or 8"),
        ({"merge_attn": False}, "merges nothing"),
        ({"merge_mlp": "yes"}, "true or false"),
        ({"engine": "fast"}, "exact, tomesd, window"),
        ({"engine": "tomesd", "reuse_steps": 2}, "give 1"),
        ({"engine": "window", "ratio": 0.3}, r"give 0\.25 or 0\.3125"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused(settings, message):
    with pytest.raises(SettingsError, match=message):
        TokenMerging(**settings)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_does_not_fit_the_unet_is_refused_before_anything_is_sampled(engine):
    unet = small_unet(
        (32, 32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    with pytest.raises(SettingsError, match=r"give tome\.max_downsample=2"):
        TokenMerging(engine=engine).check(unet, (16, 16))
    TokenMerging(engine=engine, max_downsample=2).check(unet, (16, 16))
    with pytest.raises(SettingsError, match=r"those of this UNet have other norms, positions or boxes"):
        TokenMerging(engine=engine).check(small_unet(attention_type="gated"), (16, 16))
    with pytest.raises(SettingsError, match=r"tome.sy=9 is more than the 8 tokens .* give 1 to 8"):
        TokenMerging(engine=engine, max_downsample=2, sy=9).check(unet, (16, 32))


def test_a_model_is_refused_its_settings_at_once(checkpoint):
    with pytest.raises(SettingsError, match=r"tome.sx=9 .* give 1 to 8"):
        StableDiffusionModule.from_pretrained(str(checkpoint), tome={"ratio": 0.5, "sx": 9})
    with pytest.raises(SettingsError, match=r"no setting strength; there are engine"):
        StableDiffusionModule.from_pretrained(str(checkpoint), tome={"strength": 0.5})
    with pytest.raises(SettingsError, match="give one of them"):
        StableDiffusionModule.from_pretrained(str(checkpoint), tome={"ratio": 0.5}, tomesd_cfg={"ratio": 0.5})


def test_tomesd_is_refused_the_sizes_that_it_fails_at():
    unet = small_unet((32, 32, 32, 32))
    with pytest.raises(SettingsError, match="fails for latents of 33 by 36"):
        TokenMerging(engine="tomesd", max_downsample=8).check(unet, (33, 36))
    TokenMerging(engine="tomesd", max_downsample=8).check(unet, (64, 64))
    for engine in OURS:
        with TokenMerging(engine=engine, max_downsample=8).applied(unet, size=(33, 36)), torch.no_grad():
            assert unet(torch.zeros(1, 4, 33, 36), 0, torch.zeros(1, 7, 32)).sample.isfinite().all()
