# SPDX-License-Identifier: BSD-3-Clause
"""From files to uint8 batches: a folder of pictures, CIFAR-10, or the embedded digits.

Three sources (`Folder`, and `Arrays` made by `read_cifar10` and `read_digits`) give single pictures; `Dataset` makes
batches of them; `Batches` says which images those are; `Index` keeps the files of a folder. Nothing here needs torch.

The order is fixed by (seed, epoch) alone, and the augmentation by (seed, epoch, index of the image), so neither depends
on the number of processes or workers, and any run can be continued in the middle of an epoch.
"""
import contextlib
import functools
import hashlib
import io
import json
import math
import os
import pickle
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

try:
    import simplejpeg  # decodes faster than Pillow; its pixels are current Pillow's
except ImportError:
    simplejpeg = None

INDEX_FORMAT = 1  # a part of the name of a cached index: raise it where _scan finds other files, or the layout changes
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


def reseed(rng, seed, epoch, index):
    """Turn a RandomState to the numbers of one image in one epoch: 7 µs, where making a new one takes 75."""
    rng.seed([seed, epoch, index])
    return rng


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

    allocate(shape): what the images are put into, an array or what np.asarray takes for one without a copy.

    A picture that cannot be read is returned as a BadImage in place of the batch: raised in a loader worker it would
    arrive as text.
    """

    def __init__(self, source, *, size, training, seed=0, allocate=functools.partial(np.empty, dtype=np.uint8)):
        self.source, self.size, self.training, self.seed, self.allocate = source, size, training, seed, allocate
        self.rng = np.random.RandomState()

    def __getitem__(self, request):
        epoch, indices = request
        images = self.allocate((len(indices), self.size, self.size, 3))
        try:
            for image, index in zip(np.asarray(images), indices):
                if self.training:
                    image[...] = self.source.training_picture(index, self.size, reseed(self.rng, self.seed, epoch, index))
                else:
                    image[...] = self.source.validation_picture(index, self.size)
        except BadImage as error:
            return error
        return images, np.asarray(self.source.labels[indices])


# --- a folder of pictures ---------------------------------------------------------------------------------------------

class Folder:
    """ROOT/class/**/picture, read as torchvision's ImageFolder reads it: the same classes, files and order.

    resize(picture (H, W, 3), box, size, flip): how a decoded JPEG is cropped, resized and mirrored; None: by Pillow.
    decode_box(content, box, shrink): what decodes a part of a JPEG at 1/shrink of its size; None, or where it returns None:
    all of it is decoded.
    check: None, or what leaves unreadable pictures out; see `Index.open`.

    Raises BadData for a missing folder, none or an empty class.
    """

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, in [0, 1]
    default_size = 224
    crop = True  # whether validation_picture cuts the middle out, or takes the whole picture

    def __init__(self, root, *, resize=None, decode_box=None, check=None):
        self.resize, self.decode_box = resize or resize_by_pillow, decode_box
        self.index = Index.open(root, check)
        self.classes, self.labels, self.fingerprint = self.index.classes, self.index.labels, self.index.fingerprint
        self.bad = [(shown(os.path.join(root, name)), reason) for name, reason in self.index.bad]

    def __len__(self):
        return len(self.labels)

    def path(self, index):
        return self.index.path(index)

    def training_picture(self, index, size, rng):
        """(size, size, 3) uint8: random resized crop (Szegedy et al., arXiv:1409.4842), mirrored half the time."""
        with self._named(index) as path:
            with open(path, 'rb', buffering=0) as file:
                content = file.read()
            image, shape = None, simplejpeg and _jpeg_shape(content)
            if not shape:
                image = open_picture(io.BytesIO(content))
                shape = image.size
            box, flip = random_crop_box(shape[0], shape[1], rng), rng.random_sample() < 0.5
            # JPEGs are decoded at 1/2, 1/4 or 1/8 where the crop is at least twice the output.
            shrink = 1
            while shrink < 8 and min(box[2] - box[0], box[3] - box[1]) >= 2 * shrink * size:
                shrink *= 2
            if image is None:
                small = [int(round(edge / shrink)) for edge in box]
                picture = self.decode_box and self.decode_box(content, small, shrink)
                if picture is not None:
                    return self.resize(picture, (0, 0, picture.shape[1], picture.shape[0]), size, flip)
                try:
                    picture = simplejpeg.decode_jpeg(content, 'RGB', min_height=-(-shape[1] // shrink),
                                                     min_width=-(-shape[0] // shrink))
                    return self.resize(picture, small, size, flip)
                except ValueError:  # Pillow reads more kinds of file, and says what is wrong
                    image = open_picture(io.BytesIO(content))
            if shrink > 1:
                image.draft(None, (shape[0] // shrink, shape[1] // shrink))  # another format than JPEG ignores it
            across, down = image.width / shape[0], image.height / shape[1]
            return resize_by_pillow(to_rgb(image), (box[0] * across, box[1] * down, box[2] * across, box[3] * down), size, flip)

    def validation_picture(self, index, size):
        """(size, size, 3) uint8: torchvision's Resize(round(size·256/224)) and CenterCrop(size), bit for bit."""
        with self._named(index) as path:
            image = read_rgb(path)
        return middle(image, size)

    @contextlib.contextmanager
    def _named(self, index):
        """The path of a picture, within which whatever its reader raises becomes a BadImage that names it."""
        path = self.path(index)
        try:
            yield path
        except Exception as error:  # Pillow's readers raise nearly anything on a damaged file
            raise BadImage('{}: cannot be read as a picture ({}); --bad-images skip leaves such files out'.format(
                shown(path), reason_of(error)))


def middle(image, size):
    """(size, size, 3) uint8: Resize(round(size·256/224)) and CenterCrop(size) of an RGB Pillow image, as torchvision's."""
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


def whole(image, size):
    """(size, size, 3) uint8: all of an RGB Pillow image, as CIFAR-10 and the digits are validated."""
    return _resized(np.asarray(image), size)


def resize_by_pillow(picture, box, size, flip):
    """A box (left, top, right, bottom) of a Pillow image or a (H, W, 3) uint8 array, resized to (size, size, 3) uint8."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image = image.resize((size, size), BILINEAR, box=box)
    return np.asarray(image.transpose(Image.FLIP_LEFT_RIGHT) if flip else image)


def shown(path):
    """A path as one line of valid text."""
    return os.fsencode(path).decode('utf-8', 'backslashreplace').replace('\n', '\\n')


def reason_of(error):
    return getattr(error, 'strerror', None) or str(error).partition('<')[0].replace('\n', ' ').strip() or type(error).__name__


def _jpeg_shape(content):
    """(width, height) of a JPEG that simplejpeg can give in RGB, else None."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    return (width, height) if colorspace in ('YCbCr', 'Gray') and width * height <= MAX_PIXELS else None


class Index:
    """The pictures of a folder, their classes and labels, in three arrays that are read from a file as they are needed.

    A list of ImageNet's 1.28 million paths would be 150 MB in every process, and loader workers would copy it page by
    page as reference counts change. The file is in the user's cache folder, and so a later start need not scan again.

    classes: names. labels: (N,) int64. fingerprint: of names and labels. bad: [name, reason] of the pictures left out.
    """

    def __init__(self, root, header, offsets, labels, names):
        self.root, self.labels, self._offsets, self._names = os.fsencode(root), labels, offsets, names
        self.classes, self.fingerprint, self.bad = header['classes'], header['fingerprint'], header['bad']

    def path(self, index):
        name = self._names[self._offsets[index]:self._offsets[index + 1]].tobytes()
        return os.fsdecode(os.path.join(self.root, name))

    @classmethod
    def open(cls, root, check=None):
        """The index of a folder: the cached one where its folders have not changed since, else by a scan.

        check(verdicts, count), where given, passes on an iterator that reads each picture of a new index once, with a
        progress bar, say; the unreadable ones are left out. Raises BadData.
        """
        path = _cache_path(root, checked=check is not None)
        index = cls._load(path, root)
        if index is None:
            begin = time.time()
            try:
                folders, classes, names, labels = _scan(root)
            except OSError as error:
                raise BadData('{}: {}'.format(shown(error.filename or root), error.strerror))
            bad = _unreadable(root, names, check) if check is not None else {}
            parts = cls._build(root, folders, classes, names, labels, bad, begin)
            del names, labels
            index = cls(root, *parts)
            with contextlib.suppress(OSError):  # no place to keep it: the next start scans again
                _write_index(path, *parts)
                index = cls._load(path, root) or index
        return index

    @staticmethod
    def _build(root, folders, classes, names, labels, bad, begin):
        """(header, offsets, labels, names) of the pictures that are not `bad` {position: reason}."""
        names_of_bad = [[os.fsdecode(names[position]), bad[position]] for position in bad]
        # A bad file that is mended keeps its folder's time of change, and so its own is kept beside it.
        stamps = [_stamp(os.path.join(os.fsencode(root), names[position])) for position in bad]
        if bad:
            names, labels = zip(*[pair for position, pair in enumerate(zip(names, labels)) if position not in bad]) \
                if len(bad) < len(names) else ((), ())
        labels = np.array(labels, np.int64)
        for label in np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0):
            raise BadData('{}: {} in it ({})'.format(shown(os.path.join(root, classes[label])),
                                                     'no readable picture' if bad else 'no pictures', ' '.join(EXTENSIONS)))
        offsets = np.cumsum([0] + [len(name) for name in names], dtype=np.int64)
        joined = np.frombuffer(b''.join(names), np.uint8)
        digest = hashlib.sha256(joined.tobytes() + offsets.tobytes() + labels.tobytes()).hexdigest()
        header = {'root': os.path.realpath(root), 'scanned': begin, 'folders': folders, 'classes': classes, 'bad': names_of_bad,
                  'stamps': stamps, 'fingerprint': digest, 'count': len(labels), 'bytes': len(joined)}
        return header, offsets, labels, joined

    @classmethod
    def _load(cls, path, root):
        """The index in a file, or None where there is none that holds."""
        def stamp_of(name):
            return _stamp(os.path.join(os.fsencode(root), os.fsencode(name)))

        try:
            with open(path, 'rb') as file:
                line = file.readline()
            header = json.loads(line.decode())
            # A folder that changed within two seconds of the scan may have changed again without another time of change.
            if header['root'] != os.path.realpath(root) or any(
                    stamp_of(name)[0] != changed or changed > (header['scanned'] - 2) * 1e9
                    for name, changed in header['folders']):
                return None
            if any(stamp_of(name) != stamp for (name, _), stamp in zip(header['bad'], header['stamps'])):
                return None
            content = np.memmap(path, np.uint8, 'r')[len(line):]
            if len(content) != 16 * header['count'] + 8 + header['bytes']:
                return None
            offsets, labels, names = np.split(content, [header['count'] * 8 + 8, header['count'] * 16 + 8])
        except (OSError, ValueError, KeyError):
            return None
        return cls(root, header, offsets.view(np.int64), labels.view(np.int64), names)


def cache_folder():
    """The user's cache folder for this program, which need not exist."""
    return os.path.join(os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache'), 'vgg16')


def _cache_path(root, checked):
    """The file that keeps the index of a folder, in the user's cache folder and never among the data."""
    name = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:24]
    return os.path.join(cache_folder(), '{}{}.index{}'.format(name, '-checked' if checked else '', INDEX_FORMAT))


def _write_index(path, header, offsets, labels, names):
    """One line of JSON, padded to a multiple of 8 bytes, and the arrays."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    line = json.dumps(header).encode()
    line += b' ' * (-(len(line) + 1) % 8) + b'\n'
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path))
    try:
        with os.fdopen(handle, 'wb') as file:
            for part in (line, offsets, labels, names):
                file.write(part)
        os.replace(temporary, path)
    except BaseException:
        os.remove(temporary)
        raise


def _stamp(path):
    """[time of change in ns, size], or [0, 0] where there is nothing."""
    try:
        status = os.stat(path)
    except OSError:
        return [0, 0]
    return [status.st_mtime_ns, status.st_size]


def _scan(root):
    """Walk a folder. Returns ([[folder, time of change in ns]], classes, names relative to root as bytes, labels)."""
    folders = [['', _stamp(root)[0]]]
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if not classes:
        raise BadData('{}: no classes in it (one folder each is expected)'.format(shown(root)))
    names, labels = [], []
    for label, name in enumerate(classes):
        pictures = _walk(os.fsencode(root), os.fsencode(name), folders)
        names += pictures
        labels += [label] * len(pictures)
    return folders, classes, names, labels


def _walk(root, name, folders):
    """The pictures below root/name as paths relative to root, in the order of sorted(os.walk) and sorted names.

    Links are followed, as torchvision does, but into each folder once, so that a loop of links ends. Notes each folder and
    its time of change in `folders`.
    """
    found, todo, seen = [], [name], set()
    while todo:
        folder = todo.pop()
        status = os.stat(os.path.join(root, folder))
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.append([os.fsdecode(folder), status.st_mtime_ns])
        pictures = []
        for entry in sorted(os.scandir(os.path.join(root, folder)), key=lambda entry: entry.name):
            if entry.is_dir():
                todo.append(os.path.join(folder, entry.name))
            elif os.fsdecode(entry.name).lower().endswith(EXTENSIONS):
                pictures.append(os.path.join(folder, entry.name))
        found.append((os.fsdecode(folder), sorted(pictures, key=os.fsdecode)))
    return [picture for _, pictures in sorted(found) for picture in pictures]


def _unreadable(root, names, check):
    """Read each picture once, in a thread for each core. Returns {position: reason} of those that cannot be read."""
    def read(first):
        reasons = []
        for name in names[first:first + 64]:
            try:
                read_rgb(os.path.join(os.fsencode(root), name))
                reasons.append(None)
            except Exception as error:  # Pillow's readers raise nearly anything on a damaged file
                reasons.append(reason_of(error))
        return reasons

    with ThreadPoolExecutor(os.cpu_count()) as threads:  # Pillow decodes without Python's lock
        verdicts = (reason for reasons in threads.map(read, range(0, len(names), 64)) for reason in reasons)
        return {position: reason for position, reason in enumerate(check(verdicts, len(names))) if reason is not None}


def read_rgb(path):
    """A file as an RGB Pillow image; see `open_picture` and `to_rgb`."""
    with open(path, 'rb') as file:
        return to_rgb(open_picture(file))


def open_picture(file):
    """A Pillow image that is not decoded yet.

    Raises whatever Pillow raises, and ValueError for a header that claims more than MAX_PIXELS.
    """
    image = Image.open(file)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError('its header claims {} × {} pixels'.format(image.width, image.height))
    return image


def to_rgb(image):
    """Converted as torchvision's loader does; 16 bits become 8 by their upper byte. Raises whatever Pillow raises."""
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
    bad = ()
    crop = False

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
