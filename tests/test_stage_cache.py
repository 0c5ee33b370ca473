"""The stage cache: a hit is what was computed, byte for byte, and damage is a miss."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from jobs.files import Files
from jobs.stage_cache import DamagedEntry, StageCache, decode_entry, encode_entry
from remix.manifest import read_manifest
from tests.fakes import CountingInfer

MODEL = "basic-pitch"
"""Any entry of the manifest."""


def window(seed: int) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(seed)
    return {"audio": rng.standard_normal((1, 500)).astype(np.float32), "at": np.array([[seed]])}


def cache_at(folder: Path | str, max_bytes: int = 10**9) -> StageCache:
    return StageCache(Files(str(folder)), max_bytes, read_manifest(), Path("no models"))


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=9),
        arrays.arrays(
            st.sampled_from([np.float32, np.int64, np.float16, np.bool_]),
            arrays.array_shapes(max_dims=3, max_side=5),
        ),
        max_size=4,
    )
)
def test_entry_is_what_was_encoded(outputs: dict[str, NDArray[Any]]) -> None:
    again = decode_entry(encode_entry(outputs))
    assert list(again) == list(outputs)
    for name, array in outputs.items():
        assert again[name].dtype == array.dtype
        assert again[name].shape == array.shape
        assert again[name].tobytes() == array.tobytes()  # NaN too


@given(st.data())
def test_entry_with_any_change_is_damaged(data: st.DataObject) -> None:
    entry = bytearray(encode_entry(window(1)))
    place = data.draw(st.integers(0, len(entry) - 1))
    if data.draw(st.booleans()):
        entry[place] ^= data.draw(st.integers(1, 255))
    else:
        del entry[place:]
    with pytest.raises(DamagedEntry):
        decode_entry(bytes(entry))


@pytest.mark.parametrize("url", ["folder", "memory://cache"])
def test_second_song_hits_what_the_first_computed(tmp_path: Path, url: str) -> None:
    async def work() -> None:
        address = str(tmp_path / "cache") if url == "folder" else url
        cache, first = cache_at(address), CountingInfer()
        computed = await cache.for_song(first)(MODEL, window(1))
        await cache.close()  # all is written now, and another process may read it
        again, second = cache_at(address), CountingInfer()
        infer = again.for_song(second)
        found = await infer(MODEL, window(1))
        assert {k: v.tobytes() for k, v in found.items()} == {
            k: v.tobytes() for k, v in computed.items()
        }
        assert (first.calls, second.calls) == (1, 0)
        assert infer.times["transcribe_notes"].cached == 1
        # Whatever differs in an input, or in the model, is another window.
        for model, inputs in (
            (MODEL, window(2)),
            (MODEL, {**window(1), "at": np.array([[1]], np.int32)}),
            (MODEL, {**window(1), "audio": window(1)["audio"].reshape(1, 5, 100)}),
            ("fcpe", window(1)),
        ):
            calls = second.calls
            await infer(model, inputs)
            assert second.calls == calls + 1
        await again.close()

    asyncio.run(work())


def test_damaged_entry_is_computed_anew(tmp_path: Path) -> None:
    async def work() -> None:
        cache, infer = cache_at(tmp_path), CountingInfer()
        song = cache.for_song(infer)
        before = await song(MODEL, window(1))
        await cache.close()
        (entry,) = entries(tmp_path)
        entry.write_bytes(entry.read_bytes()[:-1])
        cache = cache_at(tmp_path)
        after = await cache.for_song(infer)(MODEL, window(1))
        assert infer.calls == 2
        assert after["out"].tobytes() == before["out"].tobytes()
        await cache.close()
        assert decode_entry(entry.read_bytes())  # and is whole again

    asyncio.run(work())


def test_songs_that_want_the_same_window_at_once_compute_it_once(tmp_path: Path) -> None:
    async def work() -> None:
        cache, infer = cache_at(tmp_path), CountingInfer()
        songs = [cache.for_song(infer)(MODEL, window(1)) for _ in range(8)]
        outputs = await asyncio.gather(*songs)
        assert infer.calls == 1
        assert len({output["out"].tobytes() for output in outputs}) == 1
        await cache.close()

    asyncio.run(work())


def test_who_waits_for_a_window_goes_on_when_its_song_is_cancelled(tmp_path: Path) -> None:
    async def work() -> None:
        cache, infer = cache_at(tmp_path), CountingInfer()
        infer.gate.clear()
        first = asyncio.create_task(cache.for_song(infer)(MODEL, window(1)))
        second = asyncio.create_task(cache.for_song(infer)(MODEL, window(1)))
        await infer.was_called.wait()
        first.cancel()
        infer.gate.set()
        assert (await second)["out"].size
        assert infer.calls == 2
        assert first.cancelled()
        await cache.close()

    asyncio.run(work())


def test_least_recently_used_entries_go_when_there_is_no_room(tmp_path: Path) -> None:
    async def work() -> None:
        size = len(encode_entry(await CountingInfer()(MODEL, window(0))))
        cache, infer = cache_at(tmp_path, max_bytes=10 * size), CountingInfer()
        song = cache.for_song(infer)
        for seed in range(40):
            await song(MODEL, window(seed))
            await song(MODEL, window(0))  # in use all the time
        await cache.close()
        assert infer.calls == 40
        kept = entries(tmp_path)
        assert 1 < len(kept) <= 10  # the limit
        again = CountingInfer()
        cache = cache_at(tmp_path, max_bytes=10 * size)
        await cache.for_song(again)(MODEL, window(0))
        assert again.calls == 0
        await cache.for_song(again)(MODEL, window(1))
        assert again.calls == 1
        await cache.close()

    asyncio.run(work())


def test_half_of_it_gives_way_to_others_on_a_full_disk(tmp_path: Path) -> None:
    async def work() -> None:
        cache, infer = cache_at(tmp_path), CountingInfer()
        for seed in range(8):
            await cache.for_song(infer)(MODEL, window(seed))
        await cache.close()
        cache = cache_at(tmp_path)
        for left in (4, 2, 1, 0, 0):
            await cache.give_way()
            assert len(entries(tmp_path)) == left
        await cache.close()

    asyncio.run(work())


def test_entry_that_is_evicted_before_it_is_marked_as_used_is_gone(tmp_path: Path) -> None:
    """Another composer evicts between the two: an entry without a byte would be left."""
    files = Files(str(tmp_path))
    files.write("ab/entry", b"a window")
    files.delete(["ab/entry"])
    files.mark_used("ab/entry")
    (tmp_path / "ab").rmdir()
    files.mark_used("ab/entry")
    assert entries(tmp_path) == []
    files.close()


def test_song_goes_on_where_nothing_can_be_kept(tmp_path: Path) -> None:
    async def work() -> None:
        (tmp_path / "file").write_text("where the folder should be")
        infer = CountingInfer()
        for _ in range(2):
            cache = cache_at(tmp_path / "file")
            assert (await cache.for_song(infer)(MODEL, window(1)))["out"].size
            await cache.close()
        assert infer.calls == 2

    asyncio.run(work())


def test_without_room_nothing_is_kept_and_nothing_asked(tmp_path: Path) -> None:
    cache, infer = cache_at(tmp_path, max_bytes=0), CountingInfer()
    assert cache.for_song(infer) is infer
