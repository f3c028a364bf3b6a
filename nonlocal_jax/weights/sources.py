"""The naming table of each source.

The first row that matches a name is used. Each row has an example, which the tests check.
"""

from collections.abc import Mapping

from nonlocal_jax.weights.names import (
    CONV,
    CONV2D,
    DENSE,
    POINTWISE,
    POINTWISE2D,
    VECTOR,
    W_F,
    NamingTable,
    Row,
    Transform,
    flattened_dense,
)


def _rows(*rows: tuple[str, str, Transform, str, str]) -> tuple[Row, ...]:
    """Makes rows of (source, native, transform, example of the source, native example)."""
    return tuple(
        Row(source, native, transform, (source_example, native_example))
        for source, native, transform, source_example, native_example in rows
    )


def _stages(*words: str) -> dict[str, str]:
    return dict(zip(("res2", "res3", "res4", "res5"), words, strict=True))


BRANCH = {"a": "1", "b": "2", "c": "3"}
STATISTICS = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
COUNTERS = (r".*\.num_batches_tracked",)
EMBEDDING = {"theta": "theta", "phi": "phi", "g": "g"}

CAFFE2 = NamingTable(
    "caffe2",
    _rows(
        ("conv1_w", "conv1/kernel", CONV, "conv1_w", "conv1/kernel"),
        ("res_conv1_bn_{stat}", "conv1_norm/{stat}", VECTOR, "res_conv1_bn_riv", "conv1_norm/var"),
        (
            "res{stage}_{i}_branch2{x}_w", "res{stage}_{i}/conv_{x}/kernel", CONV,
            "res3_0_branch2a_w", "res3_0/conv_a/kernel",
        ),
        (
            "res{stage}_{i}_branch2{x}_bn_{stat}", "res{stage}_{i}/norm_{x}/{stat}", VECTOR,
            "res4_22_branch2c_bn_rm", "res4_22/norm_c/mean",
        ),
        (
            "res{stage}_{i}_branch1_w", "res{stage}_{i}/shortcut/kernel", CONV,
            "res5_0_branch1_w", "res5_0/shortcut/kernel",
        ),
        (
            "res{stage}_{i}_branch1_bn_{stat}", "res{stage}_{i}/shortcut_norm/{stat}", VECTOR,
            "res2_0_branch1_bn_s", "res2_0/shortcut_norm/scale",
        ),
        (
            "nonlocal_conv{stage}_{i}_{embedding}_w",
            "nonlocal_res{stage}_{i}/operation/{embedding}/kernel", POINTWISE,
            "nonlocal_conv3_1_theta_w", "nonlocal_res3_1/operation/theta/kernel",
        ),
        (
            "nonlocal_conv{stage}_{i}_{embedding}_b",
            "nonlocal_res{stage}_{i}/operation/{embedding}/bias", VECTOR,
            "nonlocal_conv4_20_g_b", "nonlocal_res4_20/operation/g/bias",
        ),
        (
            "nonlocal_conv{stage}_{i}_out_w", "nonlocal_res{stage}_{i}/out/kernel", POINTWISE,
            "nonlocal_conv4_5_out_w", "nonlocal_res4_5/out/kernel",
        ),
        (
            "nonlocal_conv{stage}_{i}_out_b", "nonlocal_res{stage}_{i}/out/bias", VECTOR,
            "nonlocal_conv4_5_out_b", "nonlocal_res4_5/out/bias",
        ),
        (
            "nonlocal_conv{stage}_{i}_bn_{stat}", "nonlocal_res{stage}_{i}/out_norm/{stat}", VECTOR,
            "nonlocal_conv3_3_bn_riv", "nonlocal_res3_3/out_norm/var",
        ),
        ("pred_w", "head/kernel", DENSE, "pred_w", "head/kernel"),
        ("pred_b", "head/bias", VECTOR, "pred_b", "head/bias"),
    ),
    {
        "stage": {stage: stage for stage in "2345"},
        "x": {x: x for x in "abc"},
        "stat": {"scale": "s", "bias": "b", "mean": "rm", "var": "riv"},
        "embedding": EMBEDDING,
    },
    # Its script that makes norms affine uses 1e-5, its networks 1.0000001e-5.
    epsilon=1e-5,
    # Its released networks for 32 and 128 frames sum over groups of four frames in res3.
    frozen_group_size={"res3": 4},
)  # fmt: skip

SLOWFAST = NamingTable(
    "slowfast",
    _rows(
        (
            "s1.pathway0_stem.conv.weight", "conv1/kernel", CONV,
            "s1.pathway0_stem.conv.weight", "conv1/kernel",
        ),
        (
            "s1.pathway0_stem.bn.{stat}", "conv1_norm/{stat}", VECTOR,
            "s1.pathway0_stem.bn.weight", "conv1_norm/scale",
        ),
        (
            "{stage}.pathway0_res{i}.branch2.{x}.weight", "{stage}_{i}/conv_{x}/kernel", CONV,
            "s3.pathway0_res0.branch2.a.weight", "res3_0/conv_a/kernel",
        ),
        (
            "{stage}.pathway0_res{i}.branch2.{x}_bn.{stat}", "{stage}_{i}/norm_{x}/{stat}", VECTOR,
            "s4.pathway0_res22.branch2.c_bn.running_mean", "res4_22/norm_c/mean",
        ),
        (
            "{stage}.pathway0_res{i}.branch1.weight", "{stage}_{i}/shortcut/kernel", CONV,
            "s5.pathway0_res0.branch1.weight", "res5_0/shortcut/kernel",
        ),
        (
            "{stage}.pathway0_res{i}.branch1_bn.{stat}", "{stage}_{i}/shortcut_norm/{stat}", VECTOR,
            "s2.pathway0_res0.branch1_bn.bias", "res2_0/shortcut_norm/bias",
        ),
        (
            "{stage}.pathway0_nonlocal{i}.conv_{embedding}.weight",
            "nonlocal_{stage}_{i}/operation/{embedding}/kernel",
            POINTWISE,
            "s3.pathway0_nonlocal1.conv_theta.weight", "nonlocal_res3_1/operation/theta/kernel",
        ),
        (
            "{stage}.pathway0_nonlocal{i}.conv_{embedding}.bias",
            "nonlocal_{stage}_{i}/operation/{embedding}/bias",
            VECTOR, "s4.pathway0_nonlocal5.conv_phi.bias", "nonlocal_res4_5/operation/phi/bias",
        ),
        (
            "{stage}.pathway0_nonlocal{i}.conv_out.weight",
            "nonlocal_{stage}_{i}/out/kernel", POINTWISE,
            "s4.pathway0_nonlocal1.conv_out.weight", "nonlocal_res4_1/out/kernel",
        ),
        (
            "{stage}.pathway0_nonlocal{i}.conv_out.bias", "nonlocal_{stage}_{i}/out/bias", VECTOR,
            "s4.pathway0_nonlocal1.conv_out.bias", "nonlocal_res4_1/out/bias",
        ),
        (
            "{stage}.pathway0_nonlocal{i}.bn.{stat}",
            "nonlocal_{stage}_{i}/out_norm/{stat}", VECTOR,
            "s3.pathway0_nonlocal3.bn.running_var", "nonlocal_res3_3/out_norm/var",
        ),
        ("head.projection.weight", "head/kernel", DENSE, "head.projection.weight", "head/kernel"),
        ("head.projection.bias", "head/bias", VECTOR, "head.projection.bias", "head/bias"),
    ),
    {
        "stage": _stages("s2", "s3", "s4", "s5"),
        "x": {x: x for x in "abc"},
        "stat": STATISTICS,
        "embedding": EMBEDDING,
    },
    COUNTERS,
)  # fmt: skip

_TORCHVISION = _rows(
    ("conv1.weight", "conv1/kernel", CONV, "conv1.weight", "conv1/kernel"),
    ("bn1.{stat}", "conv1_norm/{stat}", VECTOR, "bn1.running_var", "conv1_norm/var"),
    (
        "{stage}.{i}.conv{x}.weight", "{stage}_{i}/conv_{x}/kernel", CONV,
        "layer2.0.conv1.weight", "res3_0/conv_a/kernel",
    ),
    (
        "{stage}.{i}.bn{x}.{stat}", "{stage}_{i}/norm_{x}/{stat}", VECTOR,
        "layer3.22.bn3.weight", "res4_22/norm_c/scale",
    ),
    (
        "{stage}.{i}.downsample.0.weight", "{stage}_{i}/shortcut/kernel", CONV,
        "layer4.0.downsample.0.weight", "res5_0/shortcut/kernel",
    ),
    (
        "{stage}.{i}.downsample.1.{stat}", "{stage}_{i}/shortcut_norm/{stat}", VECTOR,
        "layer1.0.downsample.1.running_mean", "res2_0/shortcut_norm/mean",
    ),
    ("fc.weight", "head/kernel", DENSE, "fc.weight", "head/kernel"),
    ("fc.bias", "head/bias", VECTOR, "fc.bias", "head/bias"),
)  # fmt: skip
_LAYERS = _stages("layer1", "layer2", "layer3", "layer4")
TORCHVISION = NamingTable(
    "torchvision", _TORCHVISION, {"stage": _LAYERS, "x": BRANCH, "stat": STATISTICS}, COUNTERS
)

_BLOCK = "backbone.{stage}.{i}.non_local_block"
_OPERATION = "nonlocal_{stage}_{i}/operation"
MMACTION2 = NamingTable(
    "mmaction2",
    _rows(
        (
            "backbone.conv1.conv.weight", "conv1/kernel", CONV,
            "backbone.conv1.conv.weight", "conv1/kernel",
        ),
        (
            "backbone.conv1.bn.{stat}", "conv1_norm/{stat}", VECTOR,
            "backbone.conv1.bn.weight", "conv1_norm/scale",
        ),
        (
            "backbone.{stage}.{i}.conv{x}.conv.weight", "{stage}_{i}/conv_{x}/kernel", CONV,
            "backbone.layer2.0.conv1.conv.weight", "res3_0/conv_a/kernel",
        ),
        (
            "backbone.{stage}.{i}.conv{x}.bn.{stat}", "{stage}_{i}/norm_{x}/{stat}", VECTOR,
            "backbone.layer3.5.conv3.bn.running_mean", "res4_5/norm_c/mean",
        ),
        (
            "backbone.{stage}.{i}.downsample.conv.weight", "{stage}_{i}/shortcut/kernel", CONV,
            "backbone.layer4.0.downsample.conv.weight", "res5_0/shortcut/kernel",
        ),
        (
            "backbone.{stage}.{i}.downsample.bn.{stat}", "{stage}_{i}/shortcut_norm/{stat}", VECTOR,
            "backbone.layer1.0.downsample.bn.bias", "res2_0/shortcut_norm/bias",
        ),
        # θ is only a convolution. Where keys are pooled, φ and g are the first of two layers.
        (
            f"{_BLOCK}.theta.conv.weight", f"{_OPERATION}/theta/kernel", POINTWISE,
            "backbone.layer2.1.non_local_block.theta.conv.weight",
            "nonlocal_res3_1/operation/theta/kernel",
        ),
        (
            f"{_BLOCK}.theta.conv.bias", f"{_OPERATION}/theta/bias", VECTOR,
            "backbone.layer2.1.non_local_block.theta.conv.bias",
            "nonlocal_res3_1/operation/theta/bias",
        ),
        (
            _BLOCK + ".{pooled}.0.conv.weight", _OPERATION + "/{pooled}/kernel", POINTWISE,
            "backbone.layer2.1.non_local_block.phi.0.conv.weight",
            "nonlocal_res3_1/operation/phi/kernel",
        ),
        (
            _BLOCK + ".{pooled}.0.conv.bias", _OPERATION + "/{pooled}/bias", VECTOR,
            "backbone.layer2.1.non_local_block.g.0.conv.bias", "nonlocal_res3_1/operation/g/bias",
        ),
        (
            _BLOCK + ".{pooled}.conv.weight", _OPERATION + "/{pooled}/kernel", POINTWISE,
            "backbone.layer3.3.non_local_block.phi.conv.weight",
            "nonlocal_res4_3/operation/phi/kernel",
        ),
        (
            _BLOCK + ".{pooled}.conv.bias", _OPERATION + "/{pooled}/bias", VECTOR,
            "backbone.layer3.3.non_local_block.g.conv.bias", "nonlocal_res4_3/operation/g/bias",
        ),
        (
            f"{_BLOCK}.concat_project.conv.weight", f"{_OPERATION}/w_f", W_F,
            "backbone.layer3.5.non_local_block.concat_project.conv.weight",
            "nonlocal_res4_5/operation/w_f",
        ),
        (
            f"{_BLOCK}.conv_out.conv.weight", "nonlocal_{stage}_{i}/out/kernel", POINTWISE,
            "backbone.layer3.5.non_local_block.conv_out.conv.weight", "nonlocal_res4_5/out/kernel",
        ),
        (
            f"{_BLOCK}.conv_out.conv.bias", "nonlocal_{stage}_{i}/out/bias", VECTOR,
            "backbone.layer3.5.non_local_block.conv_out.conv.bias", "nonlocal_res4_5/out/bias",
        ),
        (
            _BLOCK + ".conv_out.bn.{stat}", "nonlocal_{stage}_{i}/out_norm/{stat}", VECTOR,
            "backbone.layer3.5.non_local_block.conv_out.bn.running_var",
            "nonlocal_res4_5/out_norm/var",
        ),
        ("cls_head.fc_cls.weight", "head/kernel", DENSE, "cls_head.fc_cls.weight", "head/kernel"),
        ("cls_head.fc_cls.bias", "head/bias", VECTOR, "cls_head.fc_cls.bias", "head/bias"),
    ),
    {"stage": _LAYERS, "x": BRANCH, "stat": STATISTICS, "pooled": {"phi": "phi", "g": "g"}},
    COUNTERS,
    pooled_key=".g.0.",
    flat_c2d=True,
)  # fmt: skip


def _pytorchvideo(name: str, head: str, example: str, *stages: str) -> NamingTable:
    """Makes a table, given the names of the head, of res3 for the examples, and of the stages."""
    rows = _rows(
        ("blocks.0.conv.weight", "conv1/kernel", CONV, "blocks.0.conv.weight", "conv1/kernel"),
        (
            "blocks.0.norm.{stat}", "conv1_norm/{stat}", VECTOR,
            "blocks.0.norm.running_mean", "conv1_norm/mean",
        ),
        (
            "{stage}.res_blocks.{i}.branch2.conv_{x}.weight", "{stage}_{i}/conv_{x}/kernel", CONV,
            f"{example}.res_blocks.0.branch2.conv_a.weight", "res3_0/conv_a/kernel",
        ),
        (
            "{stage}.res_blocks.{i}.branch2.norm_{x}.{stat}", "{stage}_{i}/norm_{x}/{stat}", VECTOR,
            f"{example}.res_blocks.3.branch2.norm_c.weight", "res3_3/norm_c/scale",
        ),
        (
            "{stage}.res_blocks.{i}.branch1_conv.weight", "{stage}_{i}/shortcut/kernel", CONV,
            f"{example}.res_blocks.0.branch1_conv.weight", "res3_0/shortcut/kernel",
        ),
        (
            "{stage}.res_blocks.{i}.branch1_norm.{stat}",
            "{stage}_{i}/shortcut_norm/{stat}", VECTOR,
            f"{example}.res_blocks.0.branch1_norm.running_var", "res3_0/shortcut_norm/var",
        ),
        (f"{head}.proj.weight", "head/kernel", DENSE, f"{head}.proj.weight", "head/kernel"),
        (f"{head}.proj.bias", "head/bias", VECTOR, f"{head}.proj.bias", "head/bias"),
    )  # fmt: skip
    return NamingTable(
        name,
        rows,
        {"stage": _stages(*stages), "x": {x: x for x in "abc"}, "stat": STATISTICS},
        COUNTERS,
        shows_pool2=True,
        network_options={"window_average": "logits"},
    )


# Block 2 is pool2, in c2d_r50 and i3d_r50.
PYTORCHVIDEO = _pytorchvideo(
    "pytorchvideo", "blocks.6", "blocks.3", "blocks.1", "blocks.3", "blocks.4", "blocks.5"
)


def _non_local_pytorch(
    name: str, conv: Mapping[str, str], norm: Mapping[str, str], block: Mapping[str, str]
) -> NamingTable:
    """Makes a table, given the names of the convolutions, norms and blocks by number."""
    c, n, b = conv["2"], norm["2"], block["2"]
    rows = _rows(
        ("{conv}.weight", "conv{conv}/kernel", CONV2D, f"{c}.weight", "conv2/kernel"),
        ("{conv}.bias", "conv{conv}/bias", VECTOR, f"{c}.bias", "conv2/bias"),
        ("{norm}.{stat}", "conv{norm}_norm/{stat}", VECTOR, f"{n}.running_mean", "conv2_norm/mean"),
        (
            "{block}.theta.weight", "nonlocal{block}/operation/theta/kernel", POINTWISE2D,
            f"{b}.theta.weight", "nonlocal2/operation/theta/kernel",
        ),
        (
            "{block}.theta.bias", "nonlocal{block}/operation/theta/bias", VECTOR,
            f"{b}.theta.bias", "nonlocal2/operation/theta/bias",
        ),
        (
            "{block}.{pooled}.0.weight", "nonlocal{block}/operation/{pooled}/kernel", POINTWISE2D,
            f"{b}.g.0.weight", "nonlocal2/operation/g/kernel",
        ),
        (
            "{block}.{pooled}.0.bias", "nonlocal{block}/operation/{pooled}/bias", VECTOR,
            f"{b}.phi.0.bias", "nonlocal2/operation/phi/bias",
        ),
        (
            "{block}.concat_project.0.weight", "nonlocal{block}/operation/w_f", W_F,
            f"{b}.concat_project.0.weight", "nonlocal2/operation/w_f",
        ),
        (
            "{block}.W.0.weight", "nonlocal{block}/out/kernel", POINTWISE2D,
            f"{b}.W.0.weight", "nonlocal2/out/kernel",
        ),
        (
            "{block}.W.0.bias", "nonlocal{block}/out/bias", VECTOR,
            f"{b}.W.0.bias", "nonlocal2/out/bias",
        ),
        (
            "{block}.W.1.{stat}", "nonlocal{block}/out_norm/{stat}", VECTOR,
            f"{b}.W.1.running_var", "nonlocal2/out_norm/var",
        ),
        ("fc.0.weight", "fc1/kernel", flattened_dense(128, 3, 3), "fc.0.weight", "fc1/kernel"),
        ("fc.0.bias", "fc1/bias", VECTOR, "fc.0.bias", "fc1/bias"),
        ("fc.3.weight", "fc2/kernel", DENSE, "fc.3.weight", "fc2/kernel"),
        ("fc.3.bias", "fc2/bias", VECTOR, "fc.3.bias", "fc2/bias"),
    )  # fmt: skip
    words = {
        "conv": conv,
        "norm": norm,
        "block": block,
        "stat": STATISTICS,
        "pooled": {"phi": "phi", "g": "g"},
    }
    return NamingTable(name, rows, words, COUNTERS)


NON_LOCAL_PYTORCH = _non_local_pytorch(
    "non_local_pytorch",
    {"1": "conv_1.0", "2": "conv_2.0", "3": "conv_3.0"},
    {"1": "conv_1.1", "2": "conv_2.1", "3": "conv_3.1"},
    {"1": "nl_1", "2": "nl_2"},
)
# Its first version was one sequence of all layers.
NON_LOCAL_PYTORCH_FIRST = _non_local_pytorch(
    "non_local_pytorch (first version)",
    {"1": "convs.0", "2": "convs.5", "3": "convs.10"},
    {"1": "convs.1", "2": "convs.6", "3": "convs.11"},
    {"1": "convs.4", "2": "convs.9"},
)

NAMING_TABLES = (
    CAFFE2,
    SLOWFAST,
    MMACTION2,
    PYTORCHVIDEO,
    TORCHVISION,
    NON_LOCAL_PYTORCH,
    NON_LOCAL_PYTORCH_FIRST,
)
