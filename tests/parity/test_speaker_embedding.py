"""Speaker embeddings, against Resemblyzer's own code."""

from __future__ import annotations

import numpy as np

from tests.test_enrolment import SHE, say
from training.speaker_embedding import embed_windows


def test_embeddings_are_resemblyzers() -> None:
    from resemblyzer import VoiceEncoder

    samples = say(8.0, *SHE)
    encoder = VoiceEncoder("cpu", verbose=False)
    _, theirs, _ = encoder.embed_utterance(samples, return_partials=True)
    ours = embed_windows(samples)
    # Theirs pads the end, for one window more. 2e-7 was seen on ten seconds of speech.
    assert len(theirs) - len(ours) in (0, 1)
    np.testing.assert_allclose(ours, theirs[: len(ours)], atol=1e-5)
