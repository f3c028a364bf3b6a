"""3-D convolution as a sum over its taps, in float64 NumPy, with both gradients."""

import itertools

import numpy as np


def arrays(kernel_size, channels, features, groups=1, positions=(5, 7, 11), batch=2):
    """A random input, a kernel that keeps the variance, and a cotangent for strides of 1."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, *positions, channels))
    fan_in = np.prod(kernel_size) * channels // groups
    kernel = rng.standard_normal((*kernel_size, channels // groups, features)) / np.sqrt(fan_in)
    return x.astype(np.float32), kernel.astype(np.float32)


def convolution(x, kernel, strides=(1, 1, 1), groups=1):
    """y[p] = Σ_tap x[strides · p + tap] W[tap] for x (B, T, H, W, C), with zeros beyond borders."""
    return sum(
        np.concatenate([part @ weights for part, weights in zip(*pair, strict=True)], axis=-1)
        for pair in _taps(x, kernel, strides, groups)
    )


def gradients(x, kernel, cotangent, strides=(1, 1, 1), groups=1):
    """The gradients of x and of the kernel, as the transposes of the sum."""
    cotangents = np.split(np.asarray(cotangent, np.float64), groups, axis=-1)
    half = [size // 2 for size in kernel.shape[:3]]
    x_gradient = np.zeros(_padded(x, half).shape)
    kernel_gradient = np.zeros(kernel.shape)
    axes = tuple(range(4))
    taps = itertools.product(*map(range, kernel.shape[:3]))
    for tap, (parts, weights) in zip(taps, _taps(x, kernel, strides, groups), strict=True):
        products = [rows @ matrix.T for rows, matrix in zip(cotangents, weights, strict=True)]
        x_gradient[_window(tap, x.shape, strides)] += np.concatenate(products, axis=-1)
        sums = [np.tensordot(*pair, (axes, axes)) for pair in zip(parts, cotangents, strict=True)]
        kernel_gradient[tap] = np.concatenate(sums, axis=-1)
    inside = (slice(size, size + n) for size, n in zip(half, x.shape[1:4], strict=True))
    return x_gradient[:, *inside], kernel_gradient


def _taps(x, kernel, strides, groups):
    """For each tap, what it sees of x and its matrix, both as lists of groups."""
    padded = _padded(np.asarray(x, np.float64), [size // 2 for size in kernel.shape[:3]])
    for tap in itertools.product(*map(range, kernel.shape[:3])):
        part = padded[_window(tap, x.shape, strides)]
        matrix = np.asarray(kernel[tap], np.float64)
        yield np.split(part, groups, axis=-1), np.split(matrix, groups, axis=-1)


def _padded(x, half):
    return np.pad(x, [(0, 0), *((size, size) for size in half), (0, 0)])


def _window(tap, shape, strides):
    axes = zip(tap, shape[1:4], strides, strict=True)
    return (slice(None), *(slice(start, start + n, stride) for start, n, stride in axes))
