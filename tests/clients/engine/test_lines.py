from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from untether.clients.engine.kernels.lines import Line, Prefixes, fill


def test_fill_keeps_the_order_and_the_width():
    lines = [Line((k,), 0, (length,)) for k, length in enumerate((3, 4, 9, 1, 1, 5))]
    assert [[line.lengths[0] for line in row] for row in fill(lines, 7)] == [[3, 4], [9], [1, 1, 5]]
    assert fill([Line((0, 1, 2), 2, (4, 4, 4))], 7) == [[Line((0,), 2, (4,))], [Line((1, 2), 2, (4, 4))]]


def test_a_line_too_long_is_halved_until_its_parts_fit():
    line = Line((3, 0, 4, 1), 10, (20, 15, 20, 30))
    assert line.tokens == 55
    assert line.parts(60) == [line]
    assert line.parts(40) == [Line((3, 0), 10, (20, 15)), Line((4, 1), 10, (20, 30))]
    assert [part.texts for part in line.parts(5)] == [(3,), (0,), (4,), (1,)]


def test_a_batch_of_two_tasks_becomes_two_lines():
    tags = [[*[1] * 60, k, 9] for k in range(3)]
    headlines = [[*[2] * 30, k, 9] for k in range(2)]
    texts = [tags[0], headlines[0], tags[1], tags[2], headlines[1]]
    lines = Prefixes(texts, [len(text) - 1 for text in texts]).lines(range(5))
    assert set(lines) == {Line((0, 2, 3), 60, (62,) * 3), Line((1, 4), 30, (32, 32))}
    assert [line.tokens for line in lines] == [66, 34]


def test_what_predicts_a_target_is_not_shared():
    texts = [[5] * 40, [5] * 40]
    (line,) = Prefixes(texts, [30, 38]).lines([0, 1])
    assert line == Line((0, 1), 30, (40, 40))


def test_texts_that_share_nothing_worth_a_line_stay_together():
    texts = [[k] * 10 for k in range(4)]
    assert len(Prefixes(texts, [9] * 4).lines([3, 1, 2])) == 1


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_lines_hold_every_text_once_and_share_what_they_say(data):
    token = st.integers(0, 2)
    texts = data.draw(st.lists(st.lists(token, min_size=1, max_size=40), min_size=1, max_size=7))
    limits = [data.draw(st.integers(0, len(text))) for text in texts]
    batch = data.draw(st.lists(st.sampled_from(range(len(texts))), min_size=1, max_size=6, unique=True))
    lines = Prefixes(texts, limits).lines(batch)
    assert sorted(itertools.chain(*(line.texts for line in lines))) == list(range(len(batch)))
    for line in lines:
        own = [texts[batch[place]] for place in line.texts]
        assert len({tuple(text[: line.prefix]) for text in own}) == 1
        assert line.prefix <= min(limits[batch[place]] for place in line.texts)
        assert list(line.lengths) == list(map(len, own))
