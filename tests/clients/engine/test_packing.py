from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from untether.clients.engine.kernels import packing as packing_module
from untether.clients.engine.kernels.lines import Line
from untether.clients.engine.kernels.packing import pack, pad


def test_texts_of_two_lines_follow_each_other_in_a_row():
    texts = [np.array(text) for text in ([1, 2, 10], [1, 2, 20, 21], [5, 6], [7])]
    rows = [[Line((0, 1), 2, (3, 4)), Line((2,), 0, (2,))], [Line((0,), 0, (1,))]]
    ids, places, packing = pack(rows, [texts[:3], texts[3:]], torch.device("cpu"), True)
    assert ids.shape == (2, 16)
    assert ids[0, :8].tolist() == [1, 2, 10, 20, 21, 5, 6, 0] and ids[1, :2].tolist() == [7, 0]
    assert packing.positions[0, :8].tolist() == [0, 1, 2, 2, 3, 0, 1, 0]
    assert [place.tolist() for place in places] == [[0, 1, 2], [0, 1, 3, 4], [5, 6], [16]]


def test_pad_puts_a_text_in_a_row():
    ids, places = pad([np.array([4, 5]), np.array([6, 7, 8])])
    assert ids.tolist() == [[4, 5, 0], [6, 7, 8]]
    assert [place.tolist() for place in places] == [[0, 1], [3, 4, 5]]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_what_attention_takes_and_gives_back_is_what_the_texts_hold(data):
    split, heads = data.draw(st.booleans()), data.draw(st.sampled_from((1, 3)))
    rows = []
    for _ in range(data.draw(st.integers(1, 3))):
        row = []
        for _ in range(data.draw(st.integers(1, 3))):
            own = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=4))
            prefix = data.draw(st.integers(0, 40))
            row.append(Line(tuple(range(len(own))), prefix, tuple(prefix + n for n in own)))
        rows.append(row)
    texts = [[np.arange(1, length + 1) for line in row for length in line.lengths] for row in rows]
    ids, places, packing = pack(rows, texts, torch.device("cpu"), split)
    used = np.concatenate(places)
    assert (ids > 0).sum() == len(np.unique(used)) == sum(line.tokens for row in rows for line in row)
    assert np.array_equal(ids.ravel()[used], np.concatenate([text for row in texts for text in row]))
    for index in (packing.queries(heads), packing.keys(heads)):
        x = torch.from_numpy(ids).double().view(-1, 1) * torch.arange(1.0, heads + 1).double()
        y = torch.randn(len(index.source), 1, dtype=torch.float64)
        # The empty places are nobody's; elsewhere the two are adjoint.
        assert torch.allclose((index.take(x) * y).sum(), (x * index.give(y).view(x.shape)).sum())
    once = packing.queries(heads)
    own = x.reshape(-1, 1)
    assert torch.equal(once.give(once.take(own)), own)
    begin = 0
    for bucket in packing.buckets:
        slots = bucket.texts * heads * (bucket.prefix + bucket.tokens)
        keys = packing.keys(heads).take(x)[begin : begin + slots].view(bucket.texts, heads, -1)
        begin += slots
        for k, text in enumerate(keys):
            bars = bucket.padding[k].sum() if bucket.padding is not None else 0
            seen = text[0, bars:][text[0, bars:] > 0]
            assert torch.equal(seen, torch.arange(1.0, len(seen) + 1).double())
            assert torch.equal(text, text[:1] * torch.arange(1.0, heads + 1).double()[:, None])


def test_what_attention_pads_stays_below_what_the_texts_need(monkeypatch):
    """Where another group is dear, as on a GPU, each text would be padded a little more than the one before it."""
    monkeypatch.setitem(packing_module._LOOK_PAIRS, "cpu", 1 << 22)
    lengths = np.linspace(20, 800, 400).astype(int)
    rows = [[Line((0,), 0, (int(length),))] for length in lengths]
    _, _, packing = pack(rows, [[np.ones(length, int)] for length in lengths], torch.device("cpu"), False)
    padded = sum(bucket.texts * bucket.tokens**2 for bucket in packing.buckets)
    assert padded <= 2 * (lengths**2).sum() + len(packing.buckets) * (1 << 22)
    assert len(packing.buckets) < 8
