"""Tokens: exact inverses on the grid, and a grammar that only lets playable bars through."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remix.note_tokens import (
    BAR,
    BAR_TOKENS,
    CHORD_QUALITIES,
    DRUMS,
    DURATIONS_STEPS,
    GIVEN_TOKENS,
    HIGHEST,
    LOWEST,
    METERS,
    NO_CHORD,
    PLAYED_HIGHEST,
    PLAYED_LOWEST,
    ROLES,
    SPANS,
    STEPS_PER_BEAT,
    STRUCK_AT_ONCE,
    STYLES,
    TEMPO_EDGES_BPM,
    VELOCITY_LEVELS,
    VOCABULARY_SIZE,
    Bar,
    BarConditions,
    BarGrammar,
    GridNote,
    Header,
    chord_pitch_classes,
    decode_bar,
    decode_header,
    encode_bar,
    encode_header,
    nearest_duration_steps,
    split_bars,
    tempo_class,
)

UNHURRIED = settings(deadline=None)  # a loaded machine is no failure

headers = st.builds(
    Header,
    st.sampled_from(METERS),
    st.integers(0, len(TEMPO_EDGES_BPM)),
    st.integers(0, len(STYLES) - 1),
)
chords = st.tuples(st.integers(0, NO_CHORD), st.integers(0, NO_CHORD))


@st.composite
def notes(draw: st.DrawFn, beats_per_bar: int, is_played: bool) -> GridNote:
    track = draw(st.integers(0, len(ROLES) - 1))
    lowest, highest = (PLAYED_LOWEST, PLAYED_HIGHEST) if is_played else (LOWEST, HIGHEST)
    return GridNote(
        track,
        draw(st.integers(0, beats_per_bar * STEPS_PER_BEAT - 1)),
        1 if track == DRUMS else draw(st.sampled_from(DURATIONS_STEPS)),
        draw(st.integers(lowest[track], highest[track])),
    )


@st.composite
def bars(draw: st.DrawFn, beats_per_bar: int, is_played: bool = False) -> Bar:
    unique = {
        (note.track, note.onset_steps, note.pitch): note
        for note in draw(st.lists(notes(beats_per_bar, is_played), max_size=40))
    }
    if is_played:
        onsets: dict[tuple[int, int], list[GridNote]] = {}
        for note in unique.values():
            onsets.setdefault((note.track, note.onset_steps), []).append(note)
        kept = [note for (track, _), at in onsets.items() for note in at[: STRUCK_AT_ONCE[track]]]
        unique = {(note.track, note.onset_steps, note.pitch): note for note in kept}
    tracks = {note.track for note in unique.values()}
    velocities = {track: draw(st.integers(0, VELOCITY_LEVELS - 1)) for track in sorted(tracks)}
    density = draw(st.integers(0, 5))
    conditions = BarConditions(draw(chords), density, sum(1 << track for track in tracks))
    return Bar(conditions, velocities, tuple(sorted(unique.values())))


@UNHURRIED
@given(headers)
def test_header_of_tokens_of_header_is_the_header(header: Header) -> None:
    assert decode_header(encode_header(header)) == header


@UNHURRIED
@given(st.sampled_from(METERS).flatmap(bars))
def test_bar_of_tokens_of_bar_is_the_bar(bar: Bar) -> None:
    assert decode_bar(encode_bar(bar)) == bar


@UNHURRIED
@given(st.lists(bars(4), min_size=1, max_size=4))
def test_bars_of_a_stream_are_split_where_they_were_joined(song: list[Bar]) -> None:
    stream = [token for bar in song for token in encode_bar(bar)]
    assert [decode_bar(tokens) for tokens in split_bars(stream)] == song


@UNHURRIED
@given(
    st.sampled_from(METERS).flatmap(
        lambda beats: st.tuples(st.just(beats), bars(beats, is_played=True))
    )
)
def test_grammar_accepts_every_bar_that_can_be_played(beats_and_bar: tuple[int, Bar]) -> None:
    beats, bar = beats_and_bar
    tokens = encode_bar(bar)
    grammar = BarGrammar(beats, bar.conditions)
    for token in [*tokens[1 + GIVEN_TOKENS :], BAR]:
        assert grammar.allowed()[token]
        grammar.push(token)
    assert grammar.done
    assert len(tokens) < BAR_TOKENS


@UNHURRIED
@given(st.sampled_from(METERS), chords, st.integers(0, 2 ** len(ROLES) - 1), st.integers(0, 2**32))
def test_any_walk_through_the_grammar_is_a_playable_bar(
    beats: int, pair: tuple[int, int], tracks: int, seed: int
) -> None:
    conditions = BarConditions(pair, 0, tracks)
    grammar = BarGrammar(beats, conditions)
    rng = np.random.default_rng(seed)
    eagerness = rng.random()  # how often a walk prefers going on to closing
    tokens = [BAR, *conditions.tokens]
    while True:
        allowed = np.flatnonzero(grammar.allowed())
        onward = allowed[allowed >= SPANS["position"][0]]
        token = int(rng.choice(onward if len(onward) and rng.random() < eagerness else allowed))
        grammar.push(token)
        if grammar.done:
            break
        tokens.append(token)
    assert len(tokens) < BAR_TOKENS
    bar = decode_bar(tokens)
    assert encode_bar(bar) == tokens
    assert {note.track for note in bar.notes} == {t for t in range(len(ROLES)) if tracks >> t & 1}
    assert len({(n.track, n.onset_steps, n.pitch) for n in bar.notes}) == len(bar.notes)
    at_once = Counter((note.track, note.onset_steps) for note in bar.notes)
    assert all(count <= STRUCK_AT_ONCE[track] for (track, _), count in at_once.items())
    for note in bar.notes:
        assert PLAYED_LOWEST[note.track] <= note.pitch <= PLAYED_HIGHEST[note.track]
        assert 0 <= note.onset_steps < beats * STEPS_PER_BEAT


def test_a_bar_transposed_by_an_octave_of_roots_keeps_its_note_tokens() -> None:
    def tokens(root: int) -> list[int]:
        chord = root * len(CHORD_QUALITIES)
        grid = tuple(GridNote(3, 0, 12, 60 + root + step) for step in (0, 4, 7))
        return encode_bar(Bar(BarConditions((chord, chord), 0, 8), {3: 5}, grid))

    assert all(tokens(root)[GIVEN_TOKENS:] == tokens(0)[GIVEN_TOKENS:] for root in range(12))


def test_spans_cover_the_vocabulary_without_gaps() -> None:
    edges = [edge for span in SPANS.values() for edge in span]
    assert edges[0] == 0
    assert edges[-1] == VOCABULARY_SIZE
    assert edges[1:-1:2] == edges[2::2]


def test_chord_without_notes_has_no_pitch_classes() -> None:
    assert chord_pitch_classes(NO_CHORD) == frozenset()


@pytest.mark.parametrize(("bpm", "expected"), [(30.0, 0), (70.0, 1), (120.0, 4), (400.0, 7)])
def test_tempo_falls_into_its_class(bpm: float, expected: int) -> None:
    assert tempo_class(bpm) == expected


@UNHURRIED
@given(st.floats(0.01, 500.0))
def test_durations_are_clamped_to_the_table(steps: float) -> None:
    assert nearest_duration_steps(steps) in DURATIONS_STEPS
