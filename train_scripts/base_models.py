"""The parts of a small Stable Diffusion, before they have learned anything."""

from __future__ import annotations

import json
from collections.abc import Sequence

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


RESOLUTION = 64
MAX_PROMPT_TOKENS = 24
_LARGEST_ATTENTION = 8  # rows and columns: attention to more would take most of the time
_VOCABULARY = 700  # of which 512 are letters


def create_autoencoder(channels: Sequence[int], latent_channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=RESOLUTION,
        block_out_channels=tuple(channels),
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        norm_num_groups=16,
        latent_channels=latent_channels,
    )


def create_unet(channels: Sequence[int], latent_channels: int, sample_size: int) -> UNet2DConditionModel:
    """A UNet of latents (B, latent_channels, sample_size, sample_size) with attention where they are small."""
    attends = [sample_size >> level <= _LARGEST_ATTENTION for level in range(len(channels))]
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=tuple(channels),
        norm_num_groups=16,
        down_block_types=["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in attends],
        up_block_types=["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(attends)],
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=128,
    )


def train_tokenizer(captions: Sequence[str], vocabulary: int = _VOCABULARY) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges were learned on captions; other words fall into their letters."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=alphabet, special_tokens=special, end_of_word_suffix="</w>"
    )
    words = [word for caption in captions for word in caption.lower().split()]
    bpe.train_from_iterator(words * 2, trainer)  # twice, so that a word that occurs once is merged, too
    learned = json.loads(bpe.to_str())["model"]
    tokens = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(merge) for merge in learned["merges"]]
    ids = {token: index for index, token in enumerate(dict.fromkeys(tokens + special))}
    return CLIPTokenizer(
        vocab=ids, merges=[tuple(merge) for merge in learned["merges"]], model_max_length=MAX_PROMPT_TOKENS
    )


def create_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            projection_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_PROMPT_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def create_scheduler(prediction_type: str) -> DDIMScheduler:
    """The noise schedule of Stable Diffusion 1.x, for v-prediction with zero terminal SNR.

    With that, sampling starts where training ended (Lin et al., 2305.08891).
    """
    if prediction_type == "v_prediction":
        options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    else:
        options = {"steps_offset": 1}
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        clip_sample=False,
        set_alpha_to_one=False,
        **options,
    )
