"""Training of the separator: songs in parts, examples, and a run that is killed and goes on."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from demucs.htdemucs import HTDemucs

from export.artefact import Wanted, write_artefact
from export.install import note_installed
from export.separate_stems import load_demucs
from remix.note_tokens import chord_pitch_classes
from remix.settings import read_settings
from runners.separate_stems import served_model
from tests.test_generate_training import toy_song
from training.melodies import REACH_SEMITONES, MelodyNote, draw_melody
from training.separate_stems import (
    NETWORK,
    SMOKE_NETWORK,
    Trainer,
    TrainingOptions,
    sdr_db,
    spectra_loss,
)
from training.stem_data import STEMS, Augmentation, Examples, example, find_tracks, read_stem
from training.stem_songs import (
    HELD_OUT_VOICES,
    Material,
    Part,
    draw_song,
    find_fonts,
    find_voices,
    make_song,
    play,
)
from training.sung_voices import Voice, sing

ROOT = Path(__file__).resolve().parent.parent
RATE_HZ = 44_100


def write_tones(folder: Path, hz: float, seconds: float = 1.5) -> None:
    """A song whose stems are tones of different pitches."""
    folder.mkdir(parents=True)
    times_s = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    for index, stem in enumerate(STEMS):
        tone = 0.1 * np.sin(2 * np.pi * hz * (index + 1) * times_s)
        suffix = "wav" if index % 2 else "flac"
        soundfile.write(folder / f"{stem}.{suffix}", np.stack([tone, tone], 1), RATE_HZ)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for index, hz in enumerate((110.0, 170.0, 230.0)):
        write_tones(tmp_path / "songs" / "train" / f"song-{index}", hz)
    write_tones(tmp_path / "songs" / "test" / "song-0", 140.0)
    return tmp_path / "songs"


@pytest.fixture
def threads() -> Iterator[None]:
    """A trainer sets the number of threads of the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def options_of(data: Path, out: Path, steps: int = 6) -> TrainingOptions:
    return TrainingOptions(
        data,
        out,
        minutes=1e9,
        steps=steps,
        batch=1,
        segment_s=0.5,
        learning_rate=3e-3,
        warmup_steps=1,
        evaluate_every=3,
        network=SMOKE_NETWORK,
    )


def test_small_network_fits_in_16_mb_of_halves() -> None:
    model = HTDemucs(**NETWORK)
    assert 2 * sum(parameter.numel() for parameter in model.parameters()) < 16e6


def test_folder_in_the_layout_of_musdb_is_read_with_and_without_a_test_part(data: Path) -> None:
    tracks, held_out = find_tracks(data)
    assert [track.name for track in tracks] == ["song-0", "song-1", "song-2"]
    assert [track.name for track in held_out] == ["song-0"]
    assert tracks[0].n_samples == round(1.5 * RATE_HZ)
    kept, by_hash = find_tracks(data / "train")
    assert sorted(track.name for track in kept + by_hash) == ["song-0", "song-1", "song-2"]
    (data / "train/song-1/bass.wav").unlink()
    without_bass = find_tracks(data)[0][1]
    assert not read_stem(without_bass, "bass", 0, 100).any()
    assert read_stem(without_bass, "drums", 0, 100).any()


def test_example_without_augmentation_is_one_song_and_its_mixture_the_sum(data: Path) -> None:
    track = find_tracks(data)[0][1]
    mixture, stems = example([track], 20_000, None, np.random.default_rng(0))
    np.testing.assert_allclose(mixture, stems.sum(0), atol=1e-5)  # float32 sums
    assert np.isclose(mixture.mean(0).std(), 1.0, atol=1e-3)
    for index, stem in enumerate(stems):
        strongest = np.abs(np.fft.rfft(stem[0])).argmax() * RATE_HZ / 20_000
        assert abs(strongest - 170.0 * (index + 1)) < 3.0  # a bin is 2.2 Hz


def test_augmented_examples_are_the_same_for_a_number_and_differ_between_numbers(
    data: Path,
) -> None:
    tracks = find_tracks(data)[0]
    everything = Augmentation(1.0, 0.2, 1.0, 1.0, True, 1.0)
    first, second = (Examples(tracks, 20_000, everything, seed=3) for _ in range(2))
    for index in range(4):
        for ours, theirs in zip(first[index], second[index], strict=True):
            assert torch.equal(ours, theirs)
            assert torch.isfinite(ours).all()
    assert not torch.equal(first[0][0], first[1][0])


def test_vorbis_moves_nothing_in_time(data: Path) -> None:
    tracks = find_tracks(data)[0]
    coded = Augmentation(0.0, 0.0, 0.0, 0.0, False, 1.0)
    mixture, stems = example(tracks, 30_000, coded, np.random.default_rng(1))
    error = mixture - stems.sum(0)
    assert 0 < np.square(error).sum() < 0.01 * np.square(stems.sum(0)).sum()  # 20 dB


def test_losses_are_zero_for_the_target_and_sdr_of_half_is_6_db() -> None:
    target = torch.randn(2, 4, 2, 9000, generator=torch.Generator().manual_seed(0))
    assert float(spectra_loss(target, target)) == 0.0
    assert float(spectra_loss(target * 0.5, target)) > 0.0
    torch.testing.assert_close(sdr_db(target * 0.5, target), torch.full((2, 4), 6.0206))


@pytest.mark.usefixtures("threads")
def test_loss_falls_and_the_model_file_is_a_checkpoint_of_demucs(data: Path) -> None:
    trainer = Trainer(options_of(data, data / "out", steps=9))
    trainer.run()
    assert trainer.log[-1]["held_out_loss"] < trainer.log[0]["held_out_loss"]
    assert (data / "out/curve.png").stat().st_size > 1000
    original = load_demucs(data / "out/model.th")
    assert original.facts["stems"] == list(STEMS)
    assert original.window_samples == int(Fraction(39, 5) * RATE_HZ)
    again = Trainer(
        TrainingOptions(
            data, data / "next", network=SMOKE_NETWORK, begin_with=data / "out/model.th"
        )
    )
    for name, value in again.model.state_dict().items():
        # fp16 has 11 bits of mantissa
        torch.testing.assert_close(value, trainer.average.state_dict()[name], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("threads")
def test_model_of_a_run_is_exported_and_served_as_demucs_has_it(data: Path) -> None:
    Trainer(options_of(data, data / "out", steps=3)).run()
    original = load_demucs(data / "out/model.th")
    entry = write_artefact(original, Wanted("stems-small", "trained-here"), data / "models")
    note_installed(data / "models", [file.path for file in entry.files])
    served = served_model(entry, replace(read_settings(), models_dir=data / "models"))
    window = original.windows(1)
    stems = served({"mixture": window})["stems"]
    expected = original.reference({"mixture": window})["stems"]
    assert stems.shape == (1, len(STEMS), 2, original.window_samples)
    assert np.abs(expected).max() > 0.01, "nothing to compare"
    # float32 sums in another order: 1e-5 at most of a window at deviation 1, elsewhere.
    assert np.abs(stems - expected).max() < 1e-4


@pytest.mark.usefixtures("threads")
def test_run_in_bfloat16_is_finite(data: Path) -> None:
    """As on CUDA, where autocast is on."""
    options = TrainingOptions(**{**vars(options_of(data, data / "out", 1)), "autocast": True})
    trainer = Trainer(options)
    trainer.run()
    assert np.isfinite(trainer.log[-1]["loss"])
    assert np.isfinite(trainer.log[-1]["held_out_loss"])


def command(data: Path, out: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "training.separate_stems", "--data", str(data)),
        *("--out", str(out), "--network", "smoke", "--steps", "12", "--batch", "1"),
        *("--segment-s", "0.5", "--evaluate-every", "4", "--warmup-steps", "1"),
        *("--device", "cpu", "--minutes", "1e9", "--workers", "1"),
    ]


@pytest.mark.slow
def test_killed_run_ends_where_the_whole_run_does(data: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    subprocess.run(command(data, whole), cwd=ROOT, check=True, capture_output=True)
    with subprocess.Popen(
        command(data, parts), cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if json.loads(line)["step"] == 4:  # its checkpoint is being written
                os.killpg(run.pid, signal.SIGKILL)
                break
    assert run.returncode == -signal.SIGKILL
    subprocess.run(command(data, parts), cwd=ROOT, check=True, capture_output=True)
    ends = [torch.load(out / "checkpoint.pt", weights_only=True) for out in (whole, parts)]
    assert [end["step"] for end in ends] == [12, 12]
    for name, value in ends[0]["model"].items():
        assert torch.equal(value, ends[1]["model"][name]), name
    rows = [[row["held_out_loss"] for row in end["log"]] for end in ends]
    assert rows[0] == rows[1]


def test_melody_keeps_to_the_chords_and_near_its_middle() -> None:
    chords = toy_song(1).chords[:16]
    melody = draw_melody(chords, 4, 0.5, 64, np.random.default_rng(0))
    assert len(melody) > 20
    for note, following in zip(melody, melody[1:], strict=False):
        bar, beat = divmod(note.onset_s / 0.5, 4)
        chord = int(chords[int(bar), int(beat >= 2)])
        assert (64 + note.pitch) % 12 in chord_pitch_classes(chord)
        assert abs(note.pitch) <= REACH_SEMITONES
        assert note.onset_s + note.duration_s <= following.onset_s + 1e-9


@pytest.fixture(scope="module")
def fonts() -> dict[str, Path]:
    """The SoundFont that the service plays with; others where they are installed."""
    return find_fonts([ROOT / ".cache/stem_material", Path("/usr/share/sounds")], held_out=False)


def test_part_is_played_at_its_pitch_and_time(fonts: dict[str, Path]) -> None:
    part = Part("bass", next(iter(fonts)), 0, 33, ((0.5, 0.6, 45, 100),), (0.5, 0.5, 0.5, 0, 0))
    sound = play(part, fonts[part.font], 1.5)
    assert sound.shape == (2, round(1.5 * RATE_HZ))
    assert np.abs(sound[:, : round(0.49 * RATE_HZ)]).max() < 1e-3
    spectrum = np.abs(np.fft.rfft(sound[0, round(0.55 * RATE_HZ) : round(1.05 * RATE_HZ)]))
    peaks_hz = 2.0 * np.flatnonzero(spectrum > 0.3 * spectrum.max())  # bins of 2 Hz
    assert any(abs(peak - 110.0) <= 3.0 for peak in peaks_hz)  # A2


def test_song_has_its_stems_and_notes_and_is_made_once(
    fonts: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "takes/train").mkdir(parents=True)
    take = 0.3 * np.sin(2 * np.pi * 300 * np.arange(3 * RATE_HZ) / RATE_HZ)
    soundfile.write(tmp_path / "takes/train/0000.ogg", take, RATE_HZ, "VORBIS", format="OGG")
    material = Material((toy_song(1), toy_song(2)), fonts, tmp_path, "train", 3.0, takes=1)
    assert make_song(material, 1) == "song-0001"
    before = (tmp_path / "train/song-0001/bass.flac").read_bytes()
    facts = json.loads((tmp_path / "train/song-0001/song.json").read_text())
    bass = [
        row for part in draw_song(material, 1).parts if part.stem == "bass" for row in part.notes
    ]
    assert len(facts["notes"]["bass"]) == len(bass) > 0
    stems = [soundfile.read(io.BytesIO((tmp_path / f"train/song-0001/{s}.flac").read_bytes()))[0]
             for s in STEMS]  # fmt: skip
    assert {stem.shape for stem in stems} == {(3 * RATE_HZ, 2)}
    assert np.abs(np.sum(stems, axis=0)).max() <= 0.901
    assert make_song(material, 1) == ""
    (tmp_path / "train/song-0001").rename(tmp_path / "away")
    make_song(material, 1)
    assert (tmp_path / "train/song-0001/bass.flac").read_bytes() == before


def test_speakers_of_the_packages_are_told_apart(tmp_path: Path) -> None:
    for path in (
        "asterisk/sounds/en_US_f_Allison/digits/1.g722",
        "asterisk/sounds/es_MX_f_Allison/hello.g722",
        "asterisk/sounds/it_IT_m_Carlo/beep.g722",
        "games/fillets-ng/sound/city/cs/vit-m-hlava.ogg",
        "games/fillets-ng/sound/city/cs/vit-v-hlava.ogg",
        "games/fillets-ng/music/menu.ogg",
        "tuxpaint/stamps/animals/dog_desc_fr.ogg",
        "tuxpaint/stamps/animals/dog.ogg",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    found = {voice.name: len(voice.recordings) for voice in find_voices(tmp_path)}
    # One woman speaks English and Spanish; music and barking are no voices.
    assert found == {
        "Allison": 2,
        "fillets-big": 1,
        "fillets-small": 1,
        "it_IT_m_Carlo": 1,
        "tuxpaint": 1,
    }
    assert HELD_OUT_VOICES & found.keys() == {"it_IT_m_Carlo"}


def test_take_has_the_melodys_pitch(tmp_path: Path) -> None:
    """A buzz of 120 Hz that is 'spoken' is sung at the melody's steps."""
    times = np.arange(2 * 16_000) / 16_000
    buzz = sum(np.sin(2 * np.pi * 120 * n * times) / n for n in range(1, 30))
    soundfile.write(tmp_path / "buzz.wav", 0.2 * buzz, 16_000)
    voice = Voice("buzz", (tmp_path / "buzz.wav",))
    melody = [MelodyNote(0.2, 1.0, 0), MelodyNote(1.2, 1.0, 7)]
    take = sing(voice, melody, 45, 3 * RATE_HZ, np.random.default_rng(4))
    assert take.shape == (3 * RATE_HZ,)
    assert np.isclose(np.abs(take).max(), 0.5)
    found_hz = []
    for at_s in (0.6, 1.8):
        part = take[round(at_s * RATE_HZ) :][: RATE_HZ // 4]
        correlation = np.correlate(part, part, "full")[len(part) :]
        low, high = RATE_HZ // 500, RATE_HZ // 100
        found_hz.append(RATE_HZ / (low + 1 + correlation[low:high].argmax()))
    pitches = 69 + 12 * np.log2(np.array(found_hz) / 440)
    # An A, and the E above it; vibrato of half a semitone, drift.
    assert abs((pitches[0] - 45 + 6) % 12 - 6) < 0.8
    assert abs(pitches[1] - pitches[0] - 7) < 1.0
