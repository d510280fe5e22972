# SPDX-License-Identifier: BSD-3-Clause
"""main.py with a VGG of few channels, whose checkpoints are 0.4 MB in place of 1 GB: for tests of everything around it."""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
import accelerator  # noqa: E402
import main  # noqa: E402
import vgg  # noqa: E402
from torch import nn  # noqa: E402

vgg.WIDTHS = (8, 8, 16, 16, 16)
accelerator.available_cores = lambda: 1  # layers as small as these only wait for a second thread


class SmallVGG(vgg.VGG):
    """The same layers under the same names; dropout included, whose masks a resumed run must draw again."""

    def __init__(self, arch='vgg16', num_classes=1000):
        nn.Module.__init__(self)
        self.features = vgg._features(vgg.DEPTHS[arch.replace('_bn', '')], batch_norm=arch.endswith('_bn'))
        self.classifier = nn.Sequential(
            nn.Linear(16 * 7 * 7, 32), nn.ReLU(inplace=True), nn.Dropout(),
            nn.Linear(32, 32), nn.ReLU(inplace=True), nn.Dropout(),
            nn.Linear(32, num_classes))
        self.apply(vgg._initialise)


vgg.VGG = SmallVGG  # at import, so that spawned processes, which import this file again, have it too

if __name__ == '__main__':
    exit_code = main.main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
