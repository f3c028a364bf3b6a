"""Runs the same operations and blocks in PyTorch, and mmcv-lite's blocks, on request."""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import cases
from benchmarks.cases import Case, Floats, Job
from benchmarks.machine import installed_versions
from benchmarks.torch_network import VideoResNet
from benchmarks.worker import serve
from nonlocal_jax.types import Instantiation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NONLOCAL_BLOCKS = {"res3": (1, 3), "res4": (1, 3, 5)}


class Torch:
    """Competitors written in PyTorch: forward in inference mode, both directions by autograd."""

    backend = "gpu" if DEVICE == "cuda" else "cpu"

    def prepare(self, job: Job) -> Callable[[], Sequence[Any]]:
        if job.case.section == "network":
            return _network(job)
        function, inputs = build(job)
        if job.direction == "forward":
            return lambda: _run_forward(function, inputs)
        cotangent = _tensor(cases.cotangent(job.case), job)
        if job.competitor.startswith("mmcv"):
            cotangent = _channels_second(cotangent, job)
        return lambda: _forward_and_backward(function, inputs, cotangent)

    def wait(self, outputs: Sequence[Any]) -> None:
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    def facts(self, job: Job) -> dict[str, Any]:
        return {}

    def device_peak(self, run: Callable[[], Sequence[Any]]) -> int | None:
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        outputs = run()
        peak = int(torch.cuda.max_memory_allocated())
        return peak - allocated - sum(output.nbytes for output in outputs)

    def as_numpy(self, output: Any) -> Floats:
        array: Floats = output.detach().float().cpu().numpy()
        return array

    def versions(self) -> dict[str, str]:
        versions = installed_versions(("torch", "mmcv-lite"))
        if DEVICE == "cuda":
            versions["CUDA of torch"] = str(torch.version.cuda)
            versions["cuDNN of torch"] = str(torch.backends.cudnn.version())
        return versions | {"torch threads": str(torch.get_num_threads())}


def _run_forward(function: Callable[..., Any], inputs: Sequence[Any]) -> Sequence[Any]:
    with torch.inference_mode():
        return [function(*inputs)]


def _forward_and_backward(
    function: Callable[..., Any], inputs: Sequence[Any], cotangent: Any
) -> Sequence[Any]:
    y = function(*inputs)
    gradients = torch.autograd.grad(y, inputs, cotangent)
    return [y.detach(), *gradients]


def build(job: Job) -> tuple[Callable[..., Any], list[Any]]:
    """Returns the function of a job and the tensors that it is differentiated by."""
    case, train = job.case, job.direction == "both"
    sdpa = job.competitor in ("torch sdpa", "torch cudnn")
    if job.competitor.startswith("mmcv"):
        return _mmcv_block(job, train)
    if case.section == "block":
        w = {name: _tensor(array, job) for name, array in cases.weights(case).items()}
        statistics = w.pop("mean"), w.pop("var")
        tensors = [_tensor(cases.features(case), job), *w.values()]

        def function(x: Any, *values: Any) -> Any:
            return block(case, sdpa, x, dict(zip(w, values, strict=True)), statistics, train)
    else:
        tensors = [_tensor(array, job) for array in cases.inputs(case)]
        function = functools.partial(respond, case.instantiation, sdpa)
    if job.competitor == "torch cudnn":
        function = sdpa_kernel(SDPBackend.CUDNN_ATTENTION)(function)
    return function, [tensor.requires_grad_(train) for tensor in tensors]


def respond(
    instantiation: Instantiation,
    sdpa: bool,
    theta: Any,
    phi: Any,
    g: Any,
    w_f: Any = None,
    scale: float = 1.0,
) -> Any:
    """Computes the response, by scaled_dot_product_attention or with all N×M pairs.

    The arguments are θ (B, N, d), φ (B, M, d), g (B, M, e) and w_f (2d,).
    """
    if instantiation == "dot_product":
        return theta @ phi.mT @ (g / g.shape[-2])
    if instantiation == "concatenation":
        w_theta, w_phi = w_f.chunk(2)
        return torch.relu((theta @ w_theta)[..., :, None] + (phi @ w_phi)[..., None, :]) @ (
            g / g.shape[-2]
        )
    if sdpa:
        return functional.scaled_dot_product_attention(
            theta[:, None], phi[:, None], g[:, None], scale=scale
        )[:, 0]
    return torch.softmax((theta if scale == 1 else scale * theta) @ phi.mT, dim=-1) @ g


def block(
    case: Case, sdpa: bool, x: Any, w: dict[str, Any], statistics: tuple[Any, Any], train: bool
) -> Any:
    """Computes the block on x (B, T, H, W, C), with convolutions as matrix products."""

    def linear(name: str) -> Any:
        return functional.linear(x, w[f"{name}.kernel"].T, w[f"{name}.bias"])

    gaussian = case.instantiation == "gaussian"
    theta, phi, g = (
        x if gaussian else linear("theta"),
        x if gaussian else linear("phi"),
        linear("g"),
    )
    if case.m < case.n:
        phi, g = _pool(phi), _pool(g)
    scale = case.d**-0.5 if case.instantiation == "embedded_gaussian" else 1.0
    theta, phi, g = (a.flatten(1, 3) for a in (theta, phi, g))
    y = respond(case.instantiation, sdpa, theta, phi, g, w.get("w_f"), scale)
    residual = (y @ w["out.kernel"]).flatten(0, 1)
    normed = functional.batch_norm(
        residual, *statistics, w["scale"], w["bias"], training=train, momentum=0.1, eps=1e-5
    )
    return normed.view(x.shape) + x


def _pool(x: Any) -> Any:
    """Applies 1×2×2 max pooling to (B, T, H, W, c), viewed as channels_last (B·T, c, H, W)."""
    pooled = functional.max_pool2d(x.flatten(0, 1).permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    return pooled.unflatten(0, x.shape[:2])


def _mmcv_block(job: Job, train: bool) -> tuple[Callable[..., Any], list[Any]]:
    from mmcv.cnn.bricks.non_local import NonLocal3d

    case = job.case
    module = NonLocal3d(
        2 * case.d,
        mode=case.instantiation,
        sub_sample=case.m < case.n,
        norm_cfg={"type": "BN3d"},
        zeros_init=False,
    )
    missing, unexpected = module.load_state_dict(_mmcv_state(case), strict=False)
    if unexpected or any(not name.endswith("num_batches_tracked") for name in missing):
        raise ValueError(
            f"the block's weights must be {sorted(module.state_dict())}; "
            f"missing {missing}, unexpected {unexpected}."
        )
    module = module.to(DEVICE).train(train)
    for parameter in module.parameters():
        if parameter.ndim == 5:  # the concatenation's w_f is a 2-D convolution
            parameter.data = parameter.data.contiguous(memory_format=_memory_format(job))
    x = _channels_second(_tensor(cases.features(case), job), job).requires_grad_(train)
    parameters = list(module.parameters())
    return lambda x, *_: module(x), [x, *parameters] if train else [x]


def _mmcv_state(case: Case) -> dict[str, Any]:
    w = cases.weights(case)
    pooled = ".0" if case.m < case.n else ""
    names = {"theta": "theta", "phi": f"phi{pooled}", "g": f"g{pooled}"}
    state = {}
    for embedding, name in names.items():
        if f"{embedding}.kernel" in w:
            state[f"{name}.conv.weight"] = w[f"{embedding}.kernel"].T[..., None, None, None]
            state[f"{name}.conv.bias"] = w[f"{embedding}.bias"]
    if "w_f" in w:
        state["concat_project.conv.weight"] = w["w_f"][None, :, None, None]
    state["conv_out.conv.weight"] = w["out.kernel"].T[..., None, None, None]
    norm = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    state |= {f"conv_out.bn.{name}": w[leaf] for name, leaf in norm.items()}
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in state.items()}


def _network(job: Job) -> Callable[[], Sequence[Any]]:
    """Prepares a run: the logits of a batch of clips, or those of one more training step.

    In bfloat16 by automatic mixed precision.
    """
    sdpa = job.competitor in ("torch sdpa", "torch compiled")
    model = VideoResNet(clip=job.case.clip, nonlocal_blocks=NONLOCAL_BLOCKS, sdpa=sdpa)
    state = {
        name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()
    }
    shared = {
        name: torch.from_numpy(cases.network_weight(name, tuple(tensor.shape)))
        for name, tensor in state.items()
    }
    model.load_state_dict(shared, strict=False)
    model = model.to(DEVICE, memory_format=_memory_format(job)).train(job.direction == "both")
    forward = torch.compile(model) if job.competitor == "torch compiled" else model
    clips = _channels_second(torch.from_numpy(cases.clips(job.case)).to(DEVICE), job)
    mixed = torch.autocast(DEVICE, torch.bfloat16, enabled=job.dtype == "bfloat16")
    if job.direction == "forward":

        def infer() -> Sequence[Any]:
            with mixed:
                return _run_forward(forward, [clips])

        return infer
    optimiser = torch.optim.SGD(
        model.parameters(), 0.01, momentum=0.9, nesterov=True, fused=DEVICE == "cuda"
    )
    labels = torch.arange(len(clips), device=DEVICE)

    def step() -> Sequence[Any]:
        optimiser.zero_grad()
        with mixed:
            logits = forward(clips)
            loss = functional.cross_entropy(logits, labels)
        loss.backward()
        optimiser.step()
        return [logits.detach()]

    return step


def _memory_format(job: Job) -> Any:
    return (
        torch.contiguous_format if job.competitor.endswith("contiguous") else torch.channels_last_3d
    )


def _channels_second(x: Any, job: Job) -> Any:
    return x.permute(0, 4, 1, 2, 3).contiguous(memory_format=_memory_format(job))


def _tensor(array: Floats, job: Job) -> Any:
    return torch.from_numpy(array).to(DEVICE, getattr(torch, job.dtype))


if __name__ == "__main__":
    torch.set_num_threads(os.cpu_count() or 1)
    torch.backends.cudnn.benchmark = True  # chooses the fastest convolutions in the first run
    serve(Torch())
