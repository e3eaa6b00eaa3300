"""Beam search: transformers' own sequences and scores, through chunks, few blocks, neighbours and lost beams."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.engine import checkpoints
from tests.engine.checkpoints import Rig, load, prompt, rig
from tests.engine.test_scheduler import Setup, drain, outputs, turn
from tests.engine.test_scheduler import request as scheduler_request
from tests.models.harness import MAIN, make
from tests.models.tiny import TinyModels
from tramontane.config import CacheConfig, EngineConfig, SchedulerConfig
from tramontane.engine.sequence import EngineRequest, Event, Stretch
from tramontane.engine.step import TokenInfo
from tramontane.errors import InvalidRequest
from tramontane.kernels.reference import ReferenceOps
from tramontane.loading.build import LoadedModel

ENDS = tuple(range(0, 60, 6))
"""Enough tokens that end a text for random weights to come upon some."""

WAYS: dict[str, dict[str, Any]] = {
    "two": {"beam_width": 2, "n": 2},
    "sums": {"beam_width": 4, "n": 3, "length_penalty": 0.0},
    "long and early": {"beam_width": 3, "n": 3, "length_penalty": 2.0, "early_stopping": True},
    "short and never": {"beam_width": 3, "n": 2, "length_penalty": -1.0, "early_stopping": "never"},
    "never": {"beam_width": 3, "n": 3, "early_stopping": "never"},
    "processed": {"beam_width": 5, "n": 5, "repetition_penalty": 1.5, "min_tokens": 4},
    "bad words": {"beam_width": 3, "n": 1, "bad_words": ((7,), (9, 30), (11, 8, 2))},
}


def ask(name: str, ids: Sequence[int], ends: tuple[int, ...] = ENDS, **params: Any) -> EngineRequest:
    return replace(checkpoints.request(name, ids, **params), eos_ids=frozenset(ends))


def engine(loaded: LoadedModel, seats: int = 8, budget: int = 40, blocks: int = 300, **more: Any) -> Rig:
    states = more.pop("num_states", 0)
    config = EngineConfig(CacheConfig(block_size=4, **more), SchedulerConfig(seats, budget))
    return rig(loaded, config, blocks, num_states=states)


def answers(run: Rig, name: str, n: int) -> list[tuple[list[int], float | None]]:
    return [(run.ids(name, index), run.ends[name, index].score) for index in range(n)]


def theirs(model: Any, ids: Sequence[int], max_tokens: int, ends: tuple[int, ...] = ENDS, **params: Any) -> list[Any]:
    import torch

    names = {"beam_width": "num_beams", "n": "num_return_sequences", "min_tokens": "min_new_tokens"}
    settings = {names.get(name, name): value for name, value in params.items()}
    if "bad_words" in settings:
        settings["bad_words_ids"] = [list(word) for word in settings.pop("bad_words")]
    out = model.generate(
        torch.tensor([list(ids)]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=max_tokens,
        eos_token_id=list(ends) or None,
        pad_token_id=0,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **settings,
    )
    found = []
    for sequence, score in zip(out.sequences.tolist(), out.sequences_scores.tolist(), strict=True):
        new = sequence[len(ids) :]
        end = next((at + 1 for at, token in enumerate(new) if token in ends), len(new))
        found.append((new[:end], score))
    return found


def assert_same(ours: list[tuple[list[int], float | None]], right: list[Any]) -> None:
    assert [ids for ids, _ in ours] == [ids for ids, _ in right]
    assert [score for _, score in ours] == pytest.approx([score for _, score in right], abs=2e-4)


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    return TinyModels(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_sequences_and_scores_are_those_of_transformers(name: str, way: str, tiny_models: TinyModels) -> None:
    tiny = tiny_models.get(name)
    loaded = load(tiny.path, make(str(MAIN.values[0])))
    params = WAYS[way]
    stopped = 0
    for length, max_tokens in ((5, 14), (23, 9), (11, 4)):
        ids = [token % 90 for token in prompt(length, length)]
        run = engine(loaded).run([ask("a", ids, max_tokens=max_tokens, **params)])
        assert_same(answers(run, "a", params["n"]), theirs(tiny.model, ids, max_tokens, **params))
        for index in range(params["n"]):
            end = run.ends["a", index]
            ended = run.ids("a", index)[-1] in ENDS
            assert end.finish_reason == ("stop" if ended else "length")
            assert end.tokens, "all of a choice's tokens come with its end"
            stopped += ended
    assert stopped or name != "gpt2" or way == "bad words"


def test_a_greedy_beam_is_the_greedy_answer(checkpoint: Path) -> None:
    """Where one token is as good as certain, every beam's best is it; and nothing ends without ends."""
    run = engine(load(checkpoint, ReferenceOps()))
    ids = prompt(9)
    run.run([ask("greedy", ids, (), max_tokens=5, temperature=0.0), ask("beams", ids, (), max_tokens=5, beam_width=2)])
    assert len(run.ids("beams")) == 5
    assert run.ends["beams", 0].finish_reason == "length"


@pytest.mark.parametrize(
    "tight",
    [
        {"blocks": 24, "seats": 4},
        {"blocks": 24, "seats": 4, "prefix_caching": False},
        {"seats": 4, "budget": 5},
        {"blocks": 80, "seats": 4, "paged_attention": False},
    ],
    ids=str,
)
def test_beams_that_lose_their_blocks_come_to_the_same(tight: dict[str, Any], checkpoint: Path) -> None:
    """The checkpoint has windows too. Answers with room for all, alone, against answers without, in company."""
    loaded = load(checkpoint, ReferenceOps(deterministic=True))
    asked = [
        ask("a", prompt(13), max_tokens=20, beam_width=4, n=2, early_stopping="never"),
        ask("plain", prompt(6), (), max_tokens=20, seed=5),
        ask("b", prompt(9, 1), max_tokens=16, beam_width=3, n=3, length_penalty=0.0, early_stopping="never"),
        ask("n", prompt(9, 1), (), max_tokens=12, n=3, seed=7),
    ]
    right = {}
    for one in asked:
        run = engine(loaded, blocks=400).run([one])
        right[one.id] = answers(run, one.id, one.num_choices)
    if not tight.get("paged_attention", True):
        tight = {**tight, "blocks": 2 * 2 * (checkpoints.CONTEXT // 4)}  # two contexts, in two groups
    else:
        tight = {"blocks": 300, **tight}
    run = engine(loaded, **tight).run(asked)
    for one in asked:
        assert answers(run, one.id, one.num_choices) == right[one.id]
    if tight["blocks"] < 300:
        assert run.engine.scheduler.counters.preemptions > 0


def test_beams_have_states_of_their_own(tiny_models: TinyModels) -> None:
    tiny = tiny_models.get("lfm2")
    loaded = load(tiny.path, make(str(MAIN.values[0])))
    ids = [token % 90 for token in prompt(14)]
    run = engine(loaded, num_states=12).run([ask("a", ids, max_tokens=9, beam_width=3, n=3)])
    assert_same(answers(run, "a", 3), theirs(tiny.model, ids, 9, beam_width=3, n=3))


def test_log_probabilities_are_reported_of_what_was_chosen(checkpoint: Path) -> None:
    run = engine(load(checkpoint, ReferenceOps()))
    ids = prompt(9)
    run.run([ask("a", ids, max_tokens=6, beam_width=3, n=2, length_penalty=0.0, logprobs=2, prompt_logprobs=1)])
    for index in range(2):
        infos: list[TokenInfo] = run.tokens["a", index]
        assert sum(info.logprob or 0.0 for info in infos) == pytest.approx(run.ends["a", index].score, abs=1e-4)
        assert all(len(info.top) == 2 for info in infos)
    assert len(run.prompt_logprobs["a"]) == 9


def test_bans_may_leave_fewer_beams_than_choices(checkpoint: Path) -> None:
    run = engine(load(checkpoint, ReferenceOps()))
    run.run([ask("a", prompt(5), (), max_tokens=3, beam_width=3, n=2, allowed_token_ids=(65,))])
    assert run.ids("a", 0) == [65, 65, 65]
    assert run.ids("a", 1) == []
    assert [run.ends["a", index].finish_reason for index in range(2)] == ["length", "length"]


WALKS: dict[str, Setup] = {
    "roomy": Setup(num_blocks=60),
    "tight": Setup(num_blocks=11),
    "tight, no prefix cache": Setup(num_blocks=11, prefix_caching=False),
    "windows": Setup((None, 8), num_blocks=26),
    "few tokens a step": Setup(num_blocks=30, max_num_batched_tokens=6),
    "tight, states": Setup(num_states=7, num_blocks=11),
    "contiguous": Setup(paged_attention=False, num_blocks=40),
    "contiguous, states": Setup(paged_attention=False, num_blocks=60, num_states=3),
    "stretched whole": Setup(num_blocks=20, stretch=Stretch(14, whole=True)),
    "stretched token by token": Setup(num_blocks=20, stretch=Stretch(14, whole=False)),
    "priorities": Setup(num_blocks=14, priorities=(0, 1, 4)),
}


@pytest.mark.parametrize("name", WALKS)
def test_random_walks_of_beams_among_others(name: str) -> None:
    """Over the shadow of physical memory: every answer is that of the request alone, whatever else goes on."""
    setup = WALKS[name]
    roomy = replace(setup, num_blocks=400, num_states=40 if setup.num_states else 0)
    preemptions = parked = 0
    for seed in range(3):
        rng = random.Random(seed)
        scheduler, executor = setup.build()
        asked: dict[str, EngineRequest] = {}
        events: list[Event] = []
        for step in range(300):
            if step < 240 and rng.random() < 0.15 and len({s.request.id for s in scheduler.sequences()}) < 4:
                width = rng.choice([1, 2, 3, 6])
                new = scheduler_request(
                    str(step),
                    [rng.randrange(2) for _ in range(rng.randint(1, 16))],
                    priority=rng.choice(setup.priorities or (0,)),
                    seed=rng.randrange(3),
                    n=rng.randint(1, width),
                    beam_width=width,
                    max_tokens=rng.randint(1, 14),
                    min_tokens=rng.choice([0, 0, 1]),
                    ignore_eos=rng.random() < 0.5,
                    length_penalty=rng.choice([0.0, 1.0, 2.0]),
                    early_stopping=rng.choice([True, False, "never"]),
                    prompt_logprobs=rng.choice([None, 0]),
                )
                asked[new.id] = new
                scheduler.add(new)
            if rng.random() < 0.02 and (live := sorted({s.request.id for s in scheduler.sequences()})):
                events += scheduler.abort(rng.choice(live), rng.choice([None, 0]))
                scheduler.check()
            if scheduler.has_work:
                events += turn(scheduler, executor)[1]
                parked += sum(s.status == "parked" for one in scheduler._open.values() for s in one.sequences)
        events += drain(scheduler, executor)
        assert scheduler.pool.used == 0
        preemptions += scheduler.counters.preemptions
        final = {(e.request_id, e.index): e for e in events if e.finish_reason}
        assert len(final) == len([e for e in events if e.finish_reason]), "each choice ends once"
        assert set(final) == {(id, index) for id, one in asked.items() for index in range(one.num_choices)}
        for id, one in asked.items():
            alone, mind = roomy.build()
            alone.add(one)
            right = outputs(drain(alone, mind))
            for index in range(one.num_choices):
                if final[id, index].finish_reason != "cancelled":
                    assert outputs(events)[id, index] == right[id, index]
    assert (preemptions and parked) or not name.startswith("tight"), "the walk must meet beams that lose their blocks"


@pytest.mark.parametrize("after", range(5))
@pytest.mark.parametrize("index", [None, 1])
def test_a_search_can_be_cancelled_at_any_moment(after: int, index: int | None, checkpoint: Path) -> None:
    run = engine(load(checkpoint, ReferenceOps()), budget=8)
    run.engine.add(ask("a", prompt(13), (), max_tokens=8, beam_width=3, n=2))
    for _ in range(after):
        run.take(run.engine.step())
    run.take(run.engine.abort("a", index))
    run.engine.scheduler.check()
    run.run()
    reasons = [run.ends["a", choice].finish_reason for choice in range(2)]
    assert reasons == (["cancelled"] * 2 if index is None else ["length", "cancelled"])


def test_a_step_that_fails_ends_the_search_once(checkpoint: Path) -> None:
    run = engine(load(checkpoint, ReferenceOps()))
    run.engine.add(ask("a", prompt(5), (), max_tokens=8, beam_width=3, n=2))
    for _ in range(3):
        run.take(run.engine.step())
    scheduler = run.engine.scheduler
    step = scheduler.schedule()
    assert step is not None
    events = scheduler.fail(step, ValueError("gone"))
    assert [(event.index, event.finish_reason) for event in events] == [(0, "error"), (1, "error")]
    assert not scheduler.has_work
    assert scheduler.pool.used == 0


def test_more_beams_than_seats_are_refused(checkpoint: Path) -> None:
    run = engine(load(checkpoint, ReferenceOps()))
    with pytest.raises(InvalidRequest, match="beam_width: 9 beams"):
        run.engine.add(ask("a", prompt(5), max_tokens=8, beam_width=9))
