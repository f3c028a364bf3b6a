"""The processes in which the first minute is measured."""

import jax
import pytest

import nonlocal_jax as nl
from benchmarks import first_minute
from benchmarks.plain_flax import PlainResNet20


def test_a_measure_is_taken_in_a_fresh_process(tmp_path):
    found = first_minute.measure("imports", tmp_path)
    assert 0 < found["seconds"] < 60


def test_a_failure_is_reported_with_its_reason(tmp_path):
    with pytest.raises(RuntimeError, match=r"load torch failed: .*r101\.pyth"):
        first_minute.measure("load torch", tmp_path)


def test_peers_take_turns():
    order = first_minute.turns(["imports", "cifar"], 2)
    assert order == ["imports", "imports", "cifar", "cifar_peer", "cifar_peer", "cifar"]


def test_unknown_measures_are_refused():
    with pytest.raises(ValueError, match=r"only must be of imports, .*; got compilation"):
        first_minute.Config(only=("compilation",))


def test_the_plain_network_has_the_same_variables():
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), "float32")
    networks = PlainResNet20(), nl.models.cifar_resnet(20)
    plain, ours = (
        sorted(leaf.size for leaf in jax.tree.leaves(shapes))
        for shapes in (jax.eval_shape(net.init, jax.random.key(0), image) for net in networks)
    )
    assert plain == ours
