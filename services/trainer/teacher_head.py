"""The output heads of teachers as the trainer computes with them: from disk to the device, once per head.

A head that is cached is not asked for again, nor the right to it; what has to be asked at every step is the right to
hidden states, which `TeacherClient.try_scoring` does before anything is sampled. A pool may move to other weights
between two steps, so the head is asked for by the handshake that is pinned now.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from opd.errors import ConfigError
from opd.ops import OutputHead
from opd.types import OutputHeadFile, TeacherInfo


class HeadSource(Protocol):
    """Where head files come from: `opd.client.SyncScoreClient` over gRPC."""

    def output_head(self, folder: Path) -> OutputHeadFile: ...


class TeacherHead:
    """Gives the head of the pinned teacher; call it once a micro-batch, it loads only what is new."""

    def __init__(
        self, source: HeadSource, pinned: Callable[[], TeacherInfo], *, folder: Path, device: torch.device | str
    ) -> None:
        self._source = source
        self._pinned = pinned
        self._folder = folder
        self._device = device
        self._head: OutputHead | None = None
        self._sha256 = ""

    def __call__(self) -> OutputHead:
        """Raises what fetching it raises, and ConfigError when the pool has moved on since the step began."""
        wanted = self._pinned().output_head_hash
        if self._head is None or wanted != self._sha256:
            file = self._source.output_head(self._folder)
            if file.sha256 != wanted:
                raise ConfigError(
                    f"teacher {self._pinned().teacher}: its head changed from {wanted[:12]} to {file.sha256[:12]} "
                    "within a step; resume the run with the new teacher"
                )
            self._head, self._sha256 = load_output_head(file, self._device), wanted
        return self._head


def load_output_head(file: OutputHeadFile, device: torch.device | str = "cpu") -> OutputHead:
    """The head in its stored dtype, rows without a token included; raises ConfigError for a file that is none."""
    try:
        tensors = load_file(file.path, device=str(device))
        return OutputHead(
            weight_VH=tensors["weight"],
            bias_V=tensors.get("bias"),
            logit_scale=file.logit_scale,
            soft_cap=file.logit_softcap,
        )
    except (OSError, KeyError, SafetensorError) as error:
        raise ConfigError(f"output head {file.path}: cannot be read ({error}); remove it to fetch it again") from None
