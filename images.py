# SPDX-License-Identifier: BSD-3-Clause
"""From files to uint8 batches: a folder of pictures, CIFAR-10, or the embedded digits.

Three sources (`Folder`, and `Arrays` made by `read_cifar10` and `read_digits`) give single pictures; `Dataset` makes
batches of them; `Batches` says which images those are. Nothing here needs torch.

The order is fixed by (seed, epoch) alone, and the augmentation by (seed, epoch, index of the image), so neither depends
on the number of processes or workers, and any run can be continued in the middle of an epoch.
"""
import hashlib
import math
import os
import pickle
import warnings

import numpy as np
from PIL import Image

try:
    import simplejpeg  # decodes a JPEG in half of Pillow's time; its pixels are Pillow's
except ImportError:
    simplejpeg = None

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif', '.tiff', '.webp')  # torchvision's ImageFolder
MAX_PIXELS = 178956970  # where Pillow, too, speaks of a decompression bomb
HERE = os.path.dirname(os.path.abspath(__file__))
BILINEAR = Image.BILINEAR

warnings.simplefilter('ignore', Image.DecompressionBombWarning)  # MAX_PIXELS decides


class BadData(Exception):
    """A data set that cannot be used; the text names the folder or file."""


class BadImage(BadData):
    """A picture that cannot be read; the text names the file."""


# --- order ------------------------------------------------------------------------------------------------------------

def permutation(seed, epoch, count):
    """The global order of an epoch: (count,) int64. MT19937 and its shuffle are frozen in NumPy, so versions agree."""
    return np.random.RandomState([seed, epoch]).permutation(count)


def generator(seed, epoch, index):
    """The random numbers of one image in one epoch; 5 µs."""
    return np.random.RandomState([seed, epoch, index])


class Batches:
    """The requests that one process makes of a Dataset: (epoch, indices).

    Training (`shuffle`): rank r takes its slice of each global batch, an incomplete last one is dropped, and the stream
    goes on over the ends of epochs up to `epochs`, so that loader workers never stop. Validation: every image once, in
    order; all ranks make the same number of requests, the last ones short or empty.

    local_batch: images of a request. accum_steps: requests a step. start: (epoch, step) of the first one.
    """

    def __init__(self, count, local_batch, *, rank, world_size, shuffle, accum_steps=1, seed=0, epochs=1, start=(0, 0)):
        self.count, self.local_batch, self.rank, self.world_size = count, local_batch, rank, world_size
        self.shuffle, self.accum_steps, self.seed, self.epochs, self.start = shuffle, accum_steps, seed, epochs, start
        step_batch = local_batch * world_size * accum_steps
        self.steps_per_epoch = count // step_batch if shuffle else -(-count // step_batch)

    def __iter__(self):
        epoch, step = self.start
        while epoch < self.epochs:
            order = permutation(self.seed, epoch, self.count) if self.shuffle else np.arange(self.count)
            for part in range(step * self.accum_steps, self.steps_per_epoch * self.accum_steps):
                first = (part * self.world_size + self.rank) * self.local_batch
                yield epoch, order[first:first + self.local_batch]
            epoch, step = epoch + 1, 0


class Dataset:
    """Batches of a source: `dataset[epoch, indices]` is (images (n, S, S, 3) uint8, labels (n,) int64).

    A picture that cannot be read is returned as a BadImage in place of the batch: raised in a loader worker it would
    arrive as text.
    """

    def __init__(self, source, *, size, training, seed=0):
        self.source, self.size, self.training, self.seed = source, size, training, seed

    def __getitem__(self, request):
        epoch, indices = request
        images = np.empty((len(indices), self.size, self.size, 3), np.uint8)
        try:
            for image, index in zip(images, indices):
                if self.training:
                    image[...] = self.source.training_picture(index, self.size, generator(self.seed, epoch, index))
                else:
                    image[...] = self.source.validation_picture(index, self.size)
        except BadImage as error:
            return error
        return images, self.source.labels[indices]


# --- a folder of pictures ---------------------------------------------------------------------------------------------

class Folder:
    """ROOT/class/**/picture, read as torchvision's ImageFolder reads it: the same classes, files and order.

    The paths are one byte string and offsets into it: a list of 1.28 million str would be 150 MB, and loader workers
    would copy it page by page as reference counts change.

    Raises BadData for a missing folder, none or an empty class.
    """

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, in [0, 1]
    default_size = 224

    def __init__(self, root, resize=None):
        """resize(array (H, W, 3), box, size): how a decoded JPEG is cropped and resized without Pillow; may return None."""
        self.root, self.resize = os.fsencode(root), resize
        try:
            self._index(root)
        except OSError as error:
            raise BadData('{}: {}'.format(error.filename or root, error.strerror))

    def _index(self, root):
        self.classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        if not self.classes:
            raise BadData('{}: no classes in it (one folder each is expected)'.format(root))
        names, labels = [], []
        for label, name in enumerate(self.classes):
            pictures = _walk(self.root, os.fsencode(name))
            if not pictures:
                raise BadData('{}: no pictures in it ({})'.format(os.path.join(root, name), ' '.join(EXTENSIONS)))
            names += pictures
            labels += [label] * len(pictures)
        self.labels = np.array(labels, np.int64)
        self._offsets = np.cumsum([0] + [len(name) for name in names])
        self._names = b''.join(names)
        digest = hashlib.sha256(self._names)
        digest.update(self._offsets.tobytes() + self.labels.tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self):
        return len(self.labels)

    def path(self, index):
        name = self._names[self._offsets[index]:self._offsets[index + 1]]
        return os.fsdecode(os.path.join(self.root, name))

    def training_picture(self, index, size, rng):
        """(size, size, 3) uint8: random resized crop (Szegedy et al., arXiv:1409.4842), flipped half the time."""
        state = rng.get_state()
        picture = self._fast_crop(index, size, rng)
        if picture is None:
            rng.set_state(state)
            image = self._open(index)
            box = random_crop_box(image.width, image.height, rng)
            picture = np.asarray(image.resize((size, size), BILINEAR, box=box))
        return picture[:, ::-1] if rng.random_sample() < 0.5 else picture

    def _fast_crop(self, index, size, rng):
        """A random resized crop by simplejpeg and `resize`; None where either is missing or refuses the file."""
        if simplejpeg is None or self.resize is None:
            return None
        try:
            with open(self.path(index), 'rb') as file:
                content = file.read()
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(content)
            if colorspace not in ('YCbCr', 'Gray') or width * height > MAX_PIXELS:
                return None
            box = random_crop_box(width, height, rng)
            # Decode at 1/2, 1/4 or 1/8 where the crop is at least twice the output.
            shrink = 1
            while shrink < 8 and min(box[2] - box[0], box[3] - box[1]) >= 2 * shrink * size:
                shrink *= 2
            picture = simplejpeg.decode_jpeg(content, 'RGB', min_height=-(-height // shrink), min_width=-(-width // shrink))
            return self.resize(picture, [int(round(edge / shrink)) for edge in box], size)
        except (OSError, ValueError, MemoryError):
            return None  # Pillow reads more kinds of file, and names what is wrong

    def validation_picture(self, index, size):
        """(size, size, 3) uint8: torchvision's Resize(round(size·256/224)) and CenterCrop(size), bit for bit."""
        image = self._open(index)
        short = round(size * 256 / 224)
        width, height = image.size
        if width <= height:
            scaled = short, int(short * height / width)
        else:
            scaled = int(short * width / height), short
        if scaled != image.size:
            image = image.resize(scaled, BILINEAR)
        left, top = int(round((scaled[0] - size) / 2.0)), int(round((scaled[1] - size) / 2.0))
        return np.asarray(image.crop((left, top, left + size, top + size)))

    def _open(self, index):
        path = self.path(index)
        try:
            return read_rgb(path)
        except Exception as error:  # Pillow's readers raise nearly anything on a damaged file
            reason = str(error).partition('<')[0].replace('\n', ' ').strip() or type(error).__name__
            raise BadImage('{}: cannot be read as a picture ({})'.format(path, reason))


def _walk(root, name):
    """The pictures below root/name as paths relative to root, in the order of sorted(os.walk) and sorted names.

    Links are followed, as torchvision does, but into each folder once, so that a loop of links ends.
    """
    found, todo, seen = [], [name], set()
    while todo:
        folder = todo.pop()
        status = os.stat(os.path.join(root, folder))
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        pictures = []
        for entry in sorted(os.scandir(os.path.join(root, folder)), key=lambda entry: entry.name):
            if entry.is_dir():
                todo.append(os.path.join(folder, entry.name))
            elif os.fsdecode(entry.name).lower().endswith(EXTENSIONS):
                pictures.append(os.path.join(folder, entry.name))
        found.append((os.fsdecode(folder), sorted(pictures, key=os.fsdecode)))
    return [picture for _, pictures in sorted(found) for picture in pictures]


def read_rgb(path):
    """A file as an RGB Pillow image, converted as torchvision's loader does; 16 bits become 8 by their upper byte.

    Raises whatever Pillow raises, and ValueError for a header that claims more than MAX_PIXELS, before decoding.
    """
    with open(path, 'rb') as file:
        image = Image.open(file)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError('its header claims {} × {} pixels'.format(image.width, image.height))
        if image.mode.startswith('I'):  # Pillow would clip at 255
            return Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8)).convert('RGB')
        return image.convert('RGB')


def random_crop_box(width, height, rng, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """The box (left, top, right, bottom) of torchvision's RandomResizedCrop, in pixels of the picture."""
    area = width * height
    for _ in range(10):
        crop_area = area * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = int(round(math.sqrt(crop_area * aspect))), int(round(math.sqrt(crop_area / aspect)))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w + 1), rng.randint(0, height - h + 1)
            return left, top, left + w, top + h
    # No luck: the largest central box inside the ratios.
    w = min(width, int(round(height * ratio[1])))
    h = min(height, int(round(width / ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


# --- small pictures held in memory ------------------------------------------------------------------------------------

class Arrays:
    """Pictures held as one array. images: (N, 32, 32, 3) uint8; labels: N numbers; flip: mirror half of them."""

    default_size = 32

    def __init__(self, images, labels, classes, *, mean, std, flip):
        self.images, self.labels, self.classes = images, np.asarray(labels, np.int64), list(classes)
        self.mean, self.std, self.flip = mean, std, flip
        self.fingerprint = hashlib.sha256(images.tobytes() + self.labels.tobytes()).hexdigest()

    def __len__(self):
        return len(self.labels)

    def training_picture(self, index, size, rng):
        """(size, size, 3) uint8: padded by 4 black pixels, cropped at random (Lee et al., arXiv:1409.5185)."""
        padded = np.pad(self.images[index], ((4, 4), (4, 4), (0, 0)), 'constant')
        top, left = rng.randint(0, 9, 2)
        picture = padded[top:top + 32, left:left + 32]
        if self.flip and rng.random_sample() < 0.5:
            picture = picture[:, ::-1]
        return _resized(picture, size)

    def validation_picture(self, index, size):
        return _resized(self.images[index], size)


def _resized(picture, size):
    if picture.shape[:2] == (size, size):
        return picture
    return np.asarray(Image.fromarray(np.ascontiguousarray(picture)).resize((size, size), BILINEAR))


CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of its training images
CIFAR10_CLASSES = 'airplane automobile bird cat deer dog frog horse ship truck'.split()


def find_cifar10(root):
    """(folder, binary) where `root` holds CIFAR-10 in its python or binary version, itself or as unpacked; else None."""
    for folder in (root, os.path.join(root, 'cifar-10-batches-py'), os.path.join(root, 'cifar-10-batches-bin')):
        for name, binary in (('test_batch', False), ('test_batch.bin', True)):
            if os.path.isfile(os.path.join(folder, name)):
                return folder, binary
    return None


def read_cifar10(root, *, training):
    """CIFAR-10 from its own files (Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html).

    Raises BadData where a file is missing or not of that format.
    """
    folder, binary = find_cifar10(root)
    names = ['data_batch_{}'.format(number) for number in range(1, 6)] if training else ['test_batch']
    images, labels = [], []
    for name in names:
        path = os.path.join(folder, name + ('.bin' if binary else ''))
        try:
            with open(path, 'rb') as file:
                pixels, numbers = _cifar10_binary(file.read()) if binary else _cifar10_python(file)
        except OSError as error:
            raise BadData('{}: {}'.format(path, error.strerror))
        except Exception as error:  # a damaged pickle raises nearly anything
            raise BadData('{}: not a CIFAR-10 file ({})'.format(path, error))
        images.append(pixels)
        labels.append(numbers)
    planes = np.concatenate(images).reshape(-1, 3, 32, 32)
    return Arrays(np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), np.concatenate(labels), CIFAR10_CLASSES,
                  mean=CIFAR10_MEAN, std=CIFAR10_STD, flip=True)


def _cifar10_binary(content):
    records = np.frombuffer(content, np.uint8).reshape(-1, 1 + 3072)
    return _checked_cifar10(records[:, 1:], records[:, 0])


def _cifar10_python(file):
    record = _ArrayUnpickler(file, encoding='bytes').load()
    return _checked_cifar10(record[b'data'].array, record[b'labels'])


def _checked_cifar10(pixels, labels):
    labels = np.asarray(labels)
    if not len(labels) or pixels.shape != (len(labels), 3072) or labels.min() < 0 or labels.max() > 9:
        raise ValueError('{} pictures, {} labels'.format(pixels.shape, labels.shape))
    return pixels, labels


class _PickledArray:
    """Stands for a numpy array while a pickle is read: takes its bytes and nothing else."""

    def __init__(self, *_):
        self.array = None

    def __setstate__(self, state):
        if isinstance(state, tuple) and len(state) == 5:
            _, shape, _, fortran, content = state
            content = content.encode('latin1') if isinstance(content, str) else content
            self.array = np.frombuffer(content, np.uint8).reshape(shape, order='F' if fortran else 'C')


class _ArrayUnpickler(pickle._Unpickler):
    """Reads a dict of numbers, strings and uint8 arrays. No name in the pickle is imported, so nothing of it runs."""

    ARRAY_NAMES = {('numpy.core.multiarray', '_reconstruct'), ('numpy._core.multiarray', '_reconstruct'),
                   ('numpy', 'ndarray'), ('numpy', 'dtype')}

    def find_class(self, module, name):
        if (module, name) == ('_codecs', 'encode'):  # how protocol 2 of Python 3 writes bytes
            return lambda text, encoding: text.encode('latin1')
        if (module, name) in self.ARRAY_NAMES:
            return _PickledArray
        raise pickle.UnpicklingError('it calls {}.{}'.format(module, name))


DIGITS_MEAN, DIGITS_STD = (0.3053,) * 3, (0.3760,) * 3  # of all 1,797 digits at 8×8


def read_digits(*, training):
    """The embedded 1,797 handwritten digits (data/README.md): every fifth is for validation, the others for training."""
    sheet = np.asarray(Image.open(os.path.join(HERE, 'data', 'digits.png')))  # cells of 8×8, 60 a row
    with open(os.path.join(HERE, 'data', 'digits.txt')) as file:
        labels = np.array([int(digit) for digit in ''.join(file.read().split())])
    cells = sheet.reshape(sheet.shape[0] // 8, 8, 60, 8).transpose(0, 2, 1, 3).reshape(-1, 8, 8)[:len(labels)]
    chosen = (np.arange(len(labels)) % 5 == 4) != training
    images = np.stack([np.asarray(Image.fromarray(cell).convert('RGB').resize((32, 32), BILINEAR))
                       for cell in cells[chosen]])
    return Arrays(images, labels[chosen], '0123456789', mean=DIGITS_MEAN, std=DIGITS_STD, flip=False)
