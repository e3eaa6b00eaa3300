"""The contract of the ops: what every kernel module must offer, with shapes and dtypes.

Owns the `Ops` protocol and the geometry of quantized blocks. Must not know: weights, layers, models.

Conventions: T tokens of the step, R rows wanted, S sequences, N outputs, K inputs, V vocabulary, H heads, D head size.
Activations are float32 on the CPU; on other devices the ops keep them in float32 too and may compute inside in less.
An op writes into `out` (never overlapping its inputs unless it says "in place") and neither allocates results,
reads back to the host, nor branches on values. Arrays are contiguous, rows first. `Array` is what the module works
on: numpy arrays on the CPU, torch tensors elsewhere. Where T, R or S is 0, an op does nothing.

Arithmetic. Quantized weights are what the format says in float32 (d * q + m, each operation rounded), products
accumulate in float32. A module may, for quantized matrices, make activations 8-bit integers with a scale for each 32 of
a row, and sum integers, or, for many rows, make both factors bfloat16, as may attention where its cache is not float32;
one that was made with `exact=True` never does.
With `deterministic=True` a row of a result depends on its own inputs alone, bit for bit: not on the other rows, their
number, or the number of threads. Attention visits a row's context in absolute order, cut at fixed positions, so that
chunks, cache hits and neighbours do not change it either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from tramontane.records import dataclass

if TYPE_CHECKING:
    from tramontane.kernels.coded import Coded

Array = Any


@dataclass(frozen=True)
class BlockLayout:
    """A quantized block: `elements` weights of one row stored in `nbytes` bytes (GGML's layouts, see gguf's docs)."""

    elements: int
    nbytes: int


BLOCKS: Mapping[str, BlockLayout] = {
    "Q4_0": BlockLayout(32, 18),
    "Q4_1": BlockLayout(32, 20),
    "Q5_0": BlockLayout(32, 22),
    "Q5_1": BlockLayout(32, 24),
    "Q8_0": BlockLayout(32, 34),
    "Q8_1": BlockLayout(32, 36),
    "Q2_K": BlockLayout(256, 84),
    "Q3_K": BlockLayout(256, 110),
    "Q4_K": BlockLayout(256, 144),
    "Q5_K": BlockLayout(256, 176),
    "Q6_K": BlockLayout(256, 210),
    "Q8_K": BlockLayout(256, 292),
    "IQ1_S": BlockLayout(256, 50),
    "IQ1_M": BlockLayout(256, 56),
    "IQ2_XXS": BlockLayout(256, 66),
    "IQ2_XS": BlockLayout(256, 74),
    "IQ2_S": BlockLayout(256, 82),
    "IQ3_XXS": BlockLayout(256, 98),
    "IQ3_S": BlockLayout(256, 110),
    "IQ4_NL": BlockLayout(32, 18),
    "IQ4_XS": BlockLayout(256, 136),
    "TQ1_0": BlockLayout(256, 54),
    "TQ2_0": BlockLayout(256, 66),
    "MXFP4": BlockLayout(32, 17),
    "NVFP4": BlockLayout(64, 36),
    "Q1_0": BlockLayout(128, 18),
    "Q2_0": BlockLayout(64, 18),
}


class Ops(Protocol):
    """The ops of one device."""

    name: str
    """The implementation: "reference", "cpu" (with its instruction set, such as "cpu-avx512") or "torch"."""
    device: str
    threads: int
    processors: Sequence[int]
    """That the threads are bound to, the calling one first; empty where they run where the system likes."""
    deterministic: bool

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """New uninitialised array; dtype is a numpy name or "bfloat16". Memory counts once it is touched."""
        ...

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Array: ...

    def from_host(self, array: NDArray[Any]) -> Array:
        """The array on the device; the same memory, read-only maps included, where the device can use it."""
        ...

    def to_host(self, array: Array) -> NDArray[Any]:
        """A numpy array with the values (bfloat16 through ml_dtypes); may share memory on the CPU."""
        ...

    def pack(self, matrix: Array, format: str) -> Array:
        """A matrix [N,K] (or its blocks) as this module multiplies it fastest: what the ops of products and rows take
        in its place, and nothing else does. The same array where there is nothing faster. `format`: F32, F16, BF16 or
        one of `BLOCKS`."""
        ...

    def packing(self) -> AbstractContextManager[object]:
        """Until its end, `pack` may only note what it is to pack, so that this is one piece of work, beside which other
        threads run Python. Until then nothing but `unpack` may be given what `pack` returned, and matrices that it was
        given must not change."""
        ...

    def room(self, format: str, shape: tuple[int, int]) -> Array | None:
        """An array such as `pack` makes of a matrix [N,K] in this format, with any values; None where it makes none."""
        ...

    def unpack(self, packed: Array, format: str, shape: tuple[int, int]) -> NDArray[Any]:
        """The matrix [N,K], or its blocks, that `packed` was made of, on the host and bit for bit."""
        ...

    def pack_codes(self, coded: Coded, rows: int) -> Coded:
        """The same matrix, of so many rows, with its codes and grids as this module multiplies them fastest, for
        `matmul_coded` and `rows_coded` of this module alone; the same where there is nothing faster. Codes may be those
        that it made before."""
        ...

    def room_codes(self, coded: Coded, rows: int) -> Array | None:
        """An array such as `pack_codes` makes of the codes of such a matrix of so many rows (at its own it does not
        look), with any values; None where it makes none."""
        ...

    def unpack_codes(self, coded: Coded, rows: int) -> NDArray[Any]:
        """The codes of so many rows that `pack_codes` was given, on the host and bit for bit."""
        ...

    def view(self, array: Array, shape: tuple[int, ...]) -> Array:
        """The first prod(shape) elements of a contiguous array, as `shape`, same memory."""
        ...

    def synchronize(self) -> None:
        """Wait until everything asked for has been computed."""
        ...

    def record(self, compute: Callable[[], None]) -> Callable[[], None] | None:
        """Call `compute` once, and return what runs the ops that it called again, on the same arrays with the values
        that they then have. It keeps these arrays, and raises what the ops do for values out of bounds. None where
        this module cannot, or where something was computed that is no op."""
        ...

    def free_memory(self) -> int | None:
        """Bytes that are free in the device's own memory; None where it uses the host's."""
        ...

    def matmul(self, out: Array, x: Array, weight: Array, bias: Array | None = None) -> None:
        """out[T,N] = x[T,K] @ weight[N,K].T (+ bias[N]); weight float32, float16 or bfloat16, the rest float32."""
        ...

    def matmul_blocks(self, out: Array, x: Array, blocks: Array, format: str, bias: Array | None = None) -> None:
        """The same with weight rows as quantized blocks: blocks uint8 [N, K / elements * nbytes]."""
        ...

    def matmul_together(
        self,
        outs: Sequence[Array],
        x: Array,
        weights: Sequence[Array],
        format: str | None,
        biases: Sequence[Array | None],
    ) -> None:
        """`matmul` (`matmul_blocks` of a format) of one x by several matrices of one dtype: outs[i] = x @ weights[i].T
        (+ biases[i]), bit for bit."""
        ...

    def rows(self, out: Array, ids: Array, weight: Array) -> None:
        """out[R,K] float32 = weight[ids], ids int32 [R]; weight [V,K] float32, float16 or bfloat16."""
        ...

    def rows_blocks(self, out: Array, ids: Array, blocks: Array, format: str) -> None:
        """out[R,K] float32 = the rows `ids` of quantized blocks, dequantized exactly."""
        ...

    def matmul_coded(self, out: Array, x: Array, coded: Coded, bias: Array | None = None) -> None:
        """The same with a weight of codes, tables and scales: see `kernels.coded`."""
        ...

    def rows_coded(self, out: Array, ids: Array, coded: Coded) -> None:
        """out[R,K] float32 = the rows `ids` of a coded matrix, dequantized exactly."""
        ...

    def matmul_experts(
        self,
        out: Array,
        x: Array,
        offsets: Array | None,
        weights: Sequence[Array],
        format: str | None,
        bias: Array | None = None,
    ) -> None:
        """`matmul` (`matmul_blocks` of a format) of rows that are grouped: those of x[P,K] from offsets[e] to
        offsets[e + 1] by weights[e].

        offsets int32 [E+1], read on the host, ascending within P; None: each has P / E rows. weights are E arrays of
        one shape and dtype, not touched where they have no rows; bias float32 [E,N].
        """
        ...

    def rms_norm(self, out: Array, x: Array, weight: Array | None, eps: float) -> None:
        """out[T,K] = x / sqrt(mean(x²) + eps) * weight (Zhang and Sennrich, 2019). out may be x.

        weight [K], or [W,K] of which row t takes row t % W, so that [T * H, D] has a norm a head; None: no weight.
        """
        ...

    def layer_norm(self, out: Array, x: Array, weight: Array | None, bias: Array | None, eps: float) -> None:
        """out[T,K] = (x - mean) / sqrt(variance + eps) * weight + bias (Ba et al., 2016). out may be x.

        weight and bias as in `rms_norm`.
        """
        ...

    def add(self, out: Array, x: Array, factor: float = 1.0) -> None:
        """In place: out += factor * x, same shapes, float32."""
        ...

    def add_gated(self, out: Array, x: Array, gate: Array) -> None:
        """In place: out[T,K] += sigmoid(gate[T,1]) * x[T,K]."""
        ...

    def multiply(self, out: Array, x: Array) -> None:
        """In place: out[T,K] *= x[T,K]."""
        ...

    def scale(self, x: Array, factor: float) -> None:
        """In place: x[T,K] *= factor."""
        ...

    def clip(self, x: Array, limit: float) -> None:
        """In place: x[T,K] between -limit and limit."""
        ...

    def softcap(self, x: Array, cap: float) -> None:
        """In place: x[T,K] = cap * tanh(x / cap)."""
        ...

    def shift(self, x: Array, by: Array) -> None:
        """In place: x[T,K] += by[K]."""
        ...

    def place(self, out: Array, x: Array, to: int, start: int, width: int) -> None:
        """out[T,H,to:to+width] = x[T,H or 1,start:start+width]; one head of x goes to all heads of out."""
        ...

    def swap(self, out: Array, x: Array, to: int, start: int, width: int) -> None:
        """out[B,A,to:to+width] = x[A,B,start:start+width], with A and B in turn: rows a token become rows a head."""
        ...

    def copy(self, out: Array, x: Array) -> None:
        """out = x, same shapes, float32."""
        ...

    def part(self, array: Array, start: int, stop: int) -> Array:
        """Rows [start, stop) of a contiguous array, same memory."""
        ...

    def rope_angles(self, cos: Array, sin: Array, positions: Array, inv_freq: Array, scale: float) -> None:
        """cos, sin [T,D/2] = scale * cos / sin(positions[T] int32 * inv_freq float32), the angle in float32.

        inv_freq is [D/2], or [T,D/2] where rows have their own.
        """
        ...

    def rope(self, x: Array, cos: Array, sin: Array, interleaved: bool, offset: int = 0) -> None:
        """In place rotation of x [T,H,D] (Su et al., 2021) over 2 * cos.shape[1] elements a head from `offset` on.

        Pairs are (i, i + half), or (2i, 2i + 1) where interleaved.
        """
        ...

    def write_cache(self, k_cache: Array, v_cache: Array, k: Array, v: Array, slots: Array) -> None:
        """Store k, v [T,H,D] float32 at slots [T] int32 (block * block_size + offset), rounded to the cache's dtype.

        Caches are of keys [num_blocks,H,D,block_size], so that tokens lie side by side where they are scored, and of
        values [num_blocks,H,block_size,Dv]; both in float32, float16 or bfloat16, or quantized in int8 or
        float8_e4m3fn, with scales beside them: `kernels.cells` has their shapes and says what they stand for.
        """
        ...

    def read_cache(self, k: Array, v: Array, k_cache: Array, v_cache: Array, table: Array, first: int) -> None:
        """k, v [T,H,D] float32 = what `write_cache` stored of T tokens, from the token `first` on of the context that
        lies in the blocks of table int32 [B]."""
        ...

    def copy_blocks(self, cache: Array, source: Array, target: Array) -> None:
        """cache[target[i]] = cache[source[i]] for int32 block ids; no target is also a source."""
        ...

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
        """Attention of ragged rows over the paged cache, float32 softmax.

        q [T,Hq,D], out [T,Hq,Dv]; caches as in `write_cache`, Hq a multiple of Hkv; block_tables int32 [S,B];
        query_start int32 [S+1]; context_lens int32 [S], tokens of a sequence in the cache, those of this step included.
        The i-th of n query rows of a sequence stands at position context_len - n + i and sees positions p with p <= own
        where causal, and |own - p| < window where window > 0; where all see all, there may be fewer tokens than rows.
        Table entries wholly outside every row's window are never read and may be -1.

        A score is scale * q.k, then cap * tanh(score / cap) where softcap > 0, then minus slopes[h] * (own - p)
        (slopes float32 [Hq], with causal only; Press et al., 2022). sinks float32 [Hq]: one more score of each
        head's softmax, with no value.

        latent: what k_cache holds are values (of Dv elements) and the beginning of keys at once, and v_cache holds the
        rest of keys (D - Dv elements).

        totals float32 [T,Hq]: becomes the logarithm of the sum of exp(score) over all that a row sees. joins: out and
        totals hold what the rows made of other keys (one at least), and become what they make of these and those.
        """
        ...

    def causal_conv(
        self,
        out: Array,
        x: Array,
        state: Array,
        weight: Array,
        bias: Array | None,
        places: Array,
        query_start: Array,
        context_lens: Array,
        silu: bool = False,
    ) -> None:
        """out[T,C]: of each channel, sum over j of weight[c,j] * x[t - kernel + 1 + j, c] (+ bias[c]), then silu.

        Rows are ragged as in `attention`. What came before a sequence's rows is state[places[s]], the last kernel - 1
        inputs, and zeros where these rows are its first; afterwards the state holds the new last inputs. x float32
        [T,C], state float32 [places,1,kernel-1,C], weight [C,kernel], places int32 [S], each once; -1: of a sequence
        that has all its rows here, and whose state is not kept. So it is with `state_scan` and `delta_scan`, whose
        states start with zeros too.
        """
        ...

    def state_scan(
        self,
        out: Array,
        mixed: Array,
        step: Array,
        state: Array,
        step_bias: Array,
        decay: Array,
        skip: Array,
        places: Array,
        query_start: Array,
        context_lens: Array,
        low: float,
        high: float,
    ) -> None:
        """The selective state space of Mamba-2 (Dao and Gu, 2024): out [T,H*P] of rows mixed [T, x: H*P, B: G*N,
        C: G*N], H a multiple of G, and step [T,H].

        For each token and head h, with d = clamp(softplus(step + step_bias), low, high), the state [P,N] becomes
        exp(d * decay) * state + d * x B^T, and the output is state C + skip * x; decay (below zero), skip and step_bias
        [H], state [places,H,P,N].
        """
        ...

    def delta_scan(
        self,
        out: Array,
        mixed: Array,
        step: Array,
        rate: Array,
        state: Array,
        step_bias: Array,
        decay: Array,
        places: Array,
        query_start: Array,
        context_lens: Array,
    ) -> None:
        """The gated delta rule (Yang et al., 2024): out [T,H*V] of rows mixed [T, q: G*K, k: G*K, v: H*V], H a
        multiple of G, and step, rate [T,H].

        q and k are divided by sqrt(sum of squares + 1e-6), q by sqrt(K) too. For each token and head, the state [K,V]
        decays to S = exp(decay * softplus(step + step_bias)) * state, becomes S + k (sigmoid(rate) * (v - S^T k))^T,
        and the output is its product with q; decay (below zero) and step_bias [H], state [places,H,K,V].
        """
        ...

    def activation(self, out: Array, x: Array, kind: str) -> None:
        """out[T,N] = act(x); kind: silu, gelu (erf), gelu_tanh, gelu_quick, relu, relu_squared, sigmoid. out may be
        x."""
        ...

    def gated_activation(self, out: Array, gate: Array, up: Array, kind: str, limit: float = 0.0) -> None:
        """out[T,N] = act(gate) * up; kinds of `activation`. out may be gate.

        Kind swiglu_clamped: g = min(gate, limit), out = g * sigmoid(1.702 * g) * (clamp(up, -limit, limit) + 1).
        """
        ...

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
        """Choose experts int32 [T,k] with weights float32 [T,k] by the router's logits [T,E].

        Scores are the softmax or sigmoid of the logits. The choice is by score + correction [E], highest first, the
        lower id on ties; with groups > 1 only out of the top_groups of E / groups neighbours each that have the
        highest `group_score` ("max", or "top2": the best two added). Weights are the scores of the chosen, divided by
        their sum where `normalize`, times `scale`.
        score "sparsemixer" (Liu et al., 2023, at inference), k = 2: the best logit m, its weight the softmax over the
        logits l with (m - l) / max(|l|, m) <= 2 * jitter; then the same without the one chosen.
        """
        ...

    def group_rows(self, rows: Array, slots: Array, offsets: Array, experts: Array) -> None:
        """Sort the pairs (token t, choice j) of experts int32 [T,k] by expert, in order of t within one.

        rows int32 [T*k]: the token of each sorted place; slots int32 [T,k]: the place of each pair; offsets int32
        [E+1]: where each expert's places begin.
        """
        ...

    def combine(self, out: Array, x: Array, slots: Array, weights: Array) -> None:
        """out[T,K] = sum over j, in order, of weights[t,j] * x[slots[t,j]]; x [T*k,K]."""
        ...

    def take_rows(self, out: Array, x: Array, rows: Array) -> None:
        """out[R,K] = x[rows], rows int32 [R]."""
        ...

    def apply_edits(self, logits: Array, rows: Array, ids: Array, penalties: Array, biases: Array) -> None:
        """In place sparse edits of logits [R,V], edit e at (rows[e], ids[e]): l = l / p if l > 0 else l * p; l += b.

        rows, ids int32 [E]; penalties, biases float32 [E]; a bias of -inf masks. Each (row, id) stands once.
        """
        ...

    def mask(self, logits: Array, rows: Array, masks: Array) -> None:
        """In place: -inf to what a mask forbids, in the rows (int32 [M], each once) of logits [R,V].

        masks int32 [M, ceil(V/32)]: bit v % 32 (the lowest is 0) of word v // 32 is set where token v may stay.
        """
        ...

    def log_softmax(self, out: Array, logits: Array) -> None:
        """out[R,V] = logits - log(sum(exp(logits))), float32. out may be logits."""
        ...

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
        """tokens int32 [R]: one draw a row of logits [R,V]; the parameters are [R], top_k int32, the rest float32.
        None does as ones would: nothing.

        temperature 0: the highest logit, the lowest id on ties. Else, as transformers' warpers, in llama.cpp's order:
        divide by the temperature; keep the top_k highest logits (0: all; ties at the edge kept); with typical_p < 1
        keep the smallest set that reaches this probability of those whose information, -log p, is nearest to the
        expected (Meister et al., 2022; ties at the edge kept); keep the smallest set of the most likely whose
        probability reaches top_p (at least one); keep those with probability at least min_p times the highest; drop
        all of those with probability at least xtc_threshold but the last of them ("exclude top choices", llama.cpp);
        renormalise, after each of these; take the token, in order of descending probability (lower id first on ties),
        at which the running sum first exceeds uniform in [0, 1).
        """
        ...
