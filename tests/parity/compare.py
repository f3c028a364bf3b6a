"""Comparisons of a torch network with a network of this library that has its weights, from a file.

Logits, stages, gradients and running statistics must be equal. Torch computes in float64. This
library computes logits and stages in float32, and gradients in float64: among millions of float32
activations some are so close to 0 that rounding decides whether a ReLU passes them, and one that
differs changes the gradient of its channel by percents, in any two implementations.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
from parity.peers import CLASSES, PLACES, SHORT, STAGES
from torch import nn

import nonlocal_jax as nl
from nonlocal_jax.weights.entries import naming_tables

torch.set_num_threads(1)  # each core has a test process
NORMS = nn.modules.batchnorm._BatchNorm
HEIGHT, WIDTH = 37, 44  # 10×11, 5×6, 3×3 and 2×2 positions in res2 to res5


def numbers(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomise(peer, clip_shape):
    """Draws weights and running statistics with which every part of a network matters.

    Norms divide by about the root mean square of their input for a random clip, so that features
    are of order 1/4 everywhere and no softmax of their products is one-hot.
    """
    generator = torch.Generator().manual_seed(0)

    def uniform(tensor, low, high):
        return tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    def settle(norm, inputs):
        square = inputs[0].square().mean()
        uniform(norm.running_mean, -0.3, 0.3).mul_(square.sqrt())
        uniform(norm.running_var, 0.5, 1.5).mul_(square)

    hooks = []
    with torch.no_grad():
        for module in peer.network.modules():
            if isinstance(module, NORMS):
                uniform(module.weight, 0.1, 0.3)
                uniform(module.bias, -0.1, 0.1)
                hooks.append(module.register_forward_pre_hook(settle))
            elif isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
                module.weight.normal_(0, (2 / module.weight[0].numel()) ** 0.5, generator=generator)
                if module.bias is not None:
                    uniform(module.bias, -0.3, 0.3)
        peer.network.eval()
        peer.logits(numbers(*clip_shape, seed=3))
    for hook in hooks:
        hook.remove()
    return {name: tensor.clone() for name, tensor in peer.network.state_dict().items()}


@dataclasses.dataclass(frozen=True)
class Answer:
    """What torch computes, channels last.

    Attributes:
        logits: Logits of the clip.
        stages: Output of each stage.
        weight_gradients: Gradients of Σ cotangent · logits by weight, if requested.
        clip_gradient: The same gradient for the clip, if requested.
        counts: Number of values that each norm averages.
    """

    logits: np.ndarray
    stages: dict[str, np.ndarray]
    weight_gradients: dict[str, np.ndarray]
    clip_gradient: np.ndarray | None
    counts: dict[str, int]


def ask(peer, clip, cotangent=None, train=False):
    """Runs a peer in float64."""
    stages, counts, hooks = {}, {}, []

    def keep(stage, module, inputs, output):
        stages[stage] = channels_last(
            (output[0] if isinstance(output, list) else output).detach().clone()
        )

    def count(name, module, inputs, output):
        counts[name] = inputs[0].numel() // inputs[0].shape[1]

    network = peer.network.double().train(train)
    for stage, module in peer.stages.items():
        hooks.append(module.register_forward_hook(functools.partial(keep, stage)))
    for name, module in network.named_modules():
        if isinstance(module, NORMS):
            hooks.append(module.register_forward_hook(functools.partial(count, name)))
    clip = clip.double().requires_grad_(cotangent is not None)
    # mmcv's concatenation divides the saved output of a ReLU in place, which torch forbids.
    with (
        torch.autograd.graph.allow_mutation_on_saved_tensors(),
        torch.set_grad_enabled(cotangent is not None),
    ):
        logits = peer.logits(clip)
        if cotangent is not None:
            logits.backward(cotangent.double())
    for hook in hooks:
        hook.remove()
    weight_gradients, clip_gradient = {}, None
    if cotangent is not None:
        weight_gradients = {name: p.grad.numpy() for name, p in network.named_parameters()}
        clip_gradient = channels_last(clip.grad)
    return Answer(logits.detach().numpy(), stages, weight_gradients, clip_gradient, counts)


def channels_last(array):
    return np.moveaxis(np.asarray(array), 1, -1)


def load(path, tree, model, save=torch.save, **options):
    """Loads weights through a file, which is removed at once because it is large."""
    save(tree, path)
    try:
        return nl.weights.load(path, model, **options)
    finally:
        path.unlink()


def difference(array, expected, scale=0.0):
    """Returns the largest difference over the largest expected value, or over a larger `scale`."""
    array, expected = np.asarray(array), np.asarray(expected)
    assert array.shape == expected.shape
    return np.abs(array - expected).max() / max(np.abs(expected).max(), scale)


def assert_close(array, expected, bound, name, scale=0.0):
    relative = difference(array, expected, scale)
    assert relative < bound, f"{name}: {relative:.2g} of the largest value"


def compare_forward(model, variables, clip, answer, stages=STAGES, finish=lambda logits: logits):
    """Compares stages and logits in float32. `finish` converts logits to the peer's output."""

    @jax.jit
    def forward(variables, clip):
        logits, state = model.apply(variables, clip, mutable=["intermediates"])
        return logits, {stage: state["intermediates"][stage][0] for stage in stages}

    logits, features = forward(variables, jnp.asarray(channels_last(clip)))
    for stage in stages:
        assert_close(features[stage], answer.stages[stage], 5e-5, stage)
    assert_close(finish(logits), answer.logits, 5e-5, "logits")


def compare_gradients(model, variables, clip, cotangent, answer, source, train=False):
    """Compares gradients in float64, without intermediates, as users compute them.

    In training, returns the updated running statistics by name. The variance is updated with the
    biased estimate here, as in Flax, and with the unbiased one in torch, as it documents.
    """
    with jax.enable_x64(True):
        initial = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), variables)

        @jax.jit
        @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
        def gradients(params, clip):
            everything = {**initial, "params": params}
            if train:
                logits, state = model.apply(everything, clip, train=True, mutable=["batch_stats"])
            else:
                logits, state = model.apply(everything, clip), {"batch_stats": {}}
            return jnp.vdot(logits, cotangent.numpy()), (logits, state["batch_stats"])

        array = jnp.asarray(channels_last(clip.double()))
        (weight_gradients, clip_gradient), aux = gradients(initial["params"], array)
    logits, statistics = aux
    assert_close(logits, answer.logits, 1e-5, "logits")
    assert_close(clip_gradient, answer.clip_gradient, 1e-5, "gradient of the clip")
    weight_gradients = named(weight_gradients)
    expected = renamed(answer.weight_gradients, source)
    assert weight_gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        # Relative to the largest of the layer, because the gradient of a bias that a softmax or the
        # next norm cancels is nothing but rounding.
        layer = name.rpartition("/")[0]
        layer_gradients = [
            array for key, array in expected.items() if key.rpartition("/")[0] == layer
        ]
        scale = max(np.abs(array).max() for array in layer_gradients)
        assert_close(weight_gradients[name], gradient, 1e-5, f"gradient of {name}", scale)
    return named(statistics)


def named(tree):
    """Returns leaves by path, such as "res2_0/conv_a/kernel"."""
    return {
        path.removeprefix("params/"): leaf
        for path, leaf in nl.weights.export({"params": tree}).items()
    }


def renamed(arrays, source):
    """Returns arrays of a peer under native names, in the shapes of this library."""
    table = naming_tables()[source]
    native_arrays = {}
    for name, array in arrays.items():
        native_name, row = table.native_name(name)
        native_arrays[native_name] = row.transform.import_array(array)
    return native_arrays


def compare_export(variables, state, source):
    """Checks that weights exported to the peer's names are bit for bit those of the peer."""
    exported = nl.weights.export(variables, source)
    state = {
        name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")
    }
    assert exported.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(exported[name], tensor.numpy(), strict=True)


def video_resnet(blocks=SHORT, nonlocal_blocks=None, **options):
    """Builds a network here with the residual and non-local blocks of the peers."""
    places = PLACES[blocks] if nonlocal_blocks is None else nonlocal_blocks
    return nl.models.video_resnet(blocks, nonlocal_blocks=places, num_classes=CLASSES, **options)
