"""The values that GGML's quantized blocks stand for: one function a format, for numpy and torch alike.

Owns the layout of every format of `base.BLOCKS`. Must not know: matrices, ops, devices.

Layouts are GGML's (ggml/src/ggml-common.h and its `gguf` package, which results equal bit for bit). Each function takes
uint8 [n, bytes of a block] and gives float32 [n, elements], or the same in another shape. Its arithmetic is in float32
and each operation rounds, in the order of the `gguf` package. Halves are float16; numbers are little endian.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tramontane.kernels.base import BLOCKS, Array
from tramontane.kernels.tables import table

__all__ = ["DEQUANTIZE", "Library", "dequantize"]


class Library(Protocol):
    """What numpy and torch spell differently. Everything else that the functions below use, both have."""

    def real(self, number: Array) -> Array:
        """uint8 [n, 2], a float16, or [n, 4], a float32, to float32 [n, 1]."""
        ...

    def signed(self, array: Array) -> Array:
        """uint8 as int8: the same bits."""
        ...

    def wide(self, array: Array) -> Array:
        """uint8 to int32."""
        ...

    def floats(self, array: Array) -> Array:
        """Integers to float32."""
        ...

    def shifts(self, like: Array, step: int, count: int) -> Array:
        """uint8 0, step, 2 * step, ..., where `like` is."""
        ...

    def concat(self, arrays: tuple[Array, ...]) -> Array:
        """Along axis 1."""
        ...

    def look(self, name: str, codes: Array) -> Array:
        """The rows of a table of `kernels.tables` that the codes name, float32."""
        ...


class NumpyLibrary:
    """`Library` on numpy arrays."""

    def real(self, number: Array) -> Array:
        return number.view(f"<f{number.shape[1]}").astype(np.float32)

    def signed(self, array: Array) -> Array:
        return array.view(np.int8)

    def wide(self, array: Array) -> Array:
        return array.astype(np.int32)

    def floats(self, array: Array) -> Array:
        return array.astype(np.float32)

    def shifts(self, like: Array, step: int, count: int) -> Array:
        return np.arange(0, step * count, step, dtype=np.uint8)

    def concat(self, arrays: tuple[Array, ...]) -> Array:
        return np.concatenate(arrays, axis=1)

    def look(self, name: str, codes: Array) -> Array:
        return table(name).take(codes, axis=0)


# ---- bit fields -------------------------------------------------------------------------------------------------


def _planes(lib: Library, packed: Array, width: int) -> Array:
    """[..., B] bytes to [..., 8 / width, B]: the lowest bits of all bytes, then the next, ..."""
    return (packed[..., None, :] >> lib.shifts(packed, width, 8 // width)[:, None]) & ((1 << width) - 1)


def _fields(lib: Library, packed: Array, width: int) -> Array:
    """[n, B] bytes to [n, 8 / width * B]: the fields of the first byte from the lowest, then of the second, ..."""
    fields = (packed[..., None] >> lib.shifts(packed, width, 8 // width)) & ((1 << width) - 1)
    return fields.reshape(packed.shape[0], -1)


def _words(lib: Library, packed: Array, size: int) -> Array:
    """[n, B] bytes to int32 [n, B / size]: numbers of `size` bytes."""
    parts = lib.wide(packed).reshape(packed.shape[0], -1, size)
    words = parts[..., 0]
    for i in range(1, size):
        words = words | parts[..., i] << 8 * i
    return words


def _quarters(lib: Library, words: Array, width: int) -> Array:
    """int32 [n, W] to [n, 4 * W]: four fields of each word, from the lowest."""
    fields = (words[..., None] >> lib.shifts(words, width, 4)) & ((1 << width) - 1)
    return fields.reshape(words.shape[0], -1)


# ---- 32 elements a block ----------------------------------------------------------------------------------------


def _q4_0(lib: Library, b: Array) -> Array:
    """Half d, 16 bytes of nibbles: d * (q - 8)."""
    return (lib.signed(_planes(lib, b[:, 2:], 4).reshape(-1, 32)) - 8) * lib.real(b[:, :2])


def _q4_1(lib: Library, b: Array) -> Array:
    """Half d, half m, 16 bytes of nibbles: d * q + m."""
    values = _planes(lib, b[:, 4:], 4).reshape(-1, 32) * lib.real(b[:, :2])
    values += lib.real(b[:, 2:4])
    return values


def _five_bits(lib: Library, high: Array, low: Array) -> Array:
    """Codes of 4 bytes of fifth bits and 16 of nibbles."""
    return _planes(lib, low, 4).reshape(-1, 32) | _fields(lib, high, 1) << 4


def _q5_0(lib: Library, b: Array) -> Array:
    """Half d, 32 fifth bits, 16 bytes of nibbles: d * (q - 16)."""
    return (lib.signed(_five_bits(lib, b[:, 2:6], b[:, 6:])) - 16) * lib.real(b[:, :2])


def _q5_1(lib: Library, b: Array) -> Array:
    """Half d, half m, 32 fifth bits, 16 bytes of nibbles: d * q + m."""
    values = _five_bits(lib, b[:, 4:8], b[:, 8:]) * lib.real(b[:, :2])
    values += lib.real(b[:, 2:4])
    return values


def _q8_0(lib: Library, b: Array) -> Array:
    """Half d, 32 signed bytes: d * q."""
    return lib.signed(b[:, 2:]) * lib.real(b[:, :2])


def _q8_1(lib: Library, b: Array) -> Array:
    """Half d, half d * sum(q), 32 signed bytes: d * q."""
    return lib.signed(b[:, 4:]) * lib.real(b[:, :2])


def _iq4_nl(lib: Library, b: Array) -> Array:
    """Half d, 16 bytes of nibbles: d * level."""
    return lib.look("IQ4", _planes(lib, b[:, 2:], 4).reshape(-1, 32)) * lib.real(b[:, :2])


def _mxfp4(lib: Library, b: Array) -> Array:
    """A power of two, 16 bytes of four-bit floats (Open Compute Project, Microscaling Formats 1.0)."""
    return lib.look("E2M1", _planes(lib, b[:, 1:], 4).reshape(-1, 32)) * lib.look("E8M0", b[:, :1])


def _nvfp4(lib: Library, b: Array) -> Array:
    """Four eight-bit floats, each the scale of 8 bytes of four-bit floats: 64 elements."""
    values = lib.look("E2M1", _planes(lib, b[:, 4:].reshape(-1, 4, 8), 4).reshape(-1, 4, 16))
    values *= lib.look("UE4M3", b[:, :4])[:, :, None]
    return values


def _q1_0(lib: Library, b: Array) -> Array:
    """Half d, 128 bits: d where set, else -d."""
    return (lib.signed(_fields(lib, b[:, 2:], 1) << 1) - 1) * lib.real(b[:, :2])


def _q2_0(lib: Library, b: Array) -> Array:
    """Half d, 64 pairs of bits: d * (q - 1)."""
    return (lib.signed(_fields(lib, b[:, 2:], 2)) - 1) * lib.real(b[:, :2])


# ---- super-blocks of 256 elements -------------------------------------------------------------------------------


def _scaled(q: Array, scales: Array) -> Array:
    """q [n, 256] times the scale of its sub-block, scales float32 [n, sub-blocks]."""
    return q.reshape(*scales.shape, -1) * scales[:, :, None]


def _q2_k(lib: Library, b: Array) -> Array:
    """16 bytes of a nibble of scale and one of minimum, 64 bytes of bit pairs, half d, half dmin:
    (d * scale) * q - dmin * min, sub-blocks of 16.

    32 bytes of bit pairs are four runs of 32: the lowest pairs, then the next, ...
    """
    scales, mins = (b[:, :16] & 15) * lib.real(b[:, 80:82]), (b[:, :16] >> 4) * lib.real(b[:, 82:84])
    values = _scaled(_planes(lib, b[:, 16:80].reshape(-1, 2, 32), 2), scales)
    values -= mins[:, :, None]
    return values


def _q3_k(lib: Library, b: Array) -> Array:
    """32 bytes of third bits, 64 of bit pairs, 16 six-bit scales in 12 bytes, half d: (d * (scale - 32)) * (q - 4),
    sub-blocks of 16.

    Bit i of the 32 bytes goes to the i-th run of 32. Of the scales, 8 bytes hold the nibbles (low ones first) and 4 the
    upper bits.
    """
    low, high = _planes(lib, b[:, 96:104], 4).reshape(-1, 16), _planes(lib, b[:, 104:108], 2).reshape(-1, 16)
    scales = (lib.signed(low | high << 4) - 32) * lib.real(b[:, 108:110])
    pairs = _planes(lib, b[:, 32:96].reshape(-1, 2, 32), 2).reshape(-1, 8, 32)
    return _scaled(lib.signed(pairs | _planes(lib, b[:, :32], 1) << 2) - 4, scales)


def _scales_and_mins(lib: Library, b: Array) -> tuple[Array, Array]:
    """d * scale and dmin * min, float32 [n, 8], of half d, half dmin and 12 bytes of six-bit numbers.

    The first four scales, then mins, are the low six bits of bytes 0-3 and 4-7; the other four have their low halves in
    the nibbles of bytes 8-11 and their upper two bits on top of those first bytes.
    """
    first, second, rest = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scales = lib.concat((first & 63, (rest & 15) | (first >> 6 << 4))) * lib.real(b[:, :2])
    mins = lib.concat((second & 63, (rest >> 4) | (second >> 6 << 4))) * lib.real(b[:, 2:4])
    return scales, mins


def _q4_k(lib: Library, b: Array) -> Array:
    """`_scales_and_mins`, 128 bytes of nibbles: (d * scale) * q - dmin * min, sub-blocks of 32.

    32 bytes of nibbles are two sub-blocks: the low nibbles, then the high ones.
    """
    scales, mins = _scales_and_mins(lib, b)
    values = _scaled(_planes(lib, b[:, 16:].reshape(-1, 4, 32), 4), scales)
    values -= mins[:, :, None]
    return values


def _q5_k(lib: Library, b: Array) -> Array:
    """As Q4_K, with 32 bytes of fifth bits before the nibbles: bit i goes to sub-block i."""
    scales, mins = _scales_and_mins(lib, b)
    low = _planes(lib, b[:, 48:].reshape(-1, 4, 32), 4).reshape(-1, 8, 32)
    values = _scaled(low | _planes(lib, b[:, 16:48], 1) << 4, scales)
    values -= mins[:, :, None]
    return values


def _q6_k(lib: Library, b: Array) -> Array:
    """128 bytes of low nibbles, 64 of upper bit pairs, 16 signed scales, half d: (d * scale) * (q - 32), sub-blocks
    of 16.

    Each half of 128 elements: the low nibbles of 64 bytes, then their high nibbles; the bit pairs of its 32 bytes of
    upper bits go to its four runs of 32.
    """
    low = _planes(lib, b[:, :128].reshape(-1, 2, 64), 4).reshape(-1, 2, 4, 32)
    high = _planes(lib, b[:, 128:192].reshape(-1, 2, 32), 2)
    return _scaled(lib.signed(low | high << 4) - 32, lib.signed(b[:, 192:208]) * lib.real(b[:, 208:210]))


def _q8_k(lib: Library, b: Array) -> Array:
    """float32 d, 256 signed bytes, their sums of 16: d * q."""
    return lib.signed(b[:, 4:260]) * lib.real(b[:, :4])


def _iq4_xs(lib: Library, b: Array) -> Array:
    """Half d, 8 six-bit scales (2 bytes of upper pairs, 4 of nibbles), 128 bytes of nibbles:
    (d * (scale - 32)) * level, sub-blocks of 32.
    """
    scales = lib.signed(_fields(lib, b[:, 4:8], 4) | _fields(lib, b[:, 2:4], 2) << 4) - 32
    levels = lib.look("IQ4", _planes(lib, b[:, 8:].reshape(-1, 8, 16), 4))
    return _scaled(levels, scales * lib.real(b[:, :2]))


def _tq1_0(lib: Library, b: Array) -> Array:
    """52 bytes of five ternary digits (the last four bytes: of four), half d: d * (digit - 1).

    A byte is the fraction, of 256, whose ternary digits follow the point: multiplied by a power of three, modulo 256,
    it begins with the digit wanted. 32 bytes, then 16, then 4, each hold runs of their own length.
    """
    runs = []
    for start, stop, digits in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        digit = b[:, start:stop]
        for _ in range(digits):
            runs.append(digit)
            digit = digit * 3
    return lib.floats((lib.wide(lib.concat(tuple(runs))) * 3 >> 8) - 1) * lib.real(b[:, 52:54])


def _tq2_0(lib: Library, b: Array) -> Array:
    """64 bytes of bit pairs, half d: d * (q - 1)."""
    pairs = _planes(lib, b[:, :64].reshape(-1, 2, 32), 2)
    return (lib.signed(pairs.reshape(-1, 256)) - 1) * lib.real(b[:, 64:66])


# ---- grids: short vectors named by an index ---------------------------------------------------------------------


def _steps(d: Array, scales: Array, factor: float) -> Array:
    return d * (scales + 0.5) * factor


def _sign_words(lib: Library, words: Array) -> tuple[Array, Array]:
    """Words [n, 4 bytes] of 4 times 7 bits of signs and 4 bits of scale: signs [n, 4, 8] and scales [n, 1], float32."""
    return lib.look("signs7", _quarters(lib, _words(lib, words, 4), 7)), lib.floats(words[:, 3:] >> 4)


def _iq2_xxs(lib: Library, b: Array) -> Array:
    """Half d, 8 times 4 indices and a word of signs and scale: d * (scale + 1/2) / 4, sub-blocks of 32."""
    parts = b[:, 2:].reshape(-1, 8)
    signs, scales = _sign_words(lib, parts[:, 4:])
    vectors = lib.look("IQ2_XXS", parts[:, :4]) * signs
    return _scaled(vectors, _steps(lib.real(b[:, :2]), scales.reshape(-1, 8), 0.25))


def _iq2_xs(lib: Library, b: Array) -> Array:
    """Half d, 32 words of 9 bits of index and 7 of signs, 16 nibbles of scale: d * (scale + 1/2) / 4, sub-blocks
    of 16.
    """
    words = _words(lib, b[:, 2:66], 2)
    vectors = lib.look("IQ2_XS", words & 511) * lib.look("signs7", words >> 9)
    return _scaled(vectors, _steps(lib.real(b[:, :2]), lib.floats(_fields(lib, b[:, 66:], 4)), 0.25))


def _iq2_s(lib: Library, b: Array) -> Array:
    """Half d, 32 indices, 32 bytes of signs, the indices' 32 upper bit pairs, 16 nibbles of scale: as IQ2_XS."""
    indices = lib.wide(b[:, 2:34]) | lib.wide(_fields(lib, b[:, 66:74], 2)) << 8
    vectors = lib.look("IQ2_S", indices) * lib.look("signs8", b[:, 34:66])
    return _scaled(vectors, _steps(lib.real(b[:, :2]), lib.floats(_fields(lib, b[:, 74:], 4)), 0.25))


def _iq3_xxs(lib: Library, b: Array) -> Array:
    """Half d, 64 indices, 8 words of signs and scale: d * (scale + 1/2) / 2, sub-blocks of 32."""
    signs, scales = _sign_words(lib, b[:, 66:].reshape(-1, 4))
    vectors = lib.look("IQ3_XXS", b[:, 2:66]).reshape(signs.shape) * signs
    return _scaled(vectors, _steps(lib.real(b[:, :2]), scales.reshape(-1, 8), 0.5))


def _iq3_s(lib: Library, b: Array) -> Array:
    """Half d, 64 indices, their 64 ninth bits, 32 bytes of signs, 8 nibbles of scale: d * (1 + 2 * scale), sub-blocks
    of 32.
    """
    indices = lib.wide(b[:, 2:66]) | lib.wide(_fields(lib, b[:, 66:74], 1)) << 8
    signs = lib.look("signs8", b[:, 74:106])
    vectors = lib.look("IQ3_S", indices).reshape(signs.shape) * signs
    return _scaled(vectors, lib.real(b[:, :2]) * lib.floats(_fields(lib, b[:, 106:], 4) * 2 + 1))


def _offset_vectors(lib: Library, low: Array, high: Array, negative: Array) -> Array:
    """Vectors of -1, 0 and 1 of the 32 indices, plus 1/8, or minus in those groups of them that `negative` marks."""
    vectors = lib.look("IQ1_S", lib.wide(low) | high << 8).reshape(*negative.shape, -1)
    return vectors + (0.125 - 0.25 * lib.floats(negative))[..., None]


def _iq1_s(lib: Library, b: Array) -> Array:
    """Half d, 32 indices, 8 words of 4 times 3 upper bits, 3 bits of scale and a sign: d * (2 * scale + 1), sub-blocks
    of 32.
    """
    words = _words(lib, b[:, 34:], 2)
    vectors = _offset_vectors(lib, b[:, 2:34], _quarters(lib, words, 3), words >> 15)
    return _scaled(vectors, lib.real(b[:, :2]) * lib.floats((words >> 12 & 7) * 2 + 1))


def _iq1_m(lib: Library, b: Array) -> Array:
    """32 indices, 32 nibbles of 3 upper bits and a sign, 4 words of 4 times 3 bits of scale, whose uppermost nibbles
    are a half d: d * (2 * scale + 1), sub-blocks of 16.
    """
    packed = b[:, 48:]
    d = lib.concat(tuple((packed[:, i : i + 1] >> 4) | (packed[:, i + 2 : i + 3] & 240) for i in (1, 5)))
    nibbles = lib.wide(_fields(lib, b[:, 32:48], 4))
    vectors = _offset_vectors(lib, b[:, :32], nibbles & 7, nibbles >> 3)
    return _scaled(vectors, lib.real(d) * lib.floats(_quarters(lib, _words(lib, packed, 2), 3) * 2 + 1))


# A new format is a function and a row here, and its geometry in `base.BLOCKS`.
DEQUANTIZE: Mapping[str, Callable[[Library, Array], Array]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q8_1": _q8_1,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "Q8_K": _q8_k,
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
    "Q1_0": _q1_0,
    "Q2_0": _q2_0,
}

_NUMPY = NumpyLibrary()


def dequantize(format: str, blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The exact values of quantized blocks: uint8 [..., n * nbytes] to float32 [..., n * elements]."""
    layout = BLOCKS[format]
    shape = (*blocks.shape[:-1], blocks.shape[-1] // layout.nbytes * layout.elements)
    if not blocks.size:
        return np.empty(shape, np.float32)
    flat = np.ascontiguousarray(blocks).reshape(-1, layout.nbytes)
    with np.errstate(over="ignore", invalid="ignore"):  # a scale may be inf or not a number: so are its values
        values: NDArray[np.float32] = DEQUANTIZE[format](_NUMPY, flat)
    return values.reshape(shape)
