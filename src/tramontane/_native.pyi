"""The compiled module: the ops of `kernels/base.py` over numpy arrays, for one instruction set and a pool of threads.

Every op checks its arguments and raises ValueError, naming itself; it writes only into the arrays named there.
"""

from mmap import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

def instruction_sets(emulated: bool = False) -> list[str]:
    """Those compiled in that this machine runs, best first: "avx512_vnni", "avx2", "plain", ...; or those that it can
    imitate, which are never chosen by themselves."""

def instruction_set_trouble() -> str:
    """Why a better one that the processor has is not among them; empty where there is none."""

def read_strings(data: mmap | bytes, at: int, end: int, count: int, width: int) -> tuple[list[str], int]:
    """Up to `count` strings, each behind its length in `width` bytes (4 or 8) of this machine's order, from byte `at`
    on and no further than byte `end`, and where the next begins: fewer where one is not inside. Bytes that are not
    UTF-8 become lone surrogates."""

def tiles_shape(format: str, rows: int, columns: int) -> list[int]:
    """The shape that `Cpu.pack` makes of a matrix; empty for a format that has no tiles."""

def set_table(name: str, values: NDArray[np.float32], /) -> None:
    """Give a table of `kernels.tables`; ValueError where its name or its size is another."""

def spoil() -> None:
    """Where this thread records a plan, say that something is computed which is not in it."""

class Plan:
    """The ops that a thread called between `begin` and `end`, with the arrays that they were given."""

    def __init__(self) -> None: ...
    def begin(self) -> None:
        """ValueError where the thread records one already."""

    def end(self) -> bool:
        """Whether all is in the plan that was computed."""

    def run(self) -> None:
        """Compute it again; other Python threads run meanwhile. ValueError, naming the op, for values out of bounds."""

    def __len__(self) -> int: ...

class Cpu:
    """The kernels of one instruction set ("": the best; ValueError where it is missing) and their threads.

    Ops may be called from several threads: one of them gets the pool, the others compute alone.
    """

    def __init__(self, threads: int, isa: str = "", exact: bool = False, deterministic: bool = False) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def turns(self) -> int:
        """How many ops the threads have shared."""

    def pin(self, processors: list[int], /) -> None:
        """Bind the threads, all but the calling one, to a processor each, before an op starts them."""

    def matmul(
        self, out: NDArray[Any], x: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any] | None, /
    ) -> None: ...
    def matmul_blocks(
        self, out: NDArray[Any], x: NDArray[Any], blocks: NDArray[Any], format: str, bias: NDArray[Any] | None, /
    ) -> None: ...
    def matmul_together(
        self,
        outs: tuple[NDArray[Any], ...],
        x: NDArray[Any],
        weights: tuple[NDArray[Any], ...],
        format: str,
        biases: tuple[NDArray[Any] | None, ...],
        /,
    ) -> None: ...
    def pack(self, tiles: NDArray[Any], stored: NDArray[Any], format: str) -> None:
        """Tiles of a matrix in rows, or of its blocks; see csrc/tiles.h. Products and rows take either."""

    def pack_all(self, matrices: list[tuple[NDArray[Any], NDArray[Any], str]]) -> None:
        """`pack` of several, in one stretch without Python's lock."""

    def unpack(self, stored: NDArray[Any], tiles: NDArray[Any], format: str) -> None: ...
    def pack_codes(self, tiles: NDArray[Any], codes: NDArray[Any], bits: int) -> None:
        """Panels [ceil(N / 16), K / 32, bits * 64] of codes [N, K * bits / 8]; `matmul_coded` takes either."""

    def unpack_codes(self, codes: NDArray[Any], tiles: NDArray[Any], bits: int) -> None: ...
    def rows(self, out: NDArray[Any], ids: NDArray[Any], weight: NDArray[Any], /) -> None: ...
    def rows_blocks(self, out: NDArray[Any], ids: NDArray[Any], blocks: NDArray[Any], format: str, /) -> None: ...
    def matmul_coded(
        self,
        out: NDArray[Any],
        x: NDArray[Any],
        bias: NDArray[Any] | None,
        codes: NDArray[Any],
        table: NDArray[Any],
        scales: NDArray[Any],
        scale_table: NDArray[Any] | None,
        zeros: NDArray[Any] | None,
        offsets: NDArray[Any] | None,
        order: NDArray[Any] | None,
        bits: int,
        group: int,
        row_block: int,
        factor: float,
    ) -> None: ...
    def rows_coded(
        self,
        out: NDArray[Any],
        ids: NDArray[Any],
        codes: NDArray[Any],
        table: NDArray[Any],
        scales: NDArray[Any],
        scale_table: NDArray[Any] | None,
        zeros: NDArray[Any] | None,
        offsets: NDArray[Any] | None,
        order: NDArray[Any] | None,
        bits: int,
        group: int,
        row_block: int,
        factor: float,
    ) -> None: ...
    def matmul_experts(
        self,
        out: NDArray[Any],
        x: NDArray[Any],
        offsets: NDArray[Any] | None,
        weights: tuple[NDArray[Any], ...],
        format: str,
        bias: NDArray[Any] | None,
    ) -> None: ...
    def rms_norm(self, out: NDArray[Any], x: NDArray[Any], weight: NDArray[Any] | None, eps: float) -> None: ...
    def layer_norm(
        self, out: NDArray[Any], x: NDArray[Any], weight: NDArray[Any] | None, bias: NDArray[Any] | None, eps: float
    ) -> None: ...
    def add(self, out: NDArray[Any], x: NDArray[Any], factor: float, /) -> None: ...
    def add_gated(self, out: NDArray[Any], x: NDArray[Any], gate: NDArray[Any], /) -> None: ...
    def multiply(self, out: NDArray[Any], x: NDArray[Any], /) -> None: ...
    def scale(self, x: NDArray[Any], factor: float, /) -> None: ...
    def clip(self, x: NDArray[Any], limit: float, /) -> None: ...
    def softcap(self, x: NDArray[Any], cap: float, /) -> None: ...
    def shift(self, x: NDArray[Any], by: NDArray[Any], /) -> None: ...
    def place(self, out: NDArray[Any], x: NDArray[Any], to: int, start: int, width: int, /) -> None: ...
    def swap(self, out: NDArray[Any], x: NDArray[Any], to: int, start: int, width: int, /) -> None: ...
    def copy(self, out: NDArray[Any], x: NDArray[Any], /) -> None: ...
    def rope_angles(
        self, cos: NDArray[Any], sin: NDArray[Any], positions: NDArray[Any], inv_freq: NDArray[Any], scale: float, /
    ) -> None: ...
    def rope(
        self, x: NDArray[Any], cos: NDArray[Any], sin: NDArray[Any], interleaved: bool, offset: int, /
    ) -> None: ...
    def write_cache(
        self, k_cache: NDArray[Any], v_cache: NDArray[Any], k: NDArray[Any], v: NDArray[Any], slots: NDArray[Any], /
    ) -> None: ...
    def read_cache(
        self,
        k: NDArray[Any],
        v: NDArray[Any],
        k_cache: NDArray[Any],
        v_cache: NDArray[Any],
        table: NDArray[Any],
        first: int,
        /,
    ) -> None: ...
    def copy_blocks(self, cache: NDArray[Any], source: NDArray[Any], target: NDArray[Any], /) -> None: ...
    def attention(
        self,
        out: NDArray[Any],
        q: NDArray[Any],
        k_cache: NDArray[Any],
        v_cache: NDArray[Any],
        block_tables: NDArray[Any],
        query_start: NDArray[Any],
        context_lens: NDArray[Any],
        scale: float,
        window: int,
        causal: bool,
        softcap: float,
        sinks: NDArray[Any] | None,
        slopes: NDArray[Any] | None,
        latent: bool,
        totals: NDArray[Any] | None,
        joins: bool,
    ) -> None: ...
    def activation(self, out: NDArray[Any], x: NDArray[Any], kind: str, /) -> None: ...
    def gated_activation(
        self, out: NDArray[Any], gate: NDArray[Any], up: NDArray[Any], kind: str, limit: float, /
    ) -> None: ...
    def route(
        self,
        weights: NDArray[Any],
        experts: NDArray[Any],
        logits: NDArray[Any],
        correction: NDArray[Any] | None,
        score: str,
        normalize: bool,
        scale: float,
        groups: int,
        top_groups: int,
        group_score: str,
        jitter: float,
    ) -> None: ...
    def group_rows(
        self, rows: NDArray[Any], slots: NDArray[Any], offsets: NDArray[Any], experts: NDArray[Any], /
    ) -> None: ...
    def combine(self, out: NDArray[Any], x: NDArray[Any], slots: NDArray[Any], weights: NDArray[Any], /) -> None: ...
    def take_rows(self, out: NDArray[Any], x: NDArray[Any], rows: NDArray[Any], /) -> None: ...
    def apply_edits(
        self,
        logits: NDArray[Any],
        rows: NDArray[Any],
        ids: NDArray[Any],
        penalties: NDArray[Any],
        biases: NDArray[Any],
        /,
    ) -> None: ...
    def mask(self, logits: NDArray[Any], rows: NDArray[Any], masks: NDArray[Any], /) -> None: ...
    def log_softmax(self, out: NDArray[Any], logits: NDArray[Any], /) -> None: ...
    def sample(
        self,
        tokens: NDArray[Any],
        logits: NDArray[Any],
        temperature: NDArray[Any],
        top_k: NDArray[Any],
        top_p: NDArray[Any],
        min_p: NDArray[Any],
        uniform: NDArray[Any],
        typical_p: NDArray[Any] | None,
        xtc_threshold: NDArray[Any] | None,
    ) -> None: ...
