"""A small Qwen2.5-VL with seeded random weights, so that the demo and examples run on a real photo.

Both processes build the same model from the seed. The encoder side runs the vision tower and
merges its output with the text (:func:`encode`); the language side goes on from the embeddings
that arrived (:func:`next_tokens`), as it would with :data:`SCHEMA` and trained weights.
Needs `aiomm[vision]`; transformers and torch load on first use.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .types import Field, Schema

if TYPE_CHECKING:
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

__all__ = ["HIDDEN", "SCHEMA", "digest", "encode", "next_tokens", "small_qwen"]

HIDDEN = 512
SCHEMA = Schema(
    input_embeddings=Field("bfloat16", HIDDEN),
    fill_ids=Field("int32"),
    mrope_positions=Field("int32", 3),
)
"""The whole sequence, text and image merged: embeddings, token ids, and (t, h, w) positions."""

IMAGE, VIDEO, VISION_START, VISION_END = 1020, 1021, 1022, 1023
PIXELS_PER_TOKEN = 28 * 28
TEXT: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": HIDDEN,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
}
VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_heads": 4,
    "out_hidden_size": HIDDEN,
    "fullatt_block_indexes": [1],
}


def small_qwen(seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """Build the model: the architecture of Qwen2.5-VL, two layers deep, weights from `seed`."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config=dict(TEXT),
        vision_config=dict(VISION),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.bfloat16().train(False)
    return model


def photo_patches(photo: str | Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the photo cut into 14 x 14 patches, and its grid `[[1, rows, columns]]`.

    It is scaled to between 1,100 and 1,280 image tokens, over the default grant of 1,024.
    """
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(
        min_pixels=1100 * PIXELS_PER_TOKEN, max_pixels=1280 * PIXELS_PER_TOKEN
    )
    with Image.open(photo) as image:
        features = processor(images=[image.convert("RGB")], return_tensors="pt")
    return features["pixel_values"], features["image_grid_thw"]


def encode(
    model: Qwen2_5_VLForConditionalGeneration, photo: str | Path, prompt: str = "What is this?"
) -> dict[str, torch.Tensor]:
    """Run the vision tower over the photo and return one tensor per field of :data:`SCHEMA`.

    The prompt's token ids are its UTF-8 bytes, since a tokenizer would have to be downloaded.
    """
    import torch

    pixels, grid = photo_patches(photo)
    with torch.inference_mode():
        image = model.model.visual(pixels.to(torch.bfloat16), grid).pooler_output
        ids = [VISION_START, *[IMAGE] * len(image), VISION_END, *prompt.encode()]
        token_ids = torch.tensor([ids])
        is_image = token_ids == IMAGE
        embeddings = model.get_input_embeddings()(token_ids)
        embeddings[is_image] = image
        positions, _ = model.model.get_rope_index(token_ids, is_image.int(), grid)
    return {
        "input_embeddings": embeddings[0],
        "fill_ids": token_ids[0].int(),
        "mrope_positions": positions[:, 0].T.int(),
    }


def next_tokens(
    model: Qwen2_5_VLForConditionalGeneration, tensors: Mapping[str, torch.Tensor], count: int = 8
) -> list[int]:
    """Run the language model on what :func:`encode` returned; the next `count` ids, greedily."""
    import torch

    embeddings = tensors["input_embeddings"][None]
    positions = tensors["mrope_positions"].T[:, None].long()
    cache, tokens = None, []
    with torch.inference_mode():
        for _ in range(count):
            output = model(
                inputs_embeds=embeddings, position_ids=positions, past_key_values=cache,
                use_cache=True, logits_to_keep=1,
            )  # fmt: skip
            token = output.logits[0, -1].argmax()
            tokens.append(int(token))
            cache = output.past_key_values
            embeddings = model.get_input_embeddings()(token.view(1, 1))
            positions = positions.max().add(1).expand(3, 1, 1)
    return tokens


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of every byte of the tensors, in the order of their names."""
    import torch

    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()
