"""Runs mmcv-lite's non-local blocks in torch.

`make parity` compares with it. As a program, it records the goldens for `make test`:

.venv-parity/bin/python tests/parity/mmcv_peer.py   # writes tests/goldens/mmcv.npz
"""

import sys
from pathlib import Path

import numpy as np
import torch
from mmcv.cnn.bricks import non_local

TESTS = Path(__file__).parent.parent
GOLDENS = TESTS / "goldens" / "mmcv.npz"


def run(case):
    """Returns weights, input, output and gradients of one case, as NumPy arrays.

    Weights and statistics are drawn at random, away from their initial values.
    """
    torch.manual_seed(0)
    norm = {"norm_cfg": {"type": f"BN{case.dimensions}d"}} if case.norm else {}
    block_type = getattr(non_local, f"NonLocal{case.dimensions}d")
    block = block_type(6, mode=case.mode, sub_sample=case.sub_sample, **norm).eval()
    with torch.no_grad():
        for name, tensor in block.state_dict().items():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5) if name.endswith("running_var") else tensor.uniform_(
                    -0.7, 0.7
                )
    x = torch.rand(2, 6, *case.positions, requires_grad=True)
    # mmcv's concatenation divides the saved output of a ReLU in place, which torch forbids.
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        z = block(x)
        cotangent = torch.randn(z.shape)
        z.backward(cotangent)
    gradients = {name: p.grad for name, p in block.named_parameters()} | {"x": x.grad}
    state = {name: t for name, t in block.state_dict().items() if t.is_floating_point()}
    return {
        "state": to_numpy(state),
        "x": x.detach().numpy(),
        "z": z.detach().numpy(),
        "cotangent": cotangent.numpy(),
        "gradients": to_numpy(gradients),
    }


def new_block(channels):
    """Returns the weights of a new block for images, as mmcv initialises them."""
    torch.manual_seed(0)
    block = non_local.NonLocal2d(channels, mode="concatenation", norm_cfg={"type": "BN"})
    return to_numpy({name: t for name, t in block.state_dict().items() if t.is_floating_point()})


def to_numpy(tensors):
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}


def record():
    from parity.mmcv_cases import CASES

    arrays = {}
    for case in CASES:
        for key, value in run(case).items():
            inner = value if isinstance(value, dict) else {"": value}
            arrays |= {f"{case.name}/{key}/{name}": array for name, array in inner.items()}
    import mmcv

    versions = f"mmcv-lite {mmcv.__version__}, torch {torch.__version__}, NumPy {np.__version__}"
    np.savez_compressed(GOLDENS, versions=np.array(versions), **arrays)
    print(f"{GOLDENS}: {len(CASES)} cases, {versions}")


if __name__ == "__main__":
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    record()
