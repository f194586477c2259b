"""Pipelines that make sound: transformers and U-Nets over the latents of a waveform or of a mel spectrogram."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.pipelines import ace_step, audioldm2, stable_audio, stable_audio_3
from toy_parts import WIDTH, image_vae, t5_text_encoder, umt5_text_encoder
from toy_recipe import Toy, reproducible
from toy_tokenizers import LENGTH, gemma_tokenizer, qwen_tokenizer, roberta_tokenizer, t5_tokenizer

_LAYERS = 3  # an early, a middle and a late block
_RATE = 2000  # samples a second
_SECONDS = 0.2


def _noise(channels: int) -> torch.Tensor:
    """A waveform of `_SECONDS`, shape (1, channels, samples)."""
    return 0.1 * torch.randn(1, channels, int(_RATE * _SECONDS), generator=torch.Generator().manual_seed(0))


# Transformers over the latents of a waveform


def _oobleck(channels: int) -> diffusers.AutoencoderOobleck:
    return diffusers.AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[2, 4],
        decoder_channels=8,
        decoder_input_channels=channels,
        audio_channels=2,
        channel_multiples=[1, 2],
        sampling_rate=_RATE,
    )


def _stable_audio() -> DiffusionPipeline:
    tokenizer = t5_tokenizer()
    return diffusers.StableAudioPipeline(
        vae=_oobleck(4),
        text_encoder=t5_text_encoder(tokenizer),
        projection_model=stable_audio.StableAudioProjectionModel(
            text_encoder_dim=WIDTH, conditioning_dim=WIDTH, min_value=0, max_value=32
        ),
        tokenizer=tokenizer,
        transformer=diffusers.StableAudioDiTModel(
            sample_size=64,
            in_channels=4,
            out_channels=4,
            num_layers=_LAYERS,
            attention_head_dim=8,
            num_attention_heads=2,
            num_key_value_attention_heads=1,
            cross_attention_dim=WIDTH,
            cross_attention_input_dim=WIDTH,
            time_proj_dim=8,
            global_states_input_dim=2 * WIDTH,
        ),
        scheduler=diffusers.EDMDPMSolverMultistepScheduler(
            prediction_type="v_prediction", sigma_data=1.0, sigma_max=20.0
        ),
    )


def _stable_audio_3(kind: type[DiffusionPipeline]) -> DiffusionPipeline:
    tokenizer = gemma_tokenizer()
    text = transformers.T5GemmaModuleConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        sliding_window=64,
        layer_types=["full_attention", "full_attention"],
    ).to_dict()
    return kind(
        vae=diffusers.AutoencoderSAME(
            audio_channels=2,
            patch_size=2,
            encoder_channels=8,
            encoder_c_mults=(2,),
            encoder_strides=(2,),
            encoder_transformer_depths=(1,),
            latent_dim=8,
            use_differential_attention=False,
            dim_heads=4,
            ff_mult=2,
            sampling_rate=_RATE,
        ),
        text_encoder=transformers.T5GemmaEncoderModel(
            transformers.T5GemmaConfig(encoder=text, decoder=text, is_encoder_decoder=False)
        ),
        tokenizer=tokenizer,
        transformer=diffusers.StableAudio3DiTModel(
            io_channels=8,
            patch_size=1,
            embed_dim=32,
            depth=_LAYERS,
            num_heads=4,
            cond_token_dim=WIDTH,
            global_cond_dim=WIDTH,
            local_add_cond_dim=9,
            timestep_features_dim=16,
            ff_mult=2,
            num_memory_tokens=3,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
        duration_embedder=stable_audio_3.StableAudio3DurationEmbedder(output_dim=WIDTH, fourier_dim=16),
    )


def _ace_step() -> DiffusionPipeline:
    tokenizer = qwen_tokenizer()
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, **heads}
    return diffusers.AceStepPipeline(
        vae=_oobleck(8),
        text_encoder=transformers.Qwen3Model(
            transformers.Qwen3Config(
                **sizes, num_hidden_layers=2, vocab_size=len(tokenizer), max_position_embeddings=1024
            )
        ),
        tokenizer=tokenizer,
        transformer=diffusers.AceStepTransformer1DModel(
            **sizes,
            num_hidden_layers=_LAYERS,
            in_channels=24,
            audio_acoustic_hidden_dim=8,
            patch_size=2,
            sliding_window=16,
        ),
        condition_encoder=ace_step.AceStepConditionEncoder(
            **sizes,
            text_hidden_dim=WIDTH,
            timbre_hidden_dim=8,
            num_lyric_encoder_hidden_layers=1,
            num_timbre_encoder_hidden_layers=1,
            sliding_window=16,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
    )


def _longcat() -> DiffusionPipeline:
    tokenizer = t5_tokenizer()
    return diffusers.LongCatAudioDiTPipeline(
        vae=diffusers.LongCatAudioDiTVae(
            in_channels=1,
            channels=16,
            c_mults=[1, 2],
            strides=[2],
            latent_dim=8,
            encoder_latent_dim=16,
            downsampling_ratio=2,
            sample_rate=_RATE,
        ),
        text_encoder=umt5_text_encoder(tokenizer, 32),
        tokenizer=tokenizer,
        transformer=diffusers.LongCatAudioDiTTransformer(
            dit_dim=32, dit_depth=_LAYERS, dit_heads=2, dit_text_dim=32, latent_dim=8, text_conv=False
        ),
    )


# U-Nets over the latents of a mel spectrogram, with a vocoder

_MELS = 8
_UNET: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 8,
    "attention_head_dim": 2,
}
_CROSSED: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}


def _scheduler() -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def _spectrogram_parts() -> dict[str, Any]:
    vocoder = transformers.SpeechT5HifiGanConfig(
        model_in_dim=_MELS,
        sampling_rate=_RATE,
        upsample_initial_channel=16,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
        normalize_before=False,
    )
    return {
        "vae": image_vae(in_channels=1, out_channels=1),
        "scheduler": _scheduler(),
        "vocoder": transformers.SpeechT5HifiGan(vocoder),
    }


def _clap(tokenizer: transformers.RobertaTokenizer) -> transformers.ClapConfig:
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "projection_dim": WIDTH,
        "pad_token_id": tokenizer.pad_token_id,
    }
    audio = {
        "spec_size": 8,
        "window_size": 4,
        "num_mel_bins": 8,
        "depths": [1, 1],
        "num_attention_heads": [1, 1],
        "num_hidden_layers": 1,
        "hidden_size": 192,
        "patch_size": 2,
        "patch_stride": 2,
        "patch_embed_input_channels": 4,
        "projection_dim": WIDTH,
    }
    return transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=WIDTH)


def _listener() -> transformers.ClapFeatureExtractor:
    return transformers.ClapFeatureExtractor(feature_size=8, sampling_rate=_RATE, hop_length=40, fft_window_size=64)


def _class_embedded_unet() -> diffusers.UNet2DConditionModel:
    """A U-Net that sees the text as a class embedding."""
    return diffusers.UNet2DConditionModel(
        **_UNET,
        **_CROSSED,
        cross_attention_dim=(16, 32),
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=WIDTH,
        class_embeddings_concat=True,
    )


def _audioldm() -> DiffusionPipeline:
    tokenizer = roberta_tokenizer()
    return diffusers.AudioLDMPipeline(
        **_spectrogram_parts(),
        text_encoder=transformers.ClapTextModelWithProjection(_clap(tokenizer).text_config),
        tokenizer=tokenizer,
        unet=_class_embedded_unet(),
    )


def _musicldm() -> DiffusionPipeline:
    tokenizer = roberta_tokenizer()
    return diffusers.MusicLDMPipeline(
        **_spectrogram_parts(),
        text_encoder=transformers.ClapModel(_clap(tokenizer)),
        tokenizer=tokenizer,
        feature_extractor=_listener(),
        unet=_class_embedded_unet(),
    )


def _audioldm2() -> DiffusionPipeline:
    tokenizer, tokenizer_2 = roberta_tokenizer(), t5_tokenizer()
    speaker = transformers.GPT2Config(
        n_embd=WIDTH, n_head=2, n_layer=1, vocab_size=8, n_positions=64, bos_token_id=0, eos_token_id=1
    )
    language_model = transformers.GPT2LMHeadModel(speaker)
    language_model.config.max_new_tokens = 4
    return diffusers.AudioLDM2Pipeline(
        **_spectrogram_parts(),
        text_encoder=transformers.ClapModel(_clap(tokenizer)),
        text_encoder_2=t5_text_encoder(tokenizer_2, 32),
        projection_model=audioldm2.AudioLDM2ProjectionModel(
            text_encoder_dim=WIDTH, text_encoder_1_dim=32, langauge_model_dim=WIDTH
        ),
        language_model=language_model,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        feature_extractor=_listener(),
        unet=audioldm2.AudioLDM2UNet2DConditionModel(**_UNET, **_CROSSED, cross_attention_dim=((None, WIDTH, 32),) * 2),
    )


_GUIDED = {"num_inference_steps": 3, "guidance_scale": 3.0}
_SPOKEN = {**_GUIDED, "audio_length_in_s": _SECONDS}
_PLAIN = {"num_inference_steps": 3, "duration": _SECONDS}
TOYS = [
    Toy("StableAudioPipeline", reproducible(_stable_audio), {**_GUIDED, "audio_end_in_s": _SECONDS}),
    Toy(
        "StableAudio3Pipeline",
        reproducible(lambda: _stable_audio_3(diffusers.StableAudio3Pipeline)),
        {**_GUIDED, "duration": _SECONDS},
    ),
    Toy(
        "StableAudio3AudioToAudioPipeline",
        reproducible(lambda: _stable_audio_3(diffusers.StableAudio3AudioToAudioPipeline)),
        {**_PLAIN, "init_noise_level": 0.8},
        extra={"audio": _noise(2)},
    ),
    Toy(
        "StableAudio3InpaintPipeline",
        reproducible(lambda: _stable_audio_3(diffusers.StableAudio3InpaintPipeline)),
        {**_PLAIN, "mask_start_seconds": 0.05, "mask_end_seconds": 0.15},
        extra={"audio": _noise(2)},
    ),
    Toy(
        "AceStepPipeline",
        reproducible(_ace_step),
        {**_GUIDED, "audio_duration": _SECONDS, "max_text_length": 4 * LENGTH, "max_lyric_length": LENGTH},
    ),
    Toy("LongCatAudioDiTPipeline", reproducible(_longcat), {**_GUIDED, "audio_duration_s": _SECONDS}),
    Toy("AudioLDMPipeline", reproducible(_audioldm), _SPOKEN, gives_latents=False),
    Toy("MusicLDMPipeline", reproducible(_musicldm), _SPOKEN, gives_latents=False, refused="diffusers' own call fails"),
    Toy("AudioLDM2Pipeline", reproducible(_audioldm2), _SPOKEN),
]
