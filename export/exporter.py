"""checkpoint -> original -> artefact: what the module of a stage offers to `python -m export`.

To add an architecture, write its class of `Original` in the stage's module here (or in a module
of its own) and name an `Architecture` of it in that stage module's `ARCHITECTURES`; nothing else
needs to know of it (`export/architectures.py` collects them):

    class MyVoice(Original):
        stage = "convert_voice"
        waveforms = {"audio"}                   # outputs that are sound: held to SI-SDR

        def __init__(self, net): ...            # self.facts, self.sample_rate_hz, self.speed_inputs
        def reference(self, inputs): ...        # the original library's own inference call
        def onnx(self): ...                     # the graph, in fp32
        def weights(self): ...                  # initializer -> the array that must stand in it
        def cases(self): ...                    # what both are compared on

    ARCHITECTURES = (Architecture("my-voice", "convert_voice", load_my_voice, write_my_voice),)

The frame does the rest, for every architecture alike: it writes the artefact and its manifest
entry, has the *runner* serve it (`export/serve.py`), compares, perturbs weights to see that the
comparison would notice, times both sides, writes `report.json`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import onnx
from numpy.typing import NDArray

from remix.stages import Stage, Tensors

Arrays = dict[str, NDArray[Any]]

ServedCall = Callable[[Tensors], Arrays]
"""What a runner's model does with a batch (`runners.inference_protocol.ServedModel`)."""


@dataclass(frozen=True)
class Case:
    """One input on which the original and the artefact are compared.

    Args:
        name: what it is: "song, 7.8 s, batch 2", "silence", "L = -R".
        inputs: of `Original.reference` and of `Original.served`; real audio where there can be.
    """

    name: str
    inputs: Tensors


class Original(ABC):
    """A model out of a checkpoint, in its original library."""

    stage: ClassVar[Stage]
    waveforms: ClassVar[AbstractSet[str]] = frozenset()
    """Outputs that are sound: at least 60 dB of SI-SDR is asked of them, beside the relative error
    (largest difference by largest value of the output) that is asked of all."""

    facts: Mapping[str, Any]
    """The `facts` of the manifest entry, as the stage's runner and `remix` read them."""
    sample_rate_hz: int
    device: str = "cpu"
    """Where `reference` computes, if torch does it: `cpu` or `cuda`."""

    @abstractmethod
    def reference(self, inputs: Tensors) -> Arrays:
        """The original library's own inference call, made to take and give named arrays.

        Whatever the original draws at random it must draw from (or be given by) `inputs`.
        """

    @abstractmethod
    def onnx(self) -> onnx.ModelProto:
        """The model as a graph in fp32, facts in its metadata; batch (and length) free."""

    def torchscript(self) -> bytes | None:
        """The same function as a TorchScript archive (`export.trace.to_torchscript`), or None.

        Inputs, outputs and parameters have the graph's names.
        """
        return None

    def int8(self, graph: Path, out: Path) -> bool:
        """Write the graph in int8 in the model's own way; False: as `export.variants` does it."""
        return False

    @abstractmethod
    def weights(self) -> Arrays:
        """Initializer of `onnx()` -> the array that must stand in it, to the bit.

        Made from the checkpoint's arrays, not from the graph. Every array of the checkpoint that
        inference needs is in it: this is what catches a weight that is wrong by less than any
        output shows.
        """

    @abstractmethod
    def cases(self) -> Iterator[Case]:
        """Several lengths and batch sizes of real audio, silence, and L = -R where it is stereo."""

    def served(self, model: ServedCall, inputs: Tensors) -> Arrays:
        """What `reference` computes, by the runner's model.

        Override where a case is more than one call (a whole song, of any length).
        """
        return model(inputs)

    @abstractmethod
    def speed_inputs(self, batch: int) -> Tensors:
        """Inputs of a typical call at a batch size: what speed is measured on."""


@dataclass(frozen=True)
class Architecture:
    """A kind of model that checkpoints are of.

    Args:
        name: as `--architecture` and the manifest's fact `architecture` have it.
        stage: that serves it.
        load: checkpoint -> original. A file that is damaged, that names code, or whose arrays are
            not this architecture's raises InvalidModel; missing and unexpected arrays are listed
            (`require_same_names`). No pickle is executed: `weights_only`, or `read_arrays`.
        write_random: writes a checkpoint of the true size with seeded random weights, in the
            format that `load` reads. Scales are such that activations stay near those of a
            trained model, and no bias, norm or layer scale is at its neutral value.
    """

    name: str
    stage: Stage
    load: Callable[[Path], Original]
    write_random: Callable[[Path], None]
