"""Records of bands, with the tempo that their charts say: our beats and key against libraries'.

Songs of Debian's `fretsonfire-songs-sectoid` (MIT) and `fretsonfire-songs-muldjord` (CC-BY-SA-3.0):
rock and metal, guitar and the rest apart, with a chart for a game whose tempo a person has set.
Nothing was trained on them. References: librosa's beat tracker (tempo) and chroma with Krumhansl's
profiles (key), Essentia's RhythmExtractor2013 and KeyExtractor.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import librosa
import mido
import numpy as np
import soundfile
from essentia import standard as essentia
from numpy.typing import NDArray

from benchmarks.generation import Check
from benchmarks.generation.written import Band, is_on_grid
from remix.audio import Audio, Samples
from remix.beats import find_beats
from remix.errors import NotFound
from remix.generate_notes import HeardNotes, plan_song
from remix.manifest import read_manifest
from remix.options import GenerateOptions
from remix.separate_stems import StemsChunk
from remix.settings import read_settings
from remix.stages import Tensors
from remix.transcribe_notes import Transcriber, transcribe_stems
from runners.transcribe_notes import BasicPitch
from training.debian import unpack

Floats = NDArray[np.float64]

PACKAGES = ("fretsonfire-songs-sectoid", "fretsonfire-songs-muldjord")

EXCERPT_S = 60.0
"""Of each song, from its 20th second on."""
BEGIN_S = 20.0

SAME_TEMPO = 0.02
ON_BEAT_S = 0.07
"""An onset within 70 ms of a reference's beat is on it. Source: mir_eval 0.8.2, beat.f_measure.
Onsets strewn evenly would reach a fifth at 95 bpm, and two fifths at 170."""

ON_BEATS = 0.9
"""Of the onsets that are generated on beats: so many are to be on the beats of one reference. Three
are taken since they differ, from each other and from the records: trackers slip, and a chart has
one tempo for a band that may not."""

NAMES = "C C# D Eb E F F# G Ab A Bb B".split()
FLATS = {"Db": "C#", "D#": "Eb", "Gb": "F#", "G#": "Ab", "A#": "Bb"}
LIBRARIES = ("librosa", "essentia")
KRUMHANSL = {
    "major": (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88),
    "minor": (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17),
}
"""Source: Krumhansl & Kessler 1982."""


@dataclass(frozen=True)
class Record:
    """An excerpt of a song.

    Args:
        stems: the guitar and the rest, [2, T].
        chart_bpm: the tempo that its chart says.
    """

    name: str
    stems: dict[str, Samples]
    sample_rate_hz: int
    chart_bpm: float

    @property
    def mixture(self) -> Audio:
        """All of it."""
        return Audio(np.asarray(sum(self.stems.values()), np.float32), self.sample_rate_hz)


def fetch() -> list[Path]:
    """The songs' folders; none where Debian's packages are not to be had."""
    try:
        roots = unpack(*PACKAGES)
    except NotFound as error:
        print(f"{error} What takes real songs is left out.")
        return []
    return sorted(path.parent for root in roots for path in root.rglob("notes.mid"))


def read_record(folder: Path) -> Record:
    """An excerpt of a song's two tracks, and its chart's tempo."""
    stems = {}
    for name, role in (("guitar", "guitar"), ("song", "other")):
        with soundfile.SoundFile(folder / f"{name}.ogg") as file:
            rate_hz = file.samplerate
            file.seek(round(BEGIN_S * rate_hz))
            samples = file.read(round(EXCERPT_S * rate_hz), dtype="float32", always_2d=True).T
        stems[role] = samples if len(samples) == 2 else np.repeat(samples, 2, axis=0)
    chart = mido.MidiFile(folder / "notes.mid", clip=True)
    tempos = {event.tempo for track in chart.tracks for event in track if event.type == "set_tempo"}
    assert len(tempos) == 1, f"{folder.name}: the chart's tempo changes"
    length = min(samples.shape[1] for samples in stems.values())
    cut = {role: samples[:, :length] for role, samples in stems.items()}
    return Record(folder.name, cut, rate_hz, 60e6 / tempos.pop())


class Ears:
    """Basic Pitch in this process, as its runner has it."""

    def __init__(self) -> None:
        entry = read_manifest()["basic-pitch"]
        self._model = BasicPitch(entry, read_settings())
        self._transcriber = Transcriber.of(entry)

    def hear(self, record: Record) -> HeardNotes:
        """The notes of both tracks."""

        async def infer(model: str, inputs: Tensors) -> dict[str, NDArray[Any]]:
            return self._model(inputs)

        async def chunks() -> AsyncIterator[StemsChunk]:
            yield StemsChunk(0, record.stems)

        return asyncio.run(
            transcribe_stems(chunks(), record.sample_rate_hz, self._transcriber, infer)
        )


def compare(band: Band, folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Every song: tempo and key by us and by the libraries, and where generated onsets fall."""
    ears = Ears()
    return [_compared(band, ears, read_record(folder)) for folder in folders]


def _compared(band: Band, ears: Ears, record: Record) -> dict[str, Any]:
    mixture = record.mixture
    mono = librosa.resample(
        mixture.samples.mean(axis=0), orig_sr=record.sample_rate_hz, target_sr=44_100
    )
    grid = find_beats(mixture)
    options = GenerateOptions(seed=1)
    plan = plan_song(ears.hear(record), grid, mixture.duration_s, options)
    written = band.write(plan, grid, mixture.duration_s, options)
    onsets_s = np.array([note.onset_s for notes in written.tracks.values() for note in notes])
    beats = grid.beat_at(onsets_s)
    on_beats_s = onsets_s[np.abs(beats - np.round(beats)) < 1e-3]
    references = {
        "chart": _chart_beats(mono, record.chart_bpm),
        "librosa": _librosa_beats(mono),
        "essentia": np.asarray(essentia.RhythmExtractor2013()(mono)[1], np.float64),
    }
    return {
        "song": record.name,
        "tempo_bpm": {
            "ours": round(grid.tempo_bpm, 2),
            **{name: round(_tempo(times_s), 2) for name, times_s in references.items()},
        },
        "key": {
            "ours": f"{NAMES[grid.tonic]} {grid.mode}",
            "librosa": _librosa_key(mono),
            "essentia": _essentia_key(mono),
        },
        "onsets_on_beats_near_beats_of": {
            name: round(_share_near(on_beats_s, times_s), 4) for name, times_s in references.items()
        },
        "onsets_on_own_grid": round(float(is_on_grid(onsets_s, grid).mean()), 4),
        "onsets": len(onsets_s),
        "warnings": list(plan.warnings),
    }


def _chart_beats(mono: NDArray[np.float32], tempo_bpm: float) -> Floats:
    """At a chart's tempo, in the phase in which librosa hears most onsets on them.

    Not all charts begin on a beat of the record.
    """
    strength = librosa.onset.onset_strength(y=mono, sr=44_100)
    times_s = librosa.times_like(strength, sr=44_100)
    period_s = 60 / tempo_bpm
    rulers = [np.arange(phase, EXCERPT_S, period_s) for phase in np.arange(0, period_s, 0.005)]
    return max(rulers, key=lambda ruler: float(np.interp(ruler, times_s, strength).mean()))


def _librosa_beats(mono: NDArray[np.float32]) -> Floats:
    _, frames = librosa.beat.beat_track(y=mono, sr=44_100)
    return np.asarray(librosa.frames_to_time(frames, sr=44_100), np.float64)


def _tempo(times_s: Floats) -> float:
    """Of beats: a tracker's own figure is one of a few, 2 % and more apart."""
    return float(60 * (len(times_s) - 1) / (times_s[-1] - times_s[0]))


def _share_near(onsets_s: Floats, beats_s: Floats) -> float:
    """Of onsets: those within 70 ms of a beat."""
    away = np.abs(onsets_s[:, None] - beats_s[None]).min(axis=1)
    return float((away <= ON_BEAT_S).mean())


def _librosa_key(mono: NDArray[np.float32]) -> str:
    chroma = librosa.feature.chroma_cqt(y=librosa.effects.harmonic(mono), sr=44_100).sum(axis=1)
    scores = {
        f"{NAMES[tonic]} {mode}": float(np.corrcoef(chroma, np.roll(profile, tonic))[0, 1])
        for mode, profile in KRUMHANSL.items()
        for tonic in range(12)
    }
    return max(scores, key=lambda key: scores[key])


def _essentia_key(mono: NDArray[np.float32]) -> str:
    tonic, mode, _ = essentia.KeyExtractor()(mono)
    return f"{FLATS.get(tonic, tonic)} {mode}"


def checks_of_songs(songs: Sequence[dict[str, Any]]) -> list[Check]:
    """What must show of all songs; nothing where there are none."""
    if not songs:
        return []
    halves = sum(_agrees_in_tempo(song["tempo_bpm"], (0.5, 1.0, 2.0)) for song in songs)
    agreed = sum(len(set(_of_libraries(song["key"]))) == 1 for song in songs)
    return [
        _check(
            "tempo within 2 % of a library's",
            {song["song"]: _agrees_in_tempo(song["tempo_bpm"], (1.0,)) for song in songs},
            f"{halves} where half and double count",
        ),
        _check(
            "key is a library's",
            {song["song"]: song["key"]["ours"] in _of_libraries(song["key"]) for song in songs},
            f"in {agreed} the libraries agree with each other",
        ),
        _check(
            "90 % of the onsets on beats within 70 ms of a reference's beats",
            {
                song["song"]: max(song["onsets_on_beats_near_beats_of"].values()) >= ON_BEATS
                for song in songs
            },
            "the chart's, librosa's or Essentia's",
        ),
    ]


def _check(name: str, found: dict[str, bool], remark: str) -> Check:
    wrong = [song for song, holds in found.items() if not holds]
    text = f"{len(found) - len(wrong)} of {len(found)}; {remark}"
    value = text + (f"; not {', '.join(wrong)}" if wrong else "")
    return Check(f"records: {name}", value, "all", not wrong)


def _of_libraries(values: dict[str, Any]) -> list[Any]:
    return [values[name] for name in LIBRARIES]


def _agrees_in_tempo(tempo_bpm: dict[str, float], factors: Sequence[float]) -> bool:
    ours = tempo_bpm["ours"]
    return any(
        abs(ours / other / factor - 1) <= SAME_TEMPO
        for other in _of_libraries(tempo_bpm)
        for factor in factors
    )
