"""What a row of predictions says of its user."""

from __future__ import annotations

import pytest

from untether.clients.device.device import Device
from untether.clients.device.scoring import prediction_row
from untether.sim.core.records import Query, User


@pytest.mark.parametrize(("cluster", "written"), [("archetype-203", "archetype-203"), ("", "ann")])
def test_a_user_who_is_like_nobody_else_is_a_cluster_of_their_own(cluster, written):
    query = Query("q", "LaMP_2", "a plot", "comedy")
    row = prediction_row(Device(0, User("ann", (), (query,), cluster)), query, "frozen", answered_by="base")
    assert (row["user_id"], row["cluster"]) == ("ann", written)
