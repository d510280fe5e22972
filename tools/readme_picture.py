# SPDX-License-Identifier: BSD-3-Clause
"""Draw the picture that opens the README: the curves of a quick start, and what its best model says of digits.

    python tools/readme_picture.py test/output/quickstart docs/quickstart.png

The digits are the first of those for validation; a wrong answer is red.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import matplotlib  # noqa: E402
import torch  # noqa: E402

import images  # noqa: E402
from metrics import read_events  # noqa: E402
from predict import open_network  # noqa: E402

ROWS, COLUMNS = 4, 8


def main(folder, path):
    matplotlib.use('Agg')
    from matplotlib import pyplot
    source = images.read_digits(training=False)
    network, classes, values = open_network(os.path.join(folder, 'model_best.pth.tar'))
    pictures = torch.from_numpy(source.images[:ROWS * COLUMNS]).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        probabilities, answers = network((pictures - values['mean'][0]) / values['std'][0]).softmax(1).max(1)

    figure = pyplot.figure(figsize=(11, 3.5), constrained_layout=True)
    left, right = figure.subfigures(1, 2, width_ratios=[1.25, 1])
    for axis, key, title in zip(left.subplots(1, 2), ('loss', 'acc1'), ('Loss', 'Acc@1, %')):
        for records, label, colour in zip(read_events(folder), ('training', 'validation'), ('#2f6fb5', '#d0531f')):
            axis.plot([record['epoch'] + 1 for record in records], [record[key] for record in records], marker='o',
                      markersize=3.5, linewidth=1.8, label=label, color=colour)
        axis.set_title(title, loc='left', fontsize=11)
        axis.set_xlabel('epoch', fontsize=9)
        axis.tick_params(labelsize=9)
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=0)
        for side in ('top', 'right'):
            axis.spines[side].set_visible(False)
    axis.legend(frameon=False, fontsize=9, loc='lower right')
    axis.annotate('{:.2f}'.format(records[-1][key]), (records[-1]['epoch'] + 1, records[-1][key]), (0, -14),
                  textcoords='offset points', ha='center', fontsize=9, color=colour)
    for index, axis in enumerate(right.subplots(ROWS, COLUMNS).flat):
        axis.imshow(source.images[index])
        axis.axis('off')
        right_answer = int(answers[index]) == source.labels[index]
        axis.set_title('{}  {:.0f} %'.format(classes[int(answers[index])], 100 * float(probabilities[index])), fontsize=8,
                       pad=2, color='#1b1f24' if right_answer else '#d02020')
    figure.savefig(path, dpi=110)


if __name__ == '__main__':
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
