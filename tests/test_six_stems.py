"""A song through the whole service, taken apart into six stems by an exported HTDemucs."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
import torch
from demucs.htdemucs import HTDemucs

from export.artefact import Wanted, write_artefact
from export.install import note_installed
from export.separate_stems import PUBLISHED_HTDEMUCS_6S, Demucs
from remix.manifest import installed, read_manifest
from remix.settings import read_settings
from remix.stages import STAGES
from tests.conftest import serving
from tests.test_remix_service import short_song, song

pytestmark = pytest.mark.slow

__all__ = ["short_song", "song"]  # fixtures

NAME = "htdemucs_6s-random"
SMALL: dict[str, Any] = {
    **PUBLISHED_HTDEMUCS_6S, "channels": 8, "t_layers": 1, "t_heads": 2, "dconv_mode": 1,
    "segment": Fraction(39, 5),
}  # fmt: skip
"""htdemucs_6s with few channels: its tensors have the same shapes, and it takes a moment."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed models, with six stems instead of the installed separators."""
    folder, here = tmp_path_factory.mktemp("models"), read_settings().models_dir
    torch.manual_seed(0)
    path = f"separate_stems/{NAME}.onnx"
    write_artefact(Demucs([HTDemucs(**SMALL).eval()]), Wanted(NAME, "random", path=path), folder)
    note_installed(folder, [path])
    for stage in STAGES:
        if stage != "separate_stems":
            for entry in installed(read_manifest(), stage, here):
                for file in entry.files:
                    (folder / file.path).parent.mkdir(exist_ok=True)
                    (folder / file.path).symlink_to(here / file.path)
    return folder


def test_a_song_is_remixed_from_six_stems_and_says_that_their_weights_are_random(
    models: Path, short_song: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    command = [sys.executable, "-m", "bentoml", "serve", "service:Remix"]
    folder = tmp_path_factory.mktemp("six")  # short: a socket is in it
    with serving(command, folder, 240.0, {"PHILHARMONICS_MODELS": str(models)}) as server:
        answer = httpx.post(
            f"{server.url}/v1/remix", files={"song": ("song.mp3", short_song)},
            headers={"Accept": "application/zip"}, timeout=600.0,
        )  # fmt: skip
    assert answer.status_code == 200, answer.text
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    remix, rate_hz = soundfile.read(io.BytesIO(parts["remix.wav"]))
    assert np.isfinite(remix).all()
    assert np.abs(remix).max() > 0.01
    stems = sorted(Path(name).stem for name in parts if name.startswith("stems/"))
    assert stems == ["bass", "drums", "guitar", "other", "piano", "vocals"]
    for stem in stems:
        samples, stem_rate_hz = soundfile.read(io.BytesIO(parts[f"stems/{stem}.wav"]))
        assert stem_rate_hz == rate_hz
        assert samples.shape == remix.shape
    report = json.loads(parts["report.json"])
    (separator,) = (model for model in report["models"] if model["stage"] == "separate_stems")
    assert (separator["name"], separator["weights"]) == (NAME, "random")
    assert any(NAME in warning and "random" in warning for warning in report["warnings"])
