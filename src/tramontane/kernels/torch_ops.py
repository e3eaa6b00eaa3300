"""The ops on torch tensors: any torch device, mainly CUDA and Metal.

Owns all of torch that inference on a GPU needs; importing this module imports torch. Must not know: weights, layers,
models. Everything is computed in float32 (sums that choose tokens in float64 where the device has it).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tramontane.errors import DeviceNotAvailable, MissingExtra
from tramontane.kernels import torch_cells
from tramontane.kernels.base import BLOCKS, Array
from tramontane.kernels.blocks import DEQUANTIZE
from tramontane.kernels.cells import cells_of
from tramontane.kernels.checks import (
    CACHES,
    FLOAT32,
    FLOATS,
    INT32,
    UINT8,
    check,
    check_attention,
    check_blocks,
    check_experts,
    check_gate,
    check_groups,
    check_mask,
    check_norm,
    check_place,
    check_read,
    check_route,
    check_same,
    check_sample,
    check_swap,
    check_write,
)
from tramontane.kernels.coded import Coded, check_coded, decode
from tramontane.kernels.recurrence import RecurrentOps
from tramontane.kernels.stored import StoredOps
from tramontane.kernels.tables import table
from tramontane.kernels.torch_attention import Scoring, Step, attend, attend_rows, row_groups

try:
    import torch
except ImportError as error:
    raise MissingExtra("torch", "Running on torch") from error

__all__ = ["TorchOps"]


@cache
def _constant(name: str, device: torch.device) -> Array:
    return torch.tensor(table(name), device=device)


class _TorchLibrary:
    """`blocks.Library` on tensors of any device."""

    def real(self, number: Array) -> Array:
        kind = torch.float16 if number.shape[1] == 2 else torch.float32
        # A copy that owns its memory: a slice of rows of odd length is not aligned for floats.
        return number.clone(memory_format=torch.contiguous_format).view(kind).float()

    def signed(self, array: Array) -> Array:
        return array.view(torch.int8)

    def wide(self, array: Array) -> Array:
        return array.int()

    def floats(self, array: Array) -> Array:
        return array.float()

    def shifts(self, like: Array, step: int, count: int) -> Array:
        return torch.arange(0, step * count, step, dtype=torch.uint8, device=like.device)

    def concat(self, arrays: tuple[Array, ...]) -> Array:
        return torch.cat(arrays, dim=1)

    def look(self, name: str, codes: Array) -> Array:
        return _constant(name, codes.device)[codes.int()]


_LIBRARY = _TorchLibrary()


def _dequantize(format: str, blocks: Array) -> Array:
    """uint8 [n, bytes] to float32 [n, elements]."""
    values = DEQUANTIZE[format](_LIBRARY, blocks.reshape(-1, BLOCKS[format].nbytes))
    return values.reshape(len(blocks), -1)


class _CodedLibrary:
    """`coded.Library` on tensors."""

    def zeros(self, like: Array, shape: tuple[int, ...]) -> Array:
        return torch.zeros(shape, dtype=torch.uint8, device=like.device)

    def look(self, table: Array, codes: Array) -> Array:
        return table[codes.int()]

    def floats(self, array: Array) -> Array:
        return array.float()


_TORCH = _CodedLibrary()


def _gelu_quick(x: Array) -> Array:
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "gelu_quick": _gelu_quick,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "relu_squared": lambda x: torch.relu(x).square(),
}


def _resolve(device: str) -> Any:
    """The torch device of a name: cpu, cuda, cuda:N or metal. Raises DeviceNotAvailable."""
    kind, _, index = device.partition(":")
    if kind == "cuda" and (not index or index.isdigit()):
        if not torch.cuda.is_available():
            raise DeviceNotAvailable(device, "torch sees no CUDA device")
        if index and int(index) >= torch.cuda.device_count():
            raise DeviceNotAvailable(device, f"torch sees {torch.cuda.device_count()} CUDA devices")
        return torch.device("cuda", int(index) if index else torch.cuda.current_device())
    if device == "metal":
        if not torch.backends.mps.is_available():
            raise DeviceNotAvailable(device, "torch sees no Metal device")
        return torch.device("mps")
    if device == "cpu":
        return torch.device("cpu")
    raise DeviceNotAvailable(device, "torch runs on cpu, cuda, cuda:N and metal")


def _share(array: NDArray[Any]) -> Array:
    """A CPU tensor on a numpy array's own memory. Ops never write to what they were given as input."""
    if array.dtype == ml_dtypes.bfloat16:
        return _share(array.view(np.int16)).view(torch.bfloat16)
    if array.dtype == ml_dtypes.float8_e4m3fn:
        return _share(array.view(np.uint8)).view(torch.float8_e4m3fn)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _integers(array: Array) -> list[int]:
    """The values of an int32 array, without waiting for the device where it came from the host."""
    values: list[int] = getattr(array, "host_values", None) or array.tolist()
    return values


class TorchOps(StoredOps, RecurrentOps):
    """Every op of `Ops` in torch, on one device.

    `threads` sets torch's own number of CPU threads (of the whole process) when the device is the CPU. Deterministic,
    reductions run over groups of a fixed shape and products are one product and one sum a row: slower, and a row's
    bits depend on nothing else.
    """

    name = "torch"
    library = torch
    _integers = staticmethod(_integers)

    def __init__(self, device: str = "cpu", threads: int = 1, deterministic: bool = False) -> None:
        self.device = device
        self.threads = threads
        self.processors: Sequence[int] = ()
        self.deterministic = deterministic
        self._device = _resolve(device)
        on_cpu = self._device.type == "cpu"
        # Elements held at a time: of weights made float32; of cached keys, values and scores in attention.
        self._strip = 1 << 18 if on_cpu else 1 << 26
        self._gather = 1 << 22 if on_cpu else 1 << 26
        self._wide = torch.float32 if self._device.type == "mps" else torch.float64
        if on_cpu:
            torch.set_num_threads(threads)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=self._device)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Array:
        return torch.zeros(shape, dtype=getattr(torch, dtype), device=self._device)

    def from_host(self, array: NDArray[Any]) -> Array:
        array = np.ascontiguousarray(array)
        tensor = _share(array)
        if self._device.type == "cpu":
            return tensor
        tensor = tensor.to(self._device)
        if array.dtype == np.int32 and array.ndim == 1:
            tensor.host_values = array.tolist()
        return tensor

    def to_host(self, array: Array) -> NDArray[Any]:
        host = array.detach().cpu()
        values: NDArray[Any]
        if host.dtype == torch.bfloat16:
            values = host.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        elif host.dtype == torch.float8_e4m3fn:
            values = host.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
        else:
            values = host.numpy()
        return values

    def view(self, array: Array, shape: tuple[int, ...]) -> Array:
        return array.view(-1)[: math.prod(shape)].view(shape)

    def synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        elif self._device.type == "mps":
            torch.mps.synchronize()

    def free_memory(self) -> int | None:
        return int(torch.cuda.mem_get_info(self._device)[0]) if self._device.type == "cuda" else None

    def matmul(self, out: Array, x: Array, weight: Array, bias: Array | None = None) -> None:
        check(
            "matmul",
            ("out", out, "T N", FLOAT32),
            ("x", x, "T K", FLOAT32),
            ("weight", weight, "N K", FLOATS),
            ("bias", bias, "N", FLOAT32),
        )
        self._product(out, x, lambda part: part.float(), weight, bias)

    def matmul_blocks(self, out: Array, x: Array, blocks: Array, format: str, bias: Array | None = None) -> None:
        check(
            "matmul_blocks",
            ("out", out, "T N", FLOAT32),
            ("x", x, "T K", FLOAT32),
            ("blocks", blocks, "N bytes", UINT8),
            ("bias", bias, "N", FLOAT32),
        )
        check_blocks("matmul_blocks", blocks, format, x.shape[1])
        self._product(out, x, lambda part: _dequantize(format, part), blocks, bias)

    def _product(
        self, out: Array, x: Array, decode: Callable[[Array], Array], weight: Array, bias: Array | None
    ) -> None:
        """out = x @ decode(weight).T + bias, a strip of the weight's rows at a time."""
        if not len(x):
            return
        step = max(1, self._strip // max(1, x.shape[1]))
        for start in range(0, len(weight), step):
            values = decode(weight[start : start + step])
            part = out[:, start : start + step]
            if self.deterministic:
                for t in range(len(x)):
                    torch.sum(values * x[t], dim=-1, out=part[t])
            else:
                part.copy_(x @ values.T)
        if bias is not None:
            out += bias

    def rows(self, out: Array, ids: Array, weight: Array) -> None:
        check("rows", ("out", out, "R K", FLOAT32), ("ids", ids, "R", INT32), ("weight", weight, "V K", FLOATS))
        out.copy_(weight.index_select(0, ids))

    def rows_blocks(self, out: Array, ids: Array, blocks: Array, format: str) -> None:
        check(
            "rows_blocks",
            ("out", out, "R K", FLOAT32),
            ("ids", ids, "R", INT32),
            ("blocks", blocks, "V bytes", UINT8),
        )
        check_blocks("rows_blocks", blocks, format, out.shape[1])
        if len(ids):
            out.copy_(_dequantize(format, blocks.index_select(0, ids)))

    def matmul_coded(self, out: Array, x: Array, coded: Coded, bias: Array | None = None) -> None:
        check_coded(
            "matmul_coded",
            coded,
            ("out", out, "T N", FLOAT32),
            ("x", x, "T K", FLOAT32),
            ("bias", bias, "N", FLOAT32),
        )
        if coded.order is not None:
            x = x.index_select(1, coded.order)
        rows = torch.arange(coded.shape[0], device=self._device)
        self._product(out, x, lambda part: decode(_TORCH, coded, part), rows, bias)

    def rows_coded(self, out: Array, ids: Array, coded: Coded) -> None:
        check_coded("rows_coded", coded, ("out", out, "R K", FLOAT32), ("ids", ids, "R", INT32))
        if not len(ids):
            return
        values = decode(_TORCH, coded, ids.long())
        if coded.order is None:
            out.copy_(values)
        else:
            out.index_copy_(1, coded.order.long(), values)

    def matmul_experts(
        self,
        out: Array,
        x: Array,
        offsets: Array | None,
        weights: Sequence[Array],
        format: str | None,
        bias: Array | None = None,
    ) -> None:
        bounds = [] if offsets is None else _integers(offsets)
        for e, rows in check_experts(out, x, offsets, bounds, weights, bias):
            own = None if bias is None else bias[e]
            if format is None:
                self.matmul(out[rows], x[rows], weights[e], own)
            else:
                self.matmul_blocks(out[rows], x[rows], weights[e], format, own)

    def rms_norm(self, out: Array, x: Array, weight: Array | None, eps: float) -> None:
        check_norm("rms_norm", out, x, weight)
        for rows, part in self._groups(x):
            root = part.square().mean(dim=-1, keepdim=True).add_(eps).sqrt_()
            out[rows] = (part / root)[: len(x[rows])]
        if weight is not None:
            _by_row(out, weight).mul_(weight)

    def layer_norm(self, out: Array, x: Array, weight: Array | None, bias: Array | None, eps: float) -> None:
        check_norm("layer_norm", out, x, weight, bias)
        for rows, part in self._groups(x):
            centred = part - part.mean(dim=-1, keepdim=True)
            root = centred.square().mean(dim=-1, keepdim=True).add_(eps).sqrt_()
            out[rows] = (centred / root)[: len(x[rows])]
        if weight is not None:
            _by_row(out, weight).mul_(weight)
        if bias is not None:
            _by_row(out, bias).add_(bias)

    def _groups(self, x: Array) -> Iterator[tuple[slice, Array]]:
        """All rows at once; deterministic, in groups of one size."""
        return row_groups(x) if self.deterministic else iter([(slice(0, len(x)), x)])

    def _rows(self, count: int) -> Iterator[slice]:
        """All rows at once; deterministic, one at a time: torch rounds what fills its vectors and what is left over
        at the end of an array differently, so an element's place must not depend on the other rows."""
        step = 1 if self.deterministic else max(1, count)
        return (slice(start, start + step) for start in range(0, count, step))

    def add(self, out: Array, x: Array, factor: float = 1.0) -> None:
        check_same("add", out=out, x=x)
        out += x if factor == 1.0 else x * factor

    def add_gated(self, out: Array, x: Array, gate: Array) -> None:
        check_gate(out, x, gate)
        for rows in self._rows(len(out)):
            out[rows] += torch.sigmoid(gate[rows]) * x[rows]

    def multiply(self, out: Array, x: Array) -> None:
        check("multiply", ("out", out, "T K", FLOAT32), ("x", x, "T K", FLOAT32))
        out.mul_(x)

    def scale(self, x: Array, factor: float) -> None:
        check_same("scale", x=x)
        x.mul_(factor)

    def clip(self, x: Array, limit: float) -> None:
        check_same("clip", x=x)
        x.clamp_(-limit, limit)

    def softcap(self, x: Array, cap: float) -> None:
        check_same("softcap", x=x)
        for rows in self._rows(len(x)):
            x[rows] = (x[rows] / cap).tanh() * cap

    def shift(self, x: Array, by: Array) -> None:
        check("shift", ("x", x, "T K", FLOAT32), ("by", by, "K", FLOAT32))
        x += by

    def place(self, out: Array, x: Array, to: int, start: int, width: int) -> None:
        check_place(out, x, to, start, width)
        out[:, :, to : to + width] = x[:, :, start : start + width]

    def swap(self, out: Array, x: Array, to: int, start: int, width: int) -> None:
        check_swap(out, x, to, start, width)
        out[:, :, to : to + width] = x[:, :, start : start + width].transpose(0, 1)

    def copy(self, out: Array, x: Array) -> None:
        check_same("copy", out=out, x=x)
        out.copy_(x)

    def part(self, array: Array, start: int, stop: int) -> Array:
        return array[start:stop]

    def rope_angles(self, cos: Array, sin: Array, positions: Array, inv_freq: Array, scale: float) -> None:
        check(
            "rope_angles",
            ("cos", cos, "T half", FLOAT32),
            ("sin", sin, "T half", FLOAT32),
            ("positions", positions, "T", INT32),
            ("inv_freq", inv_freq, "half" if inv_freq.ndim == 1 else "T half", FLOAT32),
        )
        angles = positions.float()[:, None] * inv_freq
        for rows in self._rows(len(angles)):
            torch.mul(angles[rows].cos(), scale, out=cos[rows])
            torch.mul(angles[rows].sin(), scale, out=sin[rows])

    def rope(self, x: Array, cos: Array, sin: Array, interleaved: bool, offset: int = 0) -> None:
        check("rope", ("x", x, "T H D", FLOAT32), ("cos", cos, "T half", FLOAT32), ("sin", sin, "T half", FLOAT32))
        half = cos.shape[1]
        if not 0 <= offset <= x.shape[2] - 2 * half:
            raise ValueError(f"rope: {2 * half} elements from {offset} on do not lie in heads of {x.shape[2]}")
        x = x[:, :, offset:]
        if interleaved:
            a, b = x[:, :, 0 : 2 * half : 2], x[:, :, 1 : 2 * half : 2]
        else:
            a, b = x[:, :, :half], x[:, :, half : 2 * half]
        c, s = cos[:, None, :], sin[:, None, :]
        turned = a * c - b * s, b * c + a * s
        a.copy_(turned[0])
        b.copy_(turned[1])

    def write_cache(self, k_cache: Array, v_cache: Array, k: Array, v: Array, slots: Array) -> None:
        check_write(k_cache, v_cache, k, v, slots)
        torch_cells.write_keys(k_cache, k, slots)
        torch_cells.write_values(v_cache, v, slots)

    def read_cache(self, k: Array, v: Array, k_cache: Array, v_cache: Array, table: Array, first: int) -> None:
        check_read(k, v, k_cache, v_cache, table, first)
        if not len(k):
            return
        size, tokens = k_cache.shape[3], slice(first % k_cache.shape[3], None)
        blocks = table[first // size : -(-(first + len(k)) // size)].long()
        keys = torch_cells.read_keys(torch_cells.pages_of(k_cache, blocks), k.shape[2])
        keys = torch_cells.rotate(keys) if cells_of(k_cache).top else keys
        values = torch_cells.read_values(torch_cells.pages_of(v_cache, blocks), v.shape[2])
        for out, x in ((k, keys), (v, values)):
            out.copy_(x.transpose(1, 2).flatten(0, 1)[tokens][: len(out)])

    def copy_blocks(self, cache: Array, source: Array, target: Array) -> None:
        check(
            "copy_blocks",
            ("cache", cache, "blocks H size D", CACHES),
            ("source", source, "n", INT32),
            ("target", target, "n", INT32),
        )
        flat = cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache  # which torch cannot index
        flat.index_copy_(0, target.long(), flat.index_select(0, source))

    def attention(
        self,
        out: Array,
        q: Array,
        k_cache: Array,
        v_cache: Array,
        block_tables: Array,
        query_start: Array,
        context_lens: Array,
        scale: float,
        window: int = 0,
        causal: bool = True,
        softcap: float = 0.0,
        sinks: Array | None = None,
        slopes: Array | None = None,
        latent: bool = False,
        totals: Array | None = None,
        joins: bool = False,
    ) -> None:
        lists = (block_tables, query_start, context_lens)
        check_attention(out, q, k_cache, v_cache, *lists, causal, sinks, slopes, latent, totals, joins)
        scoring = Scoring(scale, window, causal, softcap, sinks, slopes)
        if cells_of(k_cache).top and not latent:
            q = torch_cells.rotate(q)
        starts, contexts = _integers(query_start), _integers(context_lens)
        step = Step(k_cache, v_cache, block_tables, starts, contexts, context_lens, latent)
        before = (out.clone(), totals.clone()) if joins and totals is not None else None
        if self.deterministic:
            attend_rows(out, q, step, scoring, totals)
        else:
            attend(out, q, step, scoring, self._gather, totals)
        if before is not None and totals is not None:
            here = torch.sigmoid(totals - before[1])
            out.copy_(torch.lerp(before[0], out, here[..., None]))
            torch.logaddexp(before[1], totals, out=totals)

    def activation(self, out: Array, x: Array, kind: str) -> None:
        check("activation", ("out", out, "T N", FLOAT32), ("x", x, "T N", FLOAT32))
        act = _activation("activation", kind)
        for rows in self._rows(len(out)):
            out[rows] = act(x[rows])

    def gated_activation(self, out: Array, gate: Array, up: Array, kind: str, limit: float = 0.0) -> None:
        check(
            "gated_activation",
            ("out", out, "T N", FLOAT32),
            ("gate", gate, "T N", FLOAT32),
            ("up", up, "T N", FLOAT32),
        )
        if kind == "swiglu_clamped":
            for rows in self._rows(len(out)):
                capped = gate[rows].clamp(max=limit)
                torch.mul(_gelu_quick(capped), up[rows].clamp(-limit, limit) + 1, out=out[rows])
            return
        act = _activation("gated_activation", kind)
        for rows in self._rows(len(out)):
            torch.mul(act(gate[rows]), up[rows], out=out[rows])

    def route(
        self,
        weights: Array,
        experts: Array,
        logits: Array,
        correction: Array | None,
        score: str,
        normalize: bool,
        scale: float,
        groups: int = 1,
        top_groups: int = 1,
        group_score: str = "max",
        jitter: float = 0.0,
    ) -> None:
        check_route(weights, experts, logits, correction, score, groups, top_groups, group_score)
        count = experts.shape[1]
        for rows, part in self._groups(logits):
            if score == "sparsemixer":
                chosen, places = _sparsemixer(part, jitter)
            else:
                scores = part.softmax(dim=-1) if score == "softmax" else part.sigmoid()
                choice = scores if correction is None else scores + correction
                if groups > 1:
                    choice = _within_groups(choice, groups, top_groups, group_score)
                places = _best(choice, count)
                chosen = scores.gather(1, places)
            if normalize:
                chosen = chosen / (chosen.sum(dim=-1, keepdim=True) + 1e-20)
            real = len(logits[rows])
            weights[rows] = (chosen * scale)[:real]
            experts[rows] = places[:real].to(torch.int32)

    def group_rows(self, rows: Array, slots: Array, offsets: Array, experts: Array) -> None:
        check_groups(rows, slots, offsets, experts)
        ordered, order = experts.view(-1).sort(stable=True)
        rows.copy_(order // max(1, experts.shape[1]))
        slots.view(-1)[order] = torch.arange(len(order), dtype=torch.int32, device=self._device)
        every = torch.arange(len(offsets), dtype=torch.int32, device=self._device)
        offsets.copy_(torch.searchsorted(ordered, every))

    def combine(self, out: Array, x: Array, slots: Array, weights: Array) -> None:
        check(
            "combine",
            ("out", out, "T K", FLOAT32),
            ("x", x, "places K", FLOAT32),
            ("slots", slots, "T k", INT32),
            ("weights", weights, "T k", FLOAT32),
        )
        out.zero_()
        for j in range(slots.shape[1]):
            out += weights[:, j : j + 1] * x.index_select(0, slots[:, j])

    def take_rows(self, out: Array, x: Array, rows: Array) -> None:
        check("take_rows", ("out", out, "R K", FLOAT32), ("x", x, "T K", FLOAT32), ("rows", rows, "R", INT32))
        torch.index_select(x, 0, rows, out=out)

    def apply_edits(self, logits: Array, rows: Array, ids: Array, penalties: Array, biases: Array) -> None:
        check(
            "apply_edits",
            ("logits", logits, "R V", FLOAT32),
            ("rows", rows, "E", INT32),
            ("ids", ids, "E", INT32),
            ("penalties", penalties, "E", FLOAT32),
            ("biases", biases, "E", FLOAT32),
        )
        at = (rows.long(), ids.long())
        values = logits[at]
        logits[at] = torch.where(values > 0, values / penalties, values * penalties) + biases

    def mask(self, logits: Array, rows: Array, masks: Array) -> None:
        check_mask(logits, rows, masks)
        bits = (masks[:, :, None] >> torch.arange(32, dtype=torch.int32, device=masks.device)) & 1
        forbidden = bits.flatten(1)[:, : logits.shape[1]] == 0
        at = rows.long()
        logits[at] = logits[at].masked_fill(forbidden, -torch.inf)

    def log_softmax(self, out: Array, logits: Array) -> None:
        check("log_softmax", ("out", out, "R V", FLOAT32), ("logits", logits, "R V", FLOAT32))
        out.copy_(logits.log_softmax(dim=-1))

    def sample(
        self,
        tokens: Array,
        logits: Array,
        temperature: Array,
        top_k: Array,
        top_p: Array,
        min_p: Array,
        uniform: Array,
        typical_p: Array | None = None,
        xtc_threshold: Array | None = None,
    ) -> None:
        check_sample(tokens, logits, temperature, top_k, top_p, min_p, uniform, typical_p, xtc_threshold)
        if not len(logits):
            return
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        ordered = ordered.to(self._wide)
        greedy = temperature == 0
        warmth = torch.where(greedy, 1, temperature).to(self._wide)[:, None]
        weights = ((ordered - ordered[:, :1]) / warmth).exp()
        # In descending order each cut keeps a range; what is cut weighs nothing from then on.
        vocabulary = logits.shape[1]
        edge = torch.where(top_k > 0, top_k.clamp(max=vocabulary), vocabulary).long() - 1
        weights *= ordered >= ordered.gather(1, edge[:, None])
        if typical_p is not None:
            weights *= _typical(weights, typical_p.to(self._wide)[:, None])
        sums = weights.cumsum(dim=-1)
        whole = (top_p >= 1)[:, None]
        before = sums - weights
        before[:, 0] = -1  # one token is always kept
        weights *= whole | (before < top_p.to(self._wide)[:, None] * sums[:, -1:])
        weights *= weights >= min_p.to(self._wide)[:, None] * weights.amax(dim=-1, keepdim=True)
        if xtc_threshold is not None:
            least = xtc_threshold.to(self._wide)[:, None] * weights.sum(dim=-1, keepdim=True)
            top = (weights >= least) & (weights > 0)
            weights[:, :-1] *= ~(top[:, :-1] & top[:, 1:])
        sums = weights.cumsum(dim=-1)
        drawn = (sums <= uniform.to(self._wide)[:, None] * sums[:, -1:]).sum(dim=-1).clamp(max=vocabulary - 1)
        drawn = torch.where(greedy, 0, drawn)
        tokens.copy_(order.gather(1, drawn[:, None])[:, 0])


def _typical(weights: Array, mass: Array) -> Array:
    """Whether each of weights [R,V] is among the typical ones; mass [R,1], 1 for all."""
    p = weights / weights.sum(dim=-1, keepdim=True)
    information = -p.log()
    expected = torch.where(p > 0, p * information, 0).sum(dim=-1, keepdim=True)
    nearest, order = (information - expected).abs().sort(dim=-1, stable=True)
    sums = p.gather(1, order).cumsum(dim=-1)
    last = (sums < mass * sums[:, -1:]).sum(dim=-1, keepdim=True).clamp(max=p.shape[1] - 1)
    return ((information - expected).abs() <= nearest.gather(1, last)) | (mass >= 1)


def _by_row(x: Array, weight: Array) -> Array:
    """x [T,K] so that a weight [K], or [W,K] for rows t % W, lies over it."""
    return x if weight.ndim == 1 else x.view(len(x) // len(weight), *weight.shape)


def _activation(op: str, kind: str) -> Callable[[Array], Array]:
    if kind not in _ACTIVATIONS:
        raise ValueError(f"{op}: kind {kind!r} is none of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[kind]


def _best(values: Array, count: int) -> Array:
    """Places of the `count` highest of each row, the highest first, the lower place on ties."""
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def _within_groups(choice: Array, groups: int, top_groups: int, group_score: str) -> Array:
    """choice [T,E], -inf in all but the best groups."""
    each = choice.unflatten(1, (groups, -1))
    worth = each.amax(dim=-1) if group_score == "max" else each.topk(2, dim=-1).values.sum(dim=-1)
    kept = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, _best(worth, top_groups), True)
    return each.masked_fill(~kept[:, :, None], -math.inf).flatten(1)


def _sparsemixer(logits: Array, jitter: float) -> tuple[Array, Array]:
    """Weights and places [T,2]; see `Ops.route`."""
    weights, places, left = [], [], logits
    for _ in range(2):
        top = left.amax(dim=-1, keepdim=True)
        far = (top - left) / torch.maximum(left.abs(), top) > 2 * jitter
        place = _best(left, 1)
        weights.append(left.masked_fill(far, -math.inf).softmax(dim=-1).gather(1, place))
        places.append(place)
        left = left.scatter(1, place, -math.inf)
    return torch.cat(weights, dim=1), torch.cat(places, dim=1)
