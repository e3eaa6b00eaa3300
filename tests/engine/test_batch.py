"""Step -> arrays, against positions and slots worked out token by token."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tramontane.engine.batch import BatchBuilder
from tramontane.engine.step import (
    Draw,
    ScheduledSequence,
    SequenceResult,
    Step,
    StepResult,
    TokenInfo,
)
from tramontane.kernels.reference import ReferenceOps
from tramontane.types import SAMPLING_DEFAULTS

BLOCK = 4
MAX_SEQS, MAX_TOKENS, MAX_BLOCKS = 5, 40, 9


def builder(groups: int = 1) -> BatchBuilder:
    return BatchBuilder(
        ReferenceOps(),
        block_size=BLOCK,
        num_groups=groups,
        max_tokens=MAX_TOKENS,
        max_seqs=MAX_SEQS,
        max_blocks=MAX_BLOCKS,
    )


@st.composite
def steps(draw: st.DrawFn) -> Step:
    sequences = []
    for index in range(draw(st.integers(1, MAX_SEQS))):
        start = draw(st.integers(0, 20))
        tokens = tuple(draw(st.lists(st.integers(0, 999), min_size=1, max_size=8)))
        needed = -(-(start + len(tokens)) // BLOCK)
        length = draw(st.integers(needed, MAX_BLOCKS))
        tables = []
        for _ in range(2):
            table = draw(st.lists(st.integers(0, 99), min_size=length, max_size=length))
            freed = draw(st.integers(0, start // BLOCK))
            tables.append(tuple([-1] * freed + table[freed:]))
        sequences.append(ScheduledSequence(index, start, tokens, tuple(tables)))
    return Step(0, tuple(sequences))


@settings(max_examples=60)
@given(st.lists(steps(), min_size=1, max_size=5))
def test_batch_says_where_each_token_goes(sequence_of_steps: list[Step]) -> None:
    """One builder over several steps: what a step leaves in the buffers must not show in the next."""
    build = builder(groups=2)
    for step in sequence_of_steps:
        batch = build.build(step)
        at = 0
        assert (batch.num_tokens, batch.num_seqs) == (step.num_tokens, len(step.sequences))
        for row, sequence in enumerate(step.sequences):
            assert batch.query_start[row] == at
            assert batch.context_lens[row] == sequence.start + len(sequence.tokens)
            assert batch.extents[row] == (len(sequence.tokens), batch.context_lens[row])
            for offset, token in enumerate(sequence.tokens):
                position = sequence.start + offset
                assert batch.tokens[at] == token
                assert batch.positions[at] == position
                for group, table in zip(batch.groups, sequence.block_tables, strict=True):
                    assert group.slots[at] == table[position // BLOCK] * BLOCK + position % BLOCK
                at += 1
            for group, table in zip(batch.groups, sequence.block_tables, strict=True):
                assert group.block_tables[row, : len(table)].tolist() == list(table)
                assert (group.block_tables[row, len(table) :] == -1).all()
        assert batch.query_start[-1] == at
        for array in (batch.tokens, batch.positions, batch.query_start, batch.context_lens):
            assert array.dtype == np.int32
            assert array.flags.c_contiguous
        for group in batch.groups:
            assert group.block_tables.dtype == group.slots.dtype == np.int32
            assert group.block_tables.flags.c_contiguous


@pytest.mark.parametrize(
    "sequence",
    [
        ScheduledSequence(0, 0, (1,) * (MAX_TOKENS + 1), ((0,) * 11,)),
        ScheduledSequence(0, 4, (1,), ((0,),)),
        ScheduledSequence(0, 4, (1,), ((0, -1),)),
        ScheduledSequence(0, 0, (1,), ((0,) * (MAX_BLOCKS + 1),)),
    ],
    ids=["too many tokens", "table too short", "no block", "table too long"],
)
def test_impossible_steps_are_refused(sequence: ScheduledSequence) -> None:
    with pytest.raises(ValueError, match=r"exceeds|shorter|no block"):
        builder().build(Step(0, (sequence,)))


def test_steps_and_results_pickle() -> None:
    draw = Draw(SAMPLING_DEFAULTS, 7, [1, 2], [3], (4,))
    sequence = ScheduledSequence(3, 5, (6, 7), ((1, 2), (-1, 3)), (draw,), 2, (7,))
    step = Step(9, (sequence,), ((1, 2),))
    assert pickle.loads(pickle.dumps(step)) == step
    result = StepResult(9, (SequenceResult(3, (TokenInfo(1, -0.5, 1, ((2, -1.0),)),), (TokenInfo(4),)),))
    assert pickle.loads(pickle.dumps(result)) == result
