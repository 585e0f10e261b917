"""Shapes of the gradients of models that people train, in the order of their parameters, for benchmarks without the model."""

from __future__ import annotations

Shape = tuple[int, ...]


def _bottleneck(fan_in: int, width: int, project: bool) -> list[Shape]:
    """1x1, 3x3, 1x1 convolution, each with a batch norm's scale and shift; with a projection where the shape changes."""
    fan_out = 4 * width
    shapes: list[Shape] = []
    for shape in [(width, fan_in, 1, 1), (width, width, 3, 3), (fan_out, width, 1, 1)]:
        shapes += [shape, shape[:1], shape[:1]]
    if project:
        shapes += [(fan_out, fan_in, 1, 1), (fan_out,), (fan_out,)]
    return shapes


def resnet50() -> list[Shape]:
    """ResNet-50 (He et al., 2015) for 1,000 classes: 161 tensors, 25,557,032 parameters."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    fan_in = 64
    for width, blocks in [(64, 3), (128, 4), (256, 6), (512, 3)]:
        for block in range(blocks):
            shapes += _bottleneck(fan_in, width, block == 0)
            fan_in = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def gpt2_small() -> list[Shape]:
    """GPT-2 small (Radford et al., 2019), its output layer tied to the embedding: 148 tensors, 124,439,808 parameters."""
    width = 768
    norm: list[Shape] = [(width,), (width,)]
    block: list[Shape] = [
        *norm,
        *[(width, 3 * width), (3 * width,), (width, width), (width,)],  # attention: query, key, value; projection
        *norm,
        *[(width, 4 * width), (4 * width,), (4 * width, width), (width,)],  # the two layers behind it
    ]
    return [(50257, width), (1024, width), *(block * 12), *norm]


#: By name, for the command line.
MODELS = {"resnet50": resnet50, "gpt2-small": gpt2_small}


def count(shape: Shape) -> int:
    """Elements of a tensor of that shape."""
    total = 1
    for extent in shape:
        total *= extent
    return total
