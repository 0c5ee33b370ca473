"""tracks <-> Standard MIDI file, on the song's own beats.

Notes keep their seconds: the file's tempo map follows the song's beats, so that a sequencer shows
its bars, and a player that follows the map plays every note where it was heard.
"""

from __future__ import annotations

import io
from math import ceil, floor
from typing import get_args

import mido
import numpy as np
from mido.midifiles import KeySignatureError
from numpy.typing import NDArray

from remix.errors import InvalidNotes
from remix.notes import ROLES, BeatGrid, Note, Role, Tracks

PROGRAMS: dict[Role, int] = {
    "drums": 0,
    "bass": 33,
    "guitar": 25,
    "piano": 0,
    "strings": 48,
}
"""General MIDI Level 1 program of each role, counted from 0: standard kit, fingered electric bass,
steel-string guitar, acoustic grand, string ensemble 1."""

DRUM_CHANNEL = 9
"""Channel 10 of General MIDI, counted from 0."""

CHANNELS: dict[Role, int] = {
    "drums": DRUM_CHANNEL,
    "bass": 0,
    "guitar": 1,
    "piano": 2,
    "strings": 3,
}

TICKS_PER_BEAT = 960

_FAMILIES: tuple[Role, ...] = (
    "piano",  # pianos
    "piano",  # chromatic percussion
    "piano",  # organs
    "guitar",
    "bass",
    "strings",
    "strings",  # ensembles
    "strings",  # brass
    "strings",  # reeds
    "strings",  # pipes
    "guitar",  # synth leads
    "strings",  # synth pads
    "strings",  # synth effects
    "guitar",  # sitar, banjo, …
    "drums",  # percussive
    "drums",  # sound effects
)
"""The role that takes each of General MIDI's sixteen families of eight programs."""


def role_of_program(program: int, is_drum: bool = False) -> Role:
    """The role that plays what a MIDI file gives to `program` (0 to 127).

    >>> role_of_program(40)
    'strings'
    """
    return "drums" if is_drum else _FAMILIES[program // 8]


def write_midi(tracks: Tracks, grid: BeatGrid, duration_s: float) -> bytes:
    """A MIDI file of type 1: the tempo map, then one track for each role.

    Args:
        tracks: notes by role, in seconds.
        grid: whose beats become the file's beats.
        duration_s: the song's length; what lies beyond is cut off.
    """
    clock = _Clock.of(grid, duration_s)
    file = mido.MidiFile(type=1, ticks_per_beat=TICKS_PER_BEAT)
    file.tracks.append(_tempo_track(grid, clock, duration_s))
    for role in ROLES:
        if tracks.get(role):
            file.tracks.append(_note_track(role, tracks[role], clock, duration_s))
    written = io.BytesIO()
    file.save(file=written)
    return written.getvalue()


def read_midi(data: bytes) -> Tracks:
    """The notes of a MIDI file, by role, in seconds.

    Args:
        data: a MIDI file of any type.

    Returns:
        Notes sorted by onset. Tracks that this module wrote come back under their role; others
        are told by channel 10 and by program.

    Raises:
        InvalidNotes: it is no MIDI file, or a damaged one.
    """
    try:
        file = mido.MidiFile(file=io.BytesIO(data), clip=True)
        if file.ticks_per_beat <= 0:
            raise ValueError(f"{file.ticks_per_beat} ticks a beat")
        clock = _Clock.read(file)
        tracks: Tracks = {}
        for track in file.tracks:
            _read_track(track, clock, tracks)
    except (OSError, EOFError, ValueError, IndexError, KeyError, KeySignatureError) as error:
        reason = str(error) or "it ends early"
        raise InvalidNotes(
            f"The file of {len(data)} bytes is no whole MIDI file ({reason}).",
            value=len(data),
            limit="a whole MIDI file",
            remedy="Export it again as a Standard MIDI file.",
        ) from error
    return {role: sorted(tracks[role]) for role in ROLES if role in tracks}


class _Clock:
    """Ticks and seconds: straight lines between the points at which the tempo changes."""

    def __init__(self, ticks: NDArray[np.float64], times_s: NDArray[np.float64]) -> None:
        self.ticks = ticks
        self.times_s = times_s

    @classmethod
    def of(cls, grid: BeatGrid, duration_s: float) -> _Clock:
        """Time 0 at tick 0, then the grid's beats, a whole beat of ticks apart."""
        first = _first_beat(grid)
        beats = np.arange(first, max(first, ceil(float(grid.beat_at(duration_s)))) + 1.0)
        ticks = np.arange(len(beats) + 1, dtype=np.float64) * TICKS_PER_BEAT
        return cls(ticks, np.concatenate([[0.0], grid.time_at(beats)]))

    @classmethod
    def read(cls, file: mido.MidiFile) -> _Clock:
        """The tempo changes of a file, whatever track they are in."""
        changes = {0: 500_000}  # microseconds a beat: the standard's default
        last_tick = 0
        for track in file.tracks:
            tick = 0
            for message in track:
                tick += message.time
                if message.type == "set_tempo":
                    changes[tick] = message.tempo
            last_tick = max(last_tick, tick)
        ticks = np.array([*sorted(changes), max(last_tick, max(changes)) + 1], np.float64)
        tempos = np.array([changes[tick] for tick in sorted(changes)], np.float64)
        lengths_s = np.diff(ticks) * tempos / 1e6 / file.ticks_per_beat
        return cls(ticks, np.concatenate([[0.0], np.cumsum(lengths_s)]))

    def tick_at(self, time_s: float) -> int:
        return round(float(np.interp(time_s, self.times_s, self.ticks)))

    def time_at(self, tick: int) -> float:
        return float(np.interp(tick, self.ticks, self.times_s))


def _first_beat(grid: BeatGrid) -> int:
    """The beat that stands one beat after tick 0, half a beat to one and a half after time 0.

    A song seldom starts on a beat, and a file always does: the tempo of the first beat makes up
    for it, so that every later beat is a beat of the file too.
    """
    return round(float(grid.beat_at(0.0))) + 1


def _tempo_track(grid: BeatGrid, clock: _Clock, duration_s: float) -> mido.MidiTrack:
    track = mido.MidiTrack()
    track.append(mido.MetaMessage("track_name", name="Tempo", time=0))
    names = ("C", "Db", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")
    minor_names = ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "G#", "A", "Bb", "B")
    key = names[grid.tonic] if grid.mode == "major" else minor_names[grid.tonic] + "m"
    track.append(mido.MetaMessage("key_signature", key=key, time=0))
    pickup = (grid.first_downbeat - _first_beat(grid)) % grid.beats_per_bar + 1
    events: list[tuple[int, mido.MetaMessage]] = []
    for tick, beats in {0: pickup, pickup * TICKS_PER_BEAT: grid.beats_per_bar}.items():
        if clock.time_at(tick) < duration_s:
            meter = mido.MetaMessage("time_signature", numerator=beats, denominator=4, time=0)
            events.append((tick, meter))
    slopes = np.diff(clock.times_s) / np.diff(clock.ticks) * TICKS_PER_BEAT * 1e6
    for tick, tempo in zip(clock.ticks, slopes, strict=False):
        tempo_us = int(np.clip(round(tempo), 1, 0xFFFFFF))
        events.append((int(tick), mido.MetaMessage("set_tempo", tempo=tempo_us, time=0)))
    return _append(track, events)


def _note_track(role: Role, notes: list[Note], clock: _Clock, duration_s: float) -> mido.MidiTrack:
    channel = CHANNELS[role]
    track = mido.MidiTrack()
    track.append(mido.MetaMessage("track_name", name=role, time=0))
    program = PROGRAMS[role]
    track.append(mido.Message("program_change", channel=channel, program=program, time=0))
    last_tick = floor(float(np.interp(duration_s, clock.times_s, clock.ticks)))
    events: list[tuple[int, mido.Message]] = []
    for note in without_overlaps(notes):
        start = clock.tick_at(max(note.onset_s, 0.0))
        end = min(max(clock.tick_at(note.end_s), start + 1), last_tick)
        if note.end_s <= 0 or start >= end:
            continue
        on = mido.Message("note_on", channel=channel, note=note.pitch, velocity=note.velocity)
        events += [(start, on), (end, mido.Message("note_off", channel=channel, note=note.pitch))]
    return _append(track, events)


def without_overlaps(notes: list[Note]) -> list[Note]:
    """Notes of a pitch end where its next one begins: MIDI has one voice for each key.

    Of notes of a pitch that begin together the loudest stays.

    >>> [note.duration_s for note in without_overlaps([Note(0, 3, 60, 9), Note(1, 1, 60, 9)])]
    [1, 1]
    """
    by_pitch: dict[int, list[Note]] = {}
    for note in sorted(notes):
        of_pitch = by_pitch.setdefault(note.pitch, [])
        if of_pitch and of_pitch[-1].onset_s == note.onset_s:
            note = max(note, of_pitch.pop(), key=lambda same: same.velocity)
        elif of_pitch and of_pitch[-1].end_s > note.onset_s:
            before = of_pitch.pop()
            length_s = note.onset_s - before.onset_s
            of_pitch.append(Note(before.onset_s, length_s, before.pitch, before.velocity))
        of_pitch.append(note)
    return sorted(note for of_pitch in by_pitch.values() for note in of_pitch)


def _append(track: mido.MidiTrack, events: list[tuple[int, mido.Message]]) -> mido.MidiTrack:
    """Sort by tick, ends before starts, and write the differences."""
    order = {"note_off": 0, "time_signature": 1, "set_tempo": 2, "note_on": 3}
    now = 0
    for tick, message in sorted(events, key=lambda event: (event[0], order[event[1].type])):
        track.append(message.copy(time=tick - now))
        now = tick
    track.append(mido.MetaMessage("end_of_track", time=0))
    return track


def _read_track(track: mido.MidiTrack, clock: _Clock, tracks: Tracks) -> None:
    named = next((m.name.strip().lower() for m in track if m.type == "track_name"), "")
    role_by_name = next((role for role in get_args(Role) if role == named), None)
    programs: dict[int, int] = {}
    sounding: dict[tuple[int, int], tuple[float, int, Role]] = {}
    tick = 0

    def end(key: tuple[int, int], time_s: float) -> None:
        onset_s, velocity, role = sounding.pop(key)
        if time_s > onset_s:
            tracks.setdefault(role, []).append(Note(onset_s, time_s - onset_s, key[1], velocity))

    for message in track:
        tick += message.time
        if message.type == "program_change":
            programs[message.channel] = message.program
        if message.type not in ("note_on", "note_off"):
            continue
        key, time_s = (message.channel, message.note), clock.time_at(tick)
        if key in sounding:
            end(key, time_s)
        if message.type == "note_on" and message.velocity > 0:
            role = role_by_name or role_of_program(
                programs.get(message.channel, 0), message.channel == DRUM_CHANNEL
            )
            sounding[key] = (time_s, message.velocity, role)
    for key in list(sounding):
        end(key, clock.time_at(tick))
