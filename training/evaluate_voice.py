"""held-out recordings, voice -> is it intelligible, in tune, and silent where it should be.

    python -m training.evaluate_voice --voice allison --models .models --whisper MODEL_FOLDER \\
        RECORDING ...

Word error rates are Whisper tiny.en's (through ctranslate2) against what it hears in the source,
so they count what conversion loses. F0 of the result is measured by FCPE and compared with the
source's, moved by the octaves that were chosen.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from export.content_encoder import WhisperEncoder
from remix.audio import Samples
from remix.convert_voice import Vocal, Voice, convert_voice, join_chunks
from remix.manifest import read_manifest
from remix.pitch import clean_pitch, loud_level_db
from remix.stages import Tensors
from remix.vocal_frames import (
    FRAME_SAMPLES,
    SAMPLE_RATE_HZ,
    analysis_windows,
    frame_level_db,
    join_windows,
)
from training.voice_data import read_recording

Floats = NDArray[np.float32]
WHISPER_SAMPLES = 30 * SAMPLE_RATE_HZ


class LocalModels:
    """An Infer over the installed graphs, in this process."""

    def __init__(self, models: Path) -> None:
        self._models = models
        self._sessions: dict[str, Any] = {}

    async def __call__(self, model: str, inputs: Tensors) -> dict[str, NDArray[Any]]:
        """See `remix.stages.Infer`."""
        if model not in self._sessions:
            path = self._models / read_manifest()[model].files[0].path
            self._sessions[model] = onnxruntime.InferenceSession(path)
        session = self._sessions[model]
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))


async def convert(samples: Floats, voice: Voice, models: LocalModels) -> tuple[Floats, int]:
    """The recording in another voice, and the octaves that it was moved by."""

    async def whole() -> AsyncIterator[Samples]:
        yield samples[None]

    vocal = Vocal(len(samples), SAMPLE_RATE_HZ)
    result = await join_chunks(convert_voice(whole(), vocal, voice, models), vocal)
    return result.audio.samples[0], result.melody.octaves


async def pitch(samples: Floats, voice: Voice, models: LocalModels) -> tuple[Floats, Floats]:
    """F0 and voicing (0 or 1) of a recording."""
    windows = [
        await models(voice.pitch_model, {"samples": window[None]})
        for window in analysis_windows(samples)
    ]
    n_frames = len(samples) // FRAME_SAMPLES
    f0_hz, confidence = (
        join_windows([window[name][0] for window in windows], n_frames)
        for name in ("f0_hz", "confidence")
    )
    level_db = frame_level_db(samples)
    track = clean_pitch(f0_hz, confidence, level_db, loud_level_db(level_db))
    return track.f0_hz, track.voiced.astype(np.float32)


def transcribe(samples: Floats, whisper: Any) -> list[str]:
    """Words of at most 30 s."""
    import ctranslate2

    padded = np.zeros(WHISPER_SAMPLES, np.float32)
    padded[: len(samples)] = samples[:WHISPER_SAMPLES]
    with torch.inference_mode():
        log_mel = WhisperEncoder().log_mel(torch.from_numpy(padded)[None]).numpy()
    prompt = [["<|startoftranscript|>", "<|notimestamps|>"]]
    features = ctranslate2.StorageView.from_array(np.ascontiguousarray(log_mel))
    # Unclear speech sends greedy decoding into loops, which would count as hundreds of errors.
    options = {"beam_size": 1, "no_repeat_ngram_size": 4}
    tokens = whisper.generate(features, prompt, **options)[0].sequences[0]
    return re.findall(r"[a-z0-9']+", "".join(tokens).replace("Ġ", " ").lower())


def word_errors(expected: Sequence[str], found: Sequence[str]) -> int:
    """Insertions, deletions and substitutions from one to the other.

    >>> word_errors("a b c".split(), "a c d".split())
    2
    """
    row = list(range(len(found) + 1))
    for index, word in enumerate(expected):
        diagonal, row[0] = row[0], index + 1
        for place, other in enumerate(found):
            change = diagonal + (word != other)
            diagonal = row[place + 1]
            row[place + 1] = min(change, diagonal + 1, row[place] + 1)
    return row[-1]


async def evaluate(paths: Sequence[Path], voice: Voice, models: LocalModels, whisper: Any) -> Any:
    """All measures over all recordings."""
    errors = words = 0
    source_pitch, result_pitch, voiced_twice, voiced = [], [], 0.0, 0.0
    loudest_silence_db = -200.0
    for path in paths:
        samples = read_recording(path)
        result, octaves = await convert(samples, voice, models)
        expected, found = transcribe(samples, whisper), transcribe(result, whisper)
        errors, words = errors + word_errors(expected, found), words + len(expected)
        print(f"{path.stem}: {' '.join(expected)} -> {' '.join(found)}", flush=True)
        (f0_hz, is_voiced), (sung_hz, is_sung) = [
            await pitch(part, voice, models) for part in (samples, result)
        ]
        both = (is_voiced * is_sung) > 0
        source_pitch.append(np.log2(f0_hz[both]) + octaves)
        result_pitch.append(np.log2(sung_hz[both]))
        voiced_twice, voiced = voiced_twice + both.sum(), voiced + is_voiced.sum()
        quiet = frame_level_db(samples) < -70.0
        if quiet.any():
            loudest_silence_db = max(loudest_silence_db, frame_level_db(result)[quiet].max())
    expected_pitch, found_pitch = np.concatenate(source_pitch), np.concatenate(result_pitch)
    cents = 1200.0 * np.abs(found_pitch - expected_pitch)
    return {
        "voice": voice.name,
        "recordings": len(paths),
        "word_error_rate": round(errors / max(words, 1), 3),
        "f0_correlation": round(float(np.corrcoef(expected_pitch, found_pitch)[0, 1]), 3),
        "raw_pitch_accuracy_50_cents": round(float((cents < 50).sum() / max(voiced, 1.0)), 3),
        "voiced_frames_kept": round(float(voiced_twice / max(voiced, 1.0)), 3),
        "loudest_silence_dbfs": round(float(loudest_silence_db), 1),
    }


def main() -> None:
    """Command line; the last line printed is JSON."""
    import ctranslate2

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--voice", default="allison")
    parser.add_argument("--model", default="voice-starter", help="name in models.toml")
    parser.add_argument("--models", type=Path, required=True, help="where they are installed")
    parser.add_argument("--whisper", type=Path, required=True, help="the package's model folder")
    parser.add_argument("recordings", type=Path, nargs="+")
    parsed = parser.parse_args()
    voice = Voice.of(read_manifest()[parsed.model], parsed.voice)
    models = LocalModels(parsed.models)
    whisper = ctranslate2.models.Whisper(str(parsed.whisper), compute_type="float32")
    report = asyncio.run(evaluate(parsed.recordings, voice, models, whisper))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
