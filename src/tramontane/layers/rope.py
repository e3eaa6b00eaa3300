"""Rotary positions (Su et al., 2021): inverse frequencies with their published stretches, and the angles of a step.

Owns the arithmetic of frequencies, in float32 as transformers computes them, so that far positions agree with it.
Must not know: configs, which layers share a Rotary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tramontane.kernels import Array, Ops
from tramontane.kernels.workspace import Workspace
from tramontane.layers.context import BatchContext

Frequencies = NDArray[np.float32]
Angles = tuple[Array, Array]
"""cos and sin, each float32 [T, D / 2]."""


class Rotary:
    """Rotates the first 2 * len(inv_freq) elements of each head by its position."""

    def __init__(
        self, ops: Ops, inv_freq: NDArray[Any], *, scale: float = 1.0, interleaved: bool = False, name: str = "rope"
    ) -> None:
        """`scale` multiplies cos and sin; `interleaved`: pairs are (2i, 2i + 1); `name`: of its buffers, which no
        other Rotary of the same workspace may have."""
        self.ops = ops
        self.inv_freq = ops.from_host(np.ascontiguousarray(inv_freq, np.float32))
        self.half = len(inv_freq)
        self.scale = scale
        self.interleaved = interleaved
        self.name = name

    def angles(self, batch: BatchContext, workspace: Workspace) -> Angles:
        """The step's angles, computed once for all layers that share them."""
        cos = workspace.take(f"{self.name}.cos", batch.num_tokens, self.half)
        sin = workspace.take(f"{self.name}.sin", batch.num_tokens, self.half)
        self.ops.rope_angles(cos, sin, batch.positions, self.inv_freq, self.scale)
        return cos, sin

    def rotate(self, x: Array, angles: Angles, offset: int = 0) -> None:
        """In place, x float32 [T,H,D], from element `offset` of each head on."""
        self.ops.rope(x, *angles, self.interleaved, offset)


class LengthRotary(Rotary):
    """Rotary positions whose frequencies depend on the length of the sequence: those of a step are made on the host."""

    def __init__(
        self,
        ops: Ops,
        frequencies: Callable[[int], Frequencies],
        half: int,
        *,
        scale: float = 1.0,
        interleaved: bool = False,
        name: str = "rope",
    ) -> None:
        """`frequencies(length)`: float32 [half]. The rest as for Rotary."""
        super().__init__(ops, frequencies(0), scale=scale, interleaved=interleaved, name=name)
        if self.half != half:
            raise ValueError(f"{self.half} frequencies for {half} pairs")
        self.frequencies = frequencies

    def angles(self, batch: BatchContext, workspace: Workspace) -> Angles:
        cos = workspace.take(f"{self.name}.cos", batch.num_tokens, self.half)
        sin = workspace.take(f"{self.name}.sin", batch.num_tokens, self.half)
        if batch.rope_lengths is None:
            raise ValueError(f"{self.name}: the batch does not say how long its sequences are")
        lengths, places = np.unique(batch.rope_lengths, return_inverse=True)
        rows = np.stack([self.frequencies(length) for length in lengths.tolist()])[places]
        self.ops.rope_angles(cos, sin, batch.positions, self.ops.from_host(rows), self.scale)
        return cos, sin


def inverse_frequencies(theta: float, dim: int) -> Frequencies:
    """theta ** (-2i / dim), i < dim / 2."""
    return (1.0 / _wave_numbers(theta, dim)).astype(np.float32)


def llama3_frequencies(
    inv_freq: Frequencies, factor: float, low_freq_factor: float, high_freq_factor: float, original: int
) -> Frequencies:
    """Llama 3.1's stretch: waves longer than original / low are slowed by `factor`, those shorter than
    original / high are kept, those between are blended by how often they turn within `original` positions."""
    wavelength = np.float32(2 * math.pi) / inv_freq
    turns = np.float32(original) / wavelength
    blend = (turns - np.float32(low_freq_factor)) / np.float32(high_freq_factor - low_freq_factor)
    slowed = inv_freq / np.float32(factor)
    blended = (1 - blend) * slowed + blend * inv_freq
    kept = np.where(wavelength < original / high_freq_factor, inv_freq, blended)
    result: Frequencies = np.where(wavelength > original / low_freq_factor, slowed, kept).astype(np.float32)
    return result


def yarn_frequencies(
    theta: float, dim: int, factor: float, original: int, beta_fast: float, beta_slow: float, truncate: bool
) -> Frequencies:
    """YaRN (Peng et al., 2023): frequencies that turn more than beta_fast times within `original` positions are kept,
    those below beta_slow turns are slowed by `factor`, with a linear ramp over the dimensions between."""

    def dimension(turns: float) -> float:
        """Which of the dim / 2 frequencies turns so often."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(beta_fast), dimension(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(width), 0, 1)
    waves = _wave_numbers(theta, dim)
    result: Frequencies = (1 / (np.float32(factor) * waves) * ramp + 1 / waves * (1 - ramp)).astype(np.float32)
    return result


def dynamic_theta(theta: float, dim: int, factor: float, original: int, length: int) -> float:
    """The base of "dynamic NTK" (emozilla, 2023) for sequences of `length`: that of the model up to `original`."""
    longer = max(length, original)
    base: float = theta * ((factor * longer / original) - (factor - 1)) ** (dim / (dim - 2))
    return base


def longrope_frequencies(theta: float, dim: int, factors: Sequence[float]) -> Frequencies:
    """LongRoPE (Ding et al., 2024): each frequency slowed by a factor of its own, found by search."""
    result: Frequencies = (1 / (np.array(factors, np.float32) * _wave_numbers(theta, dim))).astype(np.float32)
    return result


def longrope_magnitude(factor: float, original: int) -> float:
    """LongRoPE's scale of cos and sin (Ding et al., 2024)."""
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def divided(inv_freq: Frequencies, factors: Sequence[float]) -> Frequencies:
    """Each frequency slowed by its own factor."""
    result: Frequencies = np.divide(inv_freq, np.array(factors, np.float32), dtype=np.float32)
    return result


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """YaRN's scale of cos and sin for a stretch by `factor` (its eq. 22); DeepSeek's models weight the logarithm."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _wave_numbers(theta: float, dim: int) -> Frequencies:
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    waves: Frequencies = np.power(np.float32(theta), exponents, dtype=np.float32)
    return waves
