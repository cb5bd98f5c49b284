"""Image networks of the published shapes as plain torch modules, with random weights: ResNet-18 and MobileNetV2."""

from torch import nn


def conv(inside, outside, kernel, stride=1, groups=1):
    """A convolution that keeps the size of the image up to its stride, and its batch norm."""
    layer = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outside))


class Residual(nn.Module):
    """`branch` plus its input, or plus a projection of it; then `activation`."""

    def __init__(self, branch, shortcut=None, activation=None):
        super().__init__()
        self.branch, self.shortcut, self.activation = branch, shortcut or nn.Identity(), activation or nn.Identity()

    def forward(self, x):
        """Add and activate."""
        return self.activation(self.branch(x) + self.shortcut(x))


def basic_block(inside, outside, stride):
    """The block of ResNet-18."""
    branch = nn.Sequential(conv(inside, outside, 3, stride), nn.ReLU(), conv(outside, outside, 3))
    shortcut = conv(inside, outside, 1, stride) if stride != 1 or inside != outside else None
    return Residual(branch, shortcut, nn.ReLU())


def resnet18(classes=1000):
    """ResNet-18; with 10 classes the one for images of 32 x 32, without stride and pooling at its start."""
    small = classes == 10
    layers = [conv(3, 64, 3 if small else 7, 1 if small else 2), nn.ReLU()]
    layers += [] if small else [nn.MaxPool2d(3, 2, 1)]
    inside = 64
    for outside, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [basic_block(inside, outside, stride), basic_block(outside, outside, 1)]
        inside = outside
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


def inverted(inside, outside, stride, expand):
    """The block of MobileNetV2: a pointwise, a depthwise and a pointwise convolution."""
    width = inside * expand
    layers = [] if expand == 1 else [conv(inside, width, 1), nn.ReLU6()]
    layers += [conv(width, width, 3, stride, groups=width), nn.ReLU6(), conv(width, outside, 1)]
    branch = nn.Sequential(*layers)
    return Residual(branch) if stride == 1 and inside == outside else branch


def mobilenet(classes=1000):
    """MobileNetV2, width 1.0."""
    layers, inside = [conv(3, 32, 3, 2), nn.ReLU6()], 32
    shapes = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for expand, outside, blocks, stride in shapes:
        for i in range(blocks):
            layers.append(inverted(inside, outside, stride if i == 0 else 1, expand))
            inside = outside
    layers += [conv(inside, 1280, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, classes)]
    return nn.Sequential(*layers)
