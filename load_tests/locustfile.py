"""The load tests' songs in Locust, for who wants its page: `make locust`.

Locust's users wait for an answer before they ask again, so that a slow server is asked less: a
closed loop, good to look at and to find a capacity with. `python -m load_tests` is the measurement.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from locust import HttpUser, task

from load_tests.songs import cuts, lengths, recordings

OPTIONS = json.dumps({"seed": 1, "noise_seed": 1})

SOURCE = Path(os.environ.get("LOAD_TEST_SONGS", ".cache/demo_song.mp3"))
"""A recording, or a folder of recordings."""

# Cut before Locust's clock runs; users take them in turn.
SONGS = list(cuts(recordings(SOURCE), lengths(16, seed=1), seed=1))


class Listener(HttpUser):
    """Somebody who has one song after the other remixed."""

    _next = 0

    @task
    def remix(self) -> None:
        """`POST /v1/remix`; a refusal (429) is a failure in Locust's table."""
        song = SONGS[Listener._next % len(SONGS)]
        Listener._next += 1
        self.client.post(
            "/v1/remix",
            files={
                "song": ("song.flac", song.flac),
                "options": (None, OPTIONS, "application/json"),
            },
            name=f"remix of {'a short' if song.duration_s < 35 else 'a long'} song",
        )
