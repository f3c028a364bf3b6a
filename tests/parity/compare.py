"""A network of torch and one of ours with its weights, from a file: equal logits, stages, gradients, running statistics.

Torch computes in float64. Ours computes logits and stages in float32, and gradients in float64: among millions of float32
activations some are so close to 0 that rounding decides whether a ReLU passes them, and one that differs changes the gradient
of its channel by percents, in any two implementations.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
from parity.peers import CLASSES, STAGES
from torch import nn

import nonlocal_jax as nl
from nonlocal_jax.weights.sources import SOURCES

torch.set_num_threads(1)  # there is a test process for each core
NORMS = nn.modules.batchnorm._BatchNorm
HEIGHT, WIDTH = 40, 56  # 10×14, 5×7, 3×4 and 2×2 positions in res2 to res5


def numbers(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomise(peer, clip_shape):
    """Weights with which every part matters, the running statistics too: no norm near the identity.

    Norms divide by about the root mean square that some clip gives, so that features are of order 1/4 everywhere and no softmax
    of their products is one-hot.
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
    """What torch says; arrays are channels last.

    Attributes:
        logits, stages: of the clip.
        of_weights, of_clip: the gradients of Σ cotangent · logits, if asked for.
        counts: how many numbers each norm averaged.
    """

    logits: np.ndarray
    stages: dict[str, np.ndarray]
    of_weights: dict[str, np.ndarray]
    of_clip: np.ndarray | None
    counts: dict[str, int]


def ask(peer, clip, cotangent=None, train=False):
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
    # mmcv's concatenation divides in place what its ReLU saved, so on its own it cannot be differentiated.
    with (
        torch.autograd.graph.allow_mutation_on_saved_tensors(),
        torch.set_grad_enabled(cotangent is not None),
    ):
        logits = peer.logits(clip)
        if cotangent is not None:
            logits.backward(cotangent.double())
    for hook in hooks:
        hook.remove()
    gradients = (
        {name: p.grad.numpy() for name, p in network.named_parameters()}
        if cotangent is not None
        else {}
    )
    of_clip = channels_last(clip.grad) if cotangent is not None else None
    return Answer(logits.detach().numpy(), stages, gradients, of_clip, counts)


def channels_last(array):
    return np.moveaxis(np.asarray(array), 1, -1)


def load(path, tree, model, save=torch.save, **options):
    """Through a file, which is removed at once: they are large."""
    save(tree, path)
    try:
        return nl.weights.load(path, model, **options)
    finally:
        path.unlink()


def difference(ours, theirs, scale=0.0):
    """The largest, relative to the largest of theirs, or to `scale` where that is larger."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / max(np.abs(theirs).max(), scale)


def assert_close(ours, theirs, bound, what, scale=0.0):
    far = difference(ours, theirs, scale)
    assert far < bound, f"{what}: {far:.2g} of the largest"


def compare_forward(model, variables, clip, answer, stages=STAGES, finish=lambda logits: logits):
    """In float32. `finish` makes of our logits what the peer answers."""

    @jax.jit
    def forward(variables, clip):
        logits, state = model.apply(variables, clip, mutable=["intermediates"])
        return logits, {stage: state["intermediates"][stage][0] for stage in stages}

    logits, features = forward(variables, jnp.asarray(channels_last(clip)))
    for stage in stages:
        assert_close(features[stage], answer.stages[stage], 5e-5, stage)
    assert_close(finish(logits), answer.logits, 5e-5, "logits")


def compare_gradients(model, variables, clip, cotangent, answer, source, train=False):
    """In float64, the logits and statistics of BN excepted. Without the intermediates, so on the paths that users take.

    In training, also what the running statistics become: torch's of the variance with its unbiased estimate, as it
    documents; ours, as Flax's, with the biased one, which the batch was normalised by.
    """
    with jax.enable_x64(True):
        before = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), variables)

        @jax.jit
        @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
        def gradients(params, clip):
            everything = {**before, "params": params}
            if train:
                logits, state = model.apply(everything, clip, train=True, mutable=["batch_stats"])
            else:
                logits, state = model.apply(everything, clip), {"batch_stats": {}}
            return jnp.vdot(logits, cotangent.numpy()), (logits, state["batch_stats"])

        (of_params, of_clip), (logits, after) = gradients(
            before["params"], jnp.asarray(channels_last(clip.double()))
        )
    assert_close(logits, answer.logits, 1e-5, "logits")
    assert_close(of_clip, answer.of_clip, 1e-5, "gradient of the clip")
    of_params, expected = named(of_params), renamed(answer.of_weights, source)
    assert of_params.keys() == expected.keys()
    for name, gradient in expected.items():
        # Relative to the largest of the layer: a bias that a softmax or the next norm cancels has no gradient but rounding.
        layer = [other for other in expected if other.rpartition("/")[0] == name.rpartition("/")[0]]
        scale = max(np.abs(expected[other]).max() for other in layer)
        assert_close(of_params[name], gradient, 1e-5, f"gradient of {name}", scale)
    return named(after)


def named(tree):
    """Leaves by path, such as "res2_0/conv_a/kernel"."""
    return {
        path.removeprefix("params/"): leaf
        for path, leaf in nl.weights.export({"params": tree}).items()
    }


def renamed(arrays, source):
    """Arrays of a peer by our names, in our shapes."""
    table = next(s for s in SOURCES if s.name == source)
    found = {name: table.to_ours(name) for name in arrays}
    return {ours: row.transform.to_ours(arrays[name]) for name, (ours, row) in found.items()}


def compare_export(variables, state, source):
    """Under the peer's names again, the weights are bit for bit those of the peer."""
    exported = nl.weights.export(variables, source)
    state = {
        name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")
    }
    assert exported.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(exported[name], tensor.numpy(), strict=True)


def video_resnet(**options):
    return nl.models.video_resnet(num_classes=CLASSES, **options)
