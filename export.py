# SPDX-License-Identifier: BSD-3-Clause
"""Write the network of a checkpoint as ONNX, from bytes of pictures to probabilities.

    python export.py --checkpoint model_best.pth.tar --output vgg16.onnx

Input `pictures`: (N, S, S, 3) uint8, RGB, any N. Outputs `logits` and `probabilities`: (N, classes) float32. Normalisation
is inside; the names of the classes and S are in the file's metadata. The file is kept only where onnxruntime computes what
torch computes.
"""
import json
import os
import sys
import warnings

import accelerator
import torch

import main
from main import WrongUse
from predict import open_network

TOLERANCE = 1e-4  # of logits and probabilities, absolute
OPSET = 11        # the oldest that says all of it; Ascend's atc and every onnxruntime of today read it


class Differs(Exception):
    """The exported file computes something else; the text says how far apart. Exit code 1."""


class FromBytes(torch.nn.Module):
    """(N, S, S, 3) uint8 to logits and probabilities, both (N, classes)."""

    def __init__(self, network, mean, std):
        super().__init__()
        self.network = network
        self.mean, self.std = (torch.tensor(values).view(1, 3, 1, 1) * 255 for values in (mean, std))

    def forward(self, pictures):
        logits = self.network((pictures.permute(0, 3, 1, 2).float() - self.mean) / self.std)
        return logits, logits.softmax(1)


def parse_args(argv=None):
    parser = main.Parser('export.py', description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument('--checkpoint', metavar='FILE', required=True, help="main.py's, ModelZoo's or torchvision's")
    parser.add_argument('--output', metavar='FILE', default='vgg16.onnx', help='(default: %(default)s)')
    parser.add_argument('--classes', metavar='FILE', help='names of the classes, one a line, in the order of their numbers '
                        '(default: those in the checkpoint, else the numbers)')
    return parser.parse_args(argv)


def export(args):
    """Write and check args.output. Raises WrongUse, BadCheckpoint, Differs."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise WrongUse('{} is missing: pip install onnx onnxruntime'.format(error.name))
    network, names, preprocessing = open_network(args.checkpoint, args.classes)
    model = FromBytes(network.requires_grad_(False), preprocessing['mean'], preprocessing['std']).eval()
    size, temporary = int(preprocessing['image_size']), args.output + '.tmp'
    rng = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (5, size, size, 3), generator=rng).byte()
    try:
        write(model, pictures[:2], temporary)
        content = onnx.load(temporary)
        for key, value in (('classes', json.dumps(names)), ('image_size', str(size)),
                           ('crop', str(int(preprocessing['crop'])))):
            content.metadata_props.add(key=key, value=value)
        onnx.checker.check_model(content)
        onnx.save(content, temporary)
        session = onnxruntime.InferenceSession(temporary, providers=['CPUExecutionProvider'])
        apart = max(difference(session, model, batch) for batch in (pictures[:1], pictures))
        if not apart <= TOLERANCE:
            raise Differs('onnxruntime and torch are {:.1e} apart, more than {:.0e}: {} is not written'.format(
                apart, TOLERANCE, args.output))
        os.replace(temporary, args.output)
    except OSError as error:
        raise WrongUse('--output {}: {}'.format(args.output, error.strerror or error))
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    print('{}: {} classes, {} pixels a side, at most {:.1e} from torch (onnxruntime {})'.format(
        args.output, len(names), size, apart, onnxruntime.__version__))


def write(model, example, path):
    """Trace the model into an ONNX file whose first dimension is free."""
    names = ['pictures', 'logits', 'probabilities']
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # the tracer's: sizes become constants, as they should
        torch.onnx.export(model, (example,), path, input_names=names[:1], output_names=names[1:], opset_version=OPSET,
                          dynamic_axes={name: {0: 'N'} for name in names}, **accelerator.tracing_exporter())


def difference(session, model, pictures):
    """How far apart onnxruntime and torch are at most, over logits and probabilities."""
    theirs = session.run(None, {'pictures': pictures.numpy()})
    with torch.no_grad():
        return max((torch.from_numpy(their) - our).abs().max().item() for their, our in zip(theirs, model(pictures)))


if __name__ == '__main__':
    try:
        export(parse_args())
    except (Differs,) + main.USER_ERRORS as error:
        print('export.py: error: {}'.format(error), file=sys.stderr)
        sys.exit(1 if isinstance(error, Differs) else 2)
