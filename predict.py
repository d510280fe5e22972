# SPDX-License-Identifier: BSD-3-Clause
"""Say what is on pictures: the five likeliest classes of each, by the weights of a checkpoint.

    python predict.py dog.jpg --checkpoint model_best.pth.tar
    python predict.py holiday/ --checkpoint vgg16.pth --classes imagenet_classes.txt --csv > holiday.csv
    python predict.py dog.jpg --checkpoint model_best.pth.tar --heatmap dog_heatmap.png

Any checkpoint that main.py reads will do; one with averaged weights (--ema-decay) answers by those.
"""
import csv
import io
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import accelerator
import torch
import torch.nn.functional as F

import images
import main
import vgg
from main import WrongUse
from metrics import Log

BATCH = 32       # pictures
MOST_ROWS = 24   # of a heatmap's sheet
IMAGENET = {'image_size': 224, 'crop': True, 'mean': images.Folder.mean, 'std': images.Folder.std}


def parse_args(argv=None):
    parser = main.Parser('predict.py', description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument('pictures', metavar='IMAGE|DIR', nargs='+', help='pictures, or folders to take all pictures from')
    parser.add_argument('--checkpoint', metavar='FILE', required=True, help="main.py's, ModelZoo's or torchvision's")
    parser.add_argument('--classes', metavar='FILE', help='names of the classes, one a line, in the order of their numbers '
                        '(default: those in the checkpoint, else the numbers)')
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument('--json', action='store_true', help='one JSON object a picture and line')
    shape.add_argument('--csv', action='store_true', help='picture,rank,class,probability')
    parser.add_argument('--heatmap', metavar='OUT.png',
                        help='also draw where the first answer was seen, a row for each picture (Grad-CAM)')
    parser.add_argument('--device', default='auto', choices=['auto', 'npu', 'gpu', 'cuda', 'mps', 'cpu'],
                        help='(default: the first of npu, gpu, mps, cpu that works)')
    return parser.parse_args(argv)


def open_network(path, names_file=None):
    """(network, names of its classes, preprocessing) of a checkpoint; the averaged weights where it has them.

    preprocessing: image_size in pixels, crop (cut the middle out, or take the whole picture), mean and std in [0, 1];
    ImageNet's for a file that does not say. Raises BadCheckpoint and WrongUse.
    """
    state = main.load_checkpoint(path)
    weights = main.weights_of(state, path)
    last = weights.get(vgg.LAST_LAYER + '.weight')
    arch = vgg.architecture(weights)
    if arch is None or last is None:
        raise WrongUse('{}: holds weights, but not those of a VGG'.format(path))
    names = [str(name) for name in state.get('classes') or range(len(last))]
    if names_file:
        names = read_names(names_file)
    if len(names) != len(last):
        raise WrongUse('{} has {} names of classes, the network {} classes'.format(names_file or path, len(names), len(last)))
    network = vgg.VGG(arch, len(last))
    main.load_weights(network, weights, path)
    return network.eval(), names, state.get('preprocessing') or IMAGENET


def read_names(path):
    try:
        with open(path, encoding='utf-8') as file:
            return file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise WrongUse('--classes {}: {}'.format(path, getattr(error, 'strerror', None) or 'not a text in UTF-8'))


def find_pictures(paths):
    """The files among the paths, and those in the folders among them, in order."""
    found = []
    for path in paths:
        if os.path.isdir(path):
            inside = sorted(os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names
                            if name.lower().endswith(images.EXTENSIONS))
            if not inside:
                raise WrongUse('{}: no pictures in it ({})'.format(path, ' '.join(images.EXTENSIONS)))
            found += inside
        else:
            found.append(path)
    return found


class Preprocessing:
    """From a file to what the network takes. The same values as validation's, by the same code."""

    def __init__(self, values, device):
        self.size, self.view = int(values['image_size']), images.middle if values['crop'] else images.whole
        self.mean, self.std = values['mean'], values['std']
        self.normalise = main.make_normalise(self, device)

    def read(self, path):
        """(S, S, 3) uint8, or the BadImage that says why not."""
        try:
            return torch.from_numpy(self.view(images.read_rgb(path), self.size).copy())
        except Exception as error:  # Pillow's readers raise nearly anything on a damaged file
            return images.BadImage('{}: cannot be read as a picture ({})'.format(images.shown(path), images.reason_of(error)))


def grad_cam(network, pictures):
    """Where the likeliest class of each picture was seen: (N, H, W) in [0, 1], and the logits (N, classes).

    pictures: normalised. H and W are those of the last convolution's maps. Selvaraju et al., arXiv:1610.02391, section 3.
    """
    with torch.no_grad():
        maps = F.relu(network.features[:-2](pictures))  # the last two are max-pool and ReLU, which commute
    with torch.enable_grad():
        logits = network.classify(network.features[-2](maps.requires_grad_()))
        gradients, = torch.autograd.grad(logits.max(1)[0].sum(), maps)
    heat = F.relu((gradients.mean((2, 3), keepdim=True) * maps.detach()).sum(1))
    return heat / heat.flatten(1).max(1)[0].clamp(min=1e-12).view(-1, 1, 1), logits.detach()


def draw_heatmaps(rows, path):
    """A sheet of picture, heatmap and answers. rows: (path, (S, S, 3) uint8, (H, W), answers). Raises WrongUse."""
    try:
        import matplotlib
    except ImportError:
        raise WrongUse('--heatmap needs matplotlib: pip install matplotlib')
    matplotlib.use('Agg')
    from matplotlib import font_manager, pyplot
    installed = {font.name for font in font_manager.fontManager.ttflist}
    chinese = {'Noto Sans CJK SC', 'Source Han Sans SC', 'WenQuanYi Micro Hei', 'Microsoft YaHei', 'PingFang SC', 'SimHei'}
    pyplot.rcParams['font.family'] = ['DejaVu Sans'] + sorted(chinese & installed)
    figure, axes = pyplot.subplots(len(rows), 3, figsize=(9.6, 2.9 * len(rows)), squeeze=False, constrained_layout=True,
                                   gridspec_kw={'width_ratios': [1, 1, 1.2]})
    for (left, middle, right), (name, picture, heat, answers) in zip(axes, rows):
        side = len(picture)
        left.imshow(picture)
        left.set_title(os.path.basename(name)[-32:], loc='left', fontsize=9)
        middle.imshow(picture)
        smooth = F.interpolate(heat[None, None], (side, side), mode='bilinear', align_corners=False)[0, 0].numpy()
        overlay = pyplot.get_cmap('jet')(smooth)
        overlay[..., 3] = 0.55 * smooth ** 0.5  # what played no part stays as it is
        middle.imshow(overlay)
        middle.set_title('where: {}'.format(answers[0]['class'])[:40], loc='left', fontsize=9)
        left.axis('off'), middle.axis('off')
        bars = right.barh(range(len(answers)), [answer['probability'] for answer in answers], color='#4c78a8', height=0.5)
        for bar, answer in zip(bars, answers):
            right.text(0, bar.get_y() - 0.08, '{}  {:.1f} %'.format(answer['class'][:34], 100 * answer['probability']),
                       fontsize=8, va='bottom')
        right.set_xlim(0, 1), right.set_ylim(len(answers) - 0.4, -0.9)
        right.axis('off')
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise WrongUse('--heatmap {}: {}'.format(path, error))
    pyplot.close(figure)


def write_answer(args, log, path, answers):
    """Say one picture's answers, in the shape that was asked for."""
    if args.json:
        log.line(json.dumps({'picture': path, 'answers': answers}, ensure_ascii=False))
    elif args.csv:
        text = io.StringIO()
        csv.writer(text, lineterminator='\n').writerows(
            [path, rank, answer['class'], '{:.6f}'.format(answer['probability'])] for rank, answer in enumerate(answers, 1))
        log.line(text.getvalue().rstrip('\n'))
    else:
        log.line('\n'.join([path] + ['  {}  {:6.2f} %  {}'.format(rank, 100 * answer['probability'], answer['class'])
                                     for rank, answer in enumerate(answers, 1)]))


def predict(args):
    """Answer for every picture. Returns the exit code: 2 where some could not be read, 0 otherwise."""
    paths = find_pictures(args.pictures)
    if args.heatmap and len(paths) > MOST_ROWS:
        raise WrongUse('--heatmap: {} pictures are too many for one sheet, the most are {}'.format(len(paths), MOST_ROWS))
    flags = main.parse_args(['--device', args.device, '--gpu', '0'])
    accelerator.choose(flags)
    device = accelerator.Accelerator(flags, 0, processes=1)
    network, names, preprocessing = open_network(args.checkpoint, args.classes)
    network, _ = device.place(network.requires_grad_(False))
    preprocessing = Preprocessing(preprocessing, device)
    log, code, rows = Log(None, speaks=True, writes=False), 0, []
    if args.csv:
        log.line('picture,rank,class,probability')
    with ThreadPoolExecutor() as pool, torch.no_grad(), log.progress(len(paths), 0, 'Pictures'):
        for first in range(0, len(paths), BATCH):
            batch = paths[first:first + BATCH]
            read = list(zip(batch, pool.map(preprocessing.read, batch)))
            for path, bad in read:
                if isinstance(bad, images.BadImage):
                    print('predict.py: error: {}'.format(bad), file=sys.stderr)
                    code = 2
            good = [(path, picture) for path, picture in read if not isinstance(picture, images.BadImage)]
            if good:
                pictures = preprocessing.normalise(torch.stack([picture for _, picture in good]))
                heat, logits = grad_cam(network, pictures) if args.heatmap else ([None] * len(good), network(pictures))
                probabilities, classes = logits.softmax(1).topk(min(5, len(names)))
                for (path, picture), where, *top in zip(good, heat, probabilities.tolist(), classes.tolist()):
                    answers = [{'class': names[number], 'probability': probability} for probability, number in zip(*top)]
                    write_answer(args, log, path, answers)
                    rows.append((path, picture, where, answers) if args.heatmap else None)
            log.tick(len(batch))
    if args.heatmap and rows:
        draw_heatmaps([(path, picture, where.cpu(), answers) for path, picture, where, answers in rows], args.heatmap)
    return code


if __name__ == '__main__':
    sys.stdout.reconfigure(errors='surrogateescape')  # a path is bytes, and may be no text
    try:
        sys.exit(predict(parse_args()))
    except main.USER_ERRORS as error:
        print('predict.py: error: {}'.format(error), file=sys.stderr)
        sys.exit(2)
