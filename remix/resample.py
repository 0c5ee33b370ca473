"""samples -> samples at another rate, or in stereo.

Band-limited by a Kaiser-windowed sinc, run polyphase. A stream cut into any chunks gives what
the whole gives, because the whole is run as a stream of one chunk.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd

import numpy as np
import scipy  # its parts load when they are first used: signal takes a second
from numpy.typing import NDArray

from remix.audio import Audio, Samples
from remix.errors import LimitExceeded

ZERO_CROSSINGS = 32
"""Of the sinc, on each side. With `KAISER_BETA` the transition is 0.16 of the lower Nyquist
frequency wide: A = 80 dB, width = (A - 7.95) / (2.285 * 2 * ZERO_CROSSINGS * pi) (Kaiser 1974)."""

KAISER_BETA = 7.857
"""0.1102 (A - 8.7) at A = 80 dB (Kaiser 1974)."""

ROLLOFF = 0.92
"""Middle of the transition, of the lower Nyquist frequency: the band above it is killed by 80 dB,
and everything below 0.84 of it passes (18.5 kHz at 44.1 kHz)."""

MAX_CHANNELS = 8

_HALF_POWER = 0.5**0.5

_STEREO_GAINS: dict[str, tuple[float, float]] = {
    "FL": (1.0, 0.0),
    "FR": (0.0, 1.0),
    "FC": (_HALF_POWER, _HALF_POWER),
    "LFE": (0.0, 0.0),
    "BL": (_HALF_POWER, 0.0),
    "BR": (0.0, _HALF_POWER),
    "SL": (_HALF_POWER, 0.0),
    "SR": (0.0, _HALF_POWER),
    "BC": (0.5, 0.5),
    "FLC": (1.0, 0.0),
    "FRC": (0.0, 1.0),
}
"""Gains into left and right of each speaker. Source: ITU-R BS.775-3, annex 4, table 2; the
low-frequency channel is left out, as there."""

DEFAULT_SPEAKERS: tuple[tuple[str, ...], ...] = (
    ("FC",),
    ("FL", "FR"),
    ("FL", "FR", "FC"),
    ("FL", "FR", "BL", "BR"),
    ("FL", "FR", "FC", "BL", "BR"),
    ("FL", "FR", "FC", "LFE", "BL", "BR"),
    ("FL", "FR", "FC", "LFE", "BC", "SL", "SR"),
    ("FL", "FR", "FC", "LFE", "BL", "BR", "SL", "SR"),
)
"""Speakers of 1 to 8 channels where a file does not name them: the order of WAV files."""


class StreamingResampler:
    """Resamples a stream chunk by chunk: the chunks' outputs, joined, are the whole's output.

    Args:
        old_hz: rate of what is pushed.
        new_hz: rate of what comes out.
        channels: C.

    >>> stream = StreamingResampler(48_000, 16_000, channels=1)
    >>> parts = [stream.push(np.zeros((1, 1000), np.float32)) for _ in range(3)] + [stream.flush()]
    >>> sum(part.shape[1] for part in parts)
    1000
    """

    def __init__(self, old_hz: int, new_hz: int, channels: int) -> None:
        divisor = gcd(old_hz, new_hz)
        self._up = new_hz // divisor
        self._down = old_hz // divisor
        self._taps = _low_pass(self._up, self._down)
        self._half = len(self._taps) // 2
        self._kept = np.zeros((channels, 0), np.float32)
        self._kept_from = 0  # index, in the input, of the first kept sample
        self._seen = 0  # input samples pushed
        self._made = 0  # output samples returned

    def push(self, samples: Samples) -> Samples:
        """The output that `samples`, [C, T], completes: [C, T'] with T' from 0."""
        if self._up == self._down:
            return samples
        self._kept = np.concatenate([self._kept, samples], axis=1, dtype=np.float32)
        self._seen += samples.shape[1]
        # Output m reaches input n where |n up - m down| <= half: all outputs are ready whose
        # last input, floor((m down + half) / up), was pushed.
        return self._outputs_to((self._seen * self._up - 1 - self._half) // self._down + 1)

    def flush(self) -> Samples:
        """The rest of the output: silence follows the end. The stream is then used up."""
        total = -(-self._seen * self._up // self._down)
        return self._outputs_to(total)

    def _outputs_to(self, end: int) -> Samples:
        """Outputs from the last returned one to `end` (not included)."""
        start, count = self._made, end - self._made
        if count <= 0:
            return np.zeros((self._kept.shape[0], 0), np.float32)
        # y[j] = sum_i kept[i] h[j down - i up] is output m where
        # j down = half + m down - kept_from up: leading zeros make the right side a multiple.
        offset = self._half - self._kept_from * self._up
        lead = -offset % self._down
        first = (offset + lead) // self._down + start
        tail = max(0, -(-((first + count) * self._down - lead) // self._up) - self._kept.shape[1])
        taps = np.concatenate([np.zeros(lead, np.float32), self._taps])
        padded = np.pad(self._kept, ((0, 0), (0, tail))) if tail else self._kept
        output = scipy.signal.upfirdn(taps, padded, self._up, self._down, axis=1)[
            :, first : first + count
        ]
        self._made = end
        needed_from = max(0, -(-(end * self._down - self._half) // self._up))
        self._kept = self._kept[:, max(0, needed_from - self._kept_from) :].copy()
        self._kept_from = max(self._kept_from, needed_from)
        return np.ascontiguousarray(output, np.float32)


def resample(samples: Samples, old_hz: int, new_hz: int) -> Samples:
    """The same sound at another rate.

    Args:
        samples: [C, T], float32.
        old_hz: their rate.
        new_hz: the wanted rate.

    Returns:
        [C, T'], float32, T' = ceil(T * new_hz / old_hz); sample 0 stays at time 0.

    >>> resample(np.zeros((2, 44_100), np.float32), 44_100, 16_000).shape
    (2, 16000)
    """
    if old_hz == new_hz:
        return samples
    stream = StreamingResampler(old_hz, new_hz, samples.shape[0])
    return np.concatenate([stream.push(samples), stream.flush()], axis=1)


def resample_audio(audio: Audio, new_hz: int) -> Audio:
    """`audio` at `new_hz`."""
    return Audio(resample(audio.samples, audio.sample_rate_hz, new_hz), new_hz)


def to_mono(samples: Samples) -> Samples:
    """The mean of the channels: [C, T] -> [1, T]."""
    return np.asarray(samples.mean(axis=0, keepdims=True, dtype=np.float32))


def to_stereo(samples: Samples, speakers: tuple[str, ...] | None = None) -> Samples:
    """Two channels out of 1 to 8.

    One channel goes to both sides unchanged; two stay; more are mixed by ITU-R BS.775 and scaled
    so that full scale in every speaker stays within full scale.

    Args:
        samples: [C, T], C from 1 to 8.
        speakers: the speaker of each channel, as FFmpeg names them ("FL", "LFE", …); the WAV
            order of C channels where it is left out or has a name that is not known.

    Returns:
        [2, T], float32.

    Raises:
        LimitExceeded: more than 8 channels, or none.

    >>> to_stereo(np.ones((6, 3), np.float32)).round(3).tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    channels = samples.shape[0]
    if channels == 2:
        return samples
    return _stereo_matrix(channels, speakers) @ samples


@lru_cache(maxsize=32)
def _stereo_matrix(channels: int, speakers: tuple[str, ...] | None) -> NDArray[np.float32]:
    if not 1 <= channels <= MAX_CHANNELS:
        raise LimitExceeded(
            f"The audio has {channels} channels; 1 to {MAX_CHANNELS} are taken.",
            value=channels,
            limit=[1, MAX_CHANNELS],
            remedy="Mix it down to stereo first.",
        )
    if channels == 1:
        return np.ones((2, 1), np.float32)
    if speakers is None or len(speakers) != channels or not set(speakers) <= set(_STEREO_GAINS):
        speakers = DEFAULT_SPEAKERS[channels - 1]
    gains = np.array([_STEREO_GAINS[speaker] for speaker in speakers]).T
    loudest = gains.sum(axis=1).max()
    return np.asarray(gains / max(1.0, loudest), np.float32)


@lru_cache(maxsize=16)
def _low_pass(up: int, down: int) -> NDArray[np.float32]:
    """Taps of the anti-alias and anti-image filter at the rate `up * old_hz`, of odd length."""
    longer = max(up, down)
    half = ZERO_CROSSINGS * longer
    at = np.arange(-half, half + 1)
    taps = np.sinc(ROLLOFF * at / longer) * np.kaiser(2 * half + 1, KAISER_BETA)
    # Each of the `up` phases must sum to 1 for a constant to stay one; together they sum to `up`.
    return np.asarray(taps * (up / taps.sum()), np.float32)
