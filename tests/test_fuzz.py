"""The script that looks for wrong results among random problems: it solves some, and sees pairs that are missing."""

import fuzz
import pytest

from ringflash import Mask

FEATURES = ("", "softcap,alibi,padding", "sinks,dropout")
SMALL = ("--device", "cpu", "--dtype", "fp32", "--longest", "260", "--head-dim", "16", "--seconds", "2")


@pytest.mark.parametrize("features", FEATURES)
def test_random_problems_are_right(features):
    count, wrong = fuzz.main([*SMALL, *(("--features", features) if features else ())])
    assert count > 2
    assert not wrong


def test_a_window_that_is_one_key_short_is_seen(monkeypatch):
    drawn, shorter = Mask.sliding_window(20), Mask.sliding_window(19)
    monkeypatch.setattr(fuzz, "draw_mask", lambda *_: drawn)
    sharding = fuzz.Sharding
    monkeypatch.setattr(fuzz, "Sharding", lambda _, **settings: sharding(shorter, **settings))
    count, wrong = fuzz.main(SMALL)
    assert len(wrong) > count / 2
