"""The examples run as their first lines say, on a real photograph."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from aiomm import vision

EXAMPLES = Path(__file__).parent.parent / "examples"


@contextmanager
def running(name: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run an example with warnings as errors, its output in pipes; it is gone on exit."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def finish(process: subprocess.Popen[str]) -> str:
    """Return what the example printed, once it has ended well, and without complaint."""
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, ""), output + errors
    return output


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_vision_model_goes_on_from_embeddings_as_from_the_photo(photo: Path) -> None:
    """1. Encode the photo, and go on from the embeddings alone.
    2. Ask the whole model, which is given token ids and pixels, the same.
    """
    import torch

    model = vision.small_qwen()
    tensors = vision.encode(model, photo)
    assert {name: (str(t.dtype)[6:], *t.shape[1:]) for name, t in tensors.items()} == {
        name: (field.dtype, *field.shape) for name, field in vision.SCHEMA.items()
    }
    assert len({len(tensor) for tensor in tensors.values()}) == 1
    assert vision.digest(tensors) == vision.digest(vision.encode(vision.small_qwen(), photo))

    pixels, grid = vision.photo_patches(photo)
    token_ids = tensors["fill_ids"][None].long()
    with torch.inference_mode():
        logits = model(
            input_ids=token_ids,
            pixel_values=pixels.bfloat16(),
            image_grid_thw=grid,
            mm_token_type_ids=(token_ids == vision.IMAGE).int(),
            logits_to_keep=1,
        ).logits
    assert vision.next_tokens(model, tensors, 1) == [int(logits[0, -1].argmax())]


@pytest.mark.slow
def test_the_digest_sees_every_byte_and_no_layout() -> None:
    import torch

    rows = torch.arange(6, dtype=torch.int32).reshape(2, 3)
    strided = rows.T.contiguous().T
    assert vision.digest({"a": rows}) == vision.digest({"a": strided})
    assert vision.digest({"a": rows}) != vision.digest({"a": rows + 1})


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_photo_travels_from_encoder_to_language_model(photo: Path) -> None:
    """Two processes, one ticket between them; more tokens than the default grant."""
    with running("language_model.py") as language:
        assert language.stdout is not None
        ticket = language.stdout.readline().strip()
        with running("encoder.py", ticket, str(photo)) as encoder:
            sent = finish(encoder)
        received = finish(language)
    assert "sent 1131 tokens of grace_hopper.jpg" in sent
    assert "in chunks of 1024, 107" in received
    assert "bit-identical" in received


@pytest.mark.slow
def test_the_scheduler_admits_times_out_and_cancels() -> None:
    with running("custom_scheduler.py") as process:
        output = finish(process)
    assert output.endswith("1 CancelledError, 1 deadline, 20 done\n")
    assert "32 free" in output  # every block of the pool came back


@pytest.mark.slow
def test_a_plane_of_ones_own_carries_the_bytes() -> None:
    with running("custom_plane.py") as process:
        output = finish(process)
    assert "plane=file tokens=2000" in output
    assert output.endswith("bit-identical\n")
