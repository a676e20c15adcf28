"""Whether work can ever be placed: said before it is queued, with the nodes that are there."""

from __future__ import annotations

import pytest

from portaisys.cluster import Node, matches, refuse_unplaceable
from portaisys.spec import UserError

NODES = [Node({"CPU": 16, "GPU": 4}, {"role": "train"})] * 3 + [Node({"CPU": 16, "GPU": 2}, {"role": "inference"})] * 2
ONE_GPU = {"CPU": 1.0, "GPU": 1.0}


def refuse(count, need, selector=None, most=None):
    refuse_unplaceable("train.num_workers", "workers", count, need, selector or {}, NODES, most or {})


@pytest.mark.parametrize(
    ("selector", "labels", "right"),
    [
        ({}, {}, True),
        ({"role": "train"}, {"role": "train"}, True),
        ({"role": "train"}, {}, False),
        ({"role": "!train"}, {"role": "test"}, True),
        ({"role": "!train"}, {}, True),
        ({"role": "in(train, test)"}, {"role": "test"}, True),
        ({"role": "!in(train,test)"}, {"role": "test"}, False),
        ({"role": "train", "zone": "a"}, {"role": "train", "zone": "b"}, False),
    ],
)
def test_labels_are_matched_as_ray_does(selector, labels, right):
    assert matches(labels, selector) is right


def test_what_fits_is_let_through():
    refuse(16, ONE_GPU)
    refuse(12, ONE_GPU, {"role": "train"})
    refuse(12, {"CPU": 4.0, "GPU": 1.0}, {"role": "train"})


def test_a_missing_training_node_is_told_with_the_roles_that_are_there():
    with pytest.raises(UserError) as told:
        refuse(16, ONE_GPU, {"role": "train"})
    assert str(told.value) == (
        "train.num_workers: 16 workers need 16 GPUs and the cluster's nodes with role=train have 12; lower it or add nodes (nodes there: role=inference; role=train)"
    )


def test_a_worker_larger_than_any_node_is_refused_though_the_totals_would_do():
    with pytest.raises(UserError, match=r"1 workers of 1 CPU and 8 GPUs each, and the cluster has room for 0, since none is split over nodes \(16 CPUs and 2 GPUs, "):
        refuse(1, {"CPU": 1.0, "GPU": 8.0})
    with pytest.raises(UserError, match="room for 3"):
        refuse(4, {"CPU": 1.0, "GPU": 3.0}, most={"CPU": 80})


def test_what_an_autoscaler_may_still_bring_is_waited_for():
    refuse(32, ONE_GPU, {"role": "train"}, most={"CPU": 128, "GPU": 32})
    with pytest.raises(UserError, match="33 workers need 33 GPUs"):
        refuse(33, ONE_GPU, {"role": "train"}, most={"CPU": 128, "GPU": 32})
