"""Which calls of ranks meet follows from what each says in order."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from ringflash.parallel.agreement.meetings import CALL, REFUSED, REFUSED_UNKNOWN, TOLD, Said, meeting

ALONE = 1000
"""Digests from here on are of calls that one rank tries alone."""


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[list[Said]], list[bool]]:
    """What each rank says, where all do the same but for refusals; and of each call whether some refused it.

    Before calls that all make some ranks, not all of them, try others alone.
    """
    ranks = draw(st.integers(2, 4))
    said: list[list[Said]] = [[] for _ in range(ranks)]
    refused = []
    for _ in range(draw(st.integers(0, 12))):
        digest = draw(st.integers(2, 4))
        kinds = [draw(st.sampled_from([CALL] * 7 + [REFUSED, REFUSED_UNKNOWN])) for _ in range(ranks)]
        if set(kinds) == {CALL}:
            for rank in draw(st.sets(st.integers(0, ranks - 1), max_size=ranks - 1)):
                said[rank] += [Said(REFUSED, ALONE + draw(st.integers(0, 3)))] * draw(st.integers(1, 3))
        refused.append(set(kinds) != {CALL})
        for rank, kind in enumerate(kinds):
            told = kind == CALL and refused[-1] and draw(st.booleans())
            digest_said = 0 if kind == REFUSED_UNKNOWN else digest
            said[rank].append(Said(TOLD if told else kind, digest_said, nbytes=len(refused)))
    return said, refused


def met(said: Sequence[Sequence[Said]]) -> list[tuple[list[Said], bool]]:
    """The meetings at which no thing is over alone, and whether ranks were apart there."""
    next_of, found = [0] * len(said), []
    while all(n < len(x) for n, x in zip(next_of, said, strict=True)):
        heads = [x[n] for n, x in zip(next_of, said, strict=True)]
        meets = meeting(heads)
        assert meets.over
        if len(meets.over) == len(said):
            found.append((heads, meets.apart))
        for rank in meets.over:
            next_of[rank] += 1
    return found


@given(programs())
def test_calls_meet_the_calls_that_they_belong_to_whatever_ranks_try_alone(program) -> None:
    said, refused = program
    calls = [(heads, apart) for heads, apart in met(said) if any(x.digest < ALONE for x in heads)]
    for number, (heads, apart) in enumerate(calls, 1):
        assert {x.nbytes for x in heads} == {number}  # of one step of the program
        assert apart == (refused[number - 1] and any(x.kind == CALL for x in heads))  # nobody's error, where none came
    assert len(calls) == len(refused)


def test_ranks_that_make_different_calls_are_apart_and_meet_again() -> None:
    one, other, both = Said(CALL, 2), Said(CALL, 3), Said(CALL, 4)
    tried = Said(REFUSED, ALONE)
    assert met([[one, both], [tried, other, both]]) == [([one, other], True), ([both, both], False)]


def test_who_was_told_of_a_refusal_that_met_another_call_is_in_step() -> None:
    call, told, tried = Said(CALL, 2), Said(TOLD, 3), Said(REFUSED, ALONE)
    assert met([[told, call], [tried, call]]) == [([call, call], False)]


def test_a_call_that_others_refused_and_were_told_of_does_not_take_the_place_of_one_that_all_come_to() -> None:
    call, told, refused = Said(CALL, 2), Said(TOLD, 3), Said(REFUSED, 3)
    assert met([[call], [told, call], [refused, call]]) == [([call] * 3, False)]
