"""Images in a folder: which files are images, which folders are classes, and which are parts of a data set."""
import collections
import logging
import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from experiments.dlc.data.decode import SUFFIXES, Decoding, Unreadable, decode_image
from experiments.dlc.data.images import ImageSource, digest, split_rows
from experiments.dlc.data.printable import printable

log = logging.getLogger(__name__)

TRAIN_FOLDERS = ('train', 'training')
HELDOUT_FOLDERS = ('heldout', 'val', 'valid', 'validation', 'test', 'testing', 'dev', 'eval')  # the first is read
LAYOUTS = ('auto', 'classes', 'splits')
# Folders that operating systems and storage boxes make; hidden ones begin with a dot.
SYSTEM_FOLDERS = ('__macosx', '@eadir', '#recycle', '$recycle.bin', 'system volume information', 'lost+found')
# Images that are not decoded here, and are not to go missing without a word.
OTHER_IMAGES = ('.avif', '.heic', '.heif', '.jp2', '.j2k', '.jxl', '.svg', '.ico', '.tga', '.pcx', '.psd', '.eps',
                '.exr', '.hdr', '.dng', '.cr2', '.nef', '.arw', '.npy', '.zip', '.tar', '.gz')


# ---- Listing -------------------------------------------------------------------------------------------------------

def list_images(root: pathlib.Path) -> list[str]:
    """Image files below `root`, relative to it, in order; what is left out is counted and logged.

    Left out are hidden and system files and folders, links that lead back to a folder they lie in, what is no regular
    file, and images of formats that are not read.
    """
    left_out: dict[str, list[str]] = collections.defaultdict(list)
    files = sorted(_walk(os.fspath(root), '', (_identity(root),), left_out))
    for reason, names in left_out.items():
        log.warning('data.path=%s: left out %d %s (the first: %s)', printable(str(root)), len(names), reason,
                    printable(names[0]))
    return files


def _identity(path: str | os.PathLike) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _walk(folder: str, prefix: str, above: tuple[tuple[int, int], ...],
          left_out: dict[str, list[str]]) -> Iterator[str]:
    """Image files of `folder` and below; `above`: the folders on the way down, to see a link that leads back."""
    with os.scandir(folder) as entries:
        entries = sorted(entries, key=lambda entry: entry.name)
    for entry in entries:
        name = prefix + entry.name
        if is_junk(entry.name):
            if entry.is_dir(follow_symlinks=False) or entry.name.lower().endswith(SUFFIXES):
                left_out['hidden or system file(s) or folder(s)'].append(name)
        elif entry.is_dir():
            here = _identity(entry.path)
            if here in above:
                left_out['link(s) to a folder they lie in'].append(name)
            else:
                yield from _walk(entry.path, name + os.sep, (*above, here), left_out)
        elif entry.name.lower().endswith(SUFFIXES):
            if entry.is_file() or entry.is_symlink() and not os.path.exists(entry.path):  # a broken link is unreadable
                yield name
            else:
                left_out['pipe(s) or device(s)'].append(name)
        elif entry.name.lower().endswith(OTHER_IMAGES):
            left_out[f'file(s) of a format that is not read here (read are {", ".join(SUFFIXES)})'].append(name)


def is_junk(name: str) -> bool:
    """Whether a file or folder of this name was made by a system, not by whoever made the data set."""
    return name.startswith('.') or name.lower() in SYSTEM_FOLDERS


class FolderImages(ImageSource):
    """Image files below a folder: its folders are the classes, or all files are one class where it has none.

    `class_names` numbers the classes where another folder (of the training images) decides.

    Raises:
        FileNotFoundError: no such folder, or no image below it.
        ValueError: images and folders of images side by side, or a class that `class_names` does not have.
    """

    def __init__(self, root: pathlib.Path, *, decoding: Decoding = Decoding(), image_size: int = 0, split: str = 'all',
                 heldout: float = 0.1, seed: int = 0, class_names: Sequence[str] | None = None):
        if not root.is_dir():
            raise FileNotFoundError(f'data.path={root}: no such folder')
        files = list_images(root)
        if not files:
            raise FileNotFoundError(f'data.path={root}: no {", ".join(SUFFIXES)} file below it')
        classes = [file.split(os.sep)[0] if os.sep in file else '' for file in files]
        names, labels = np.unique(classes, return_inverse=True)
        if '' in names and len(names) > 1:
            raise ValueError(f'data.path={root}: holds both images and folders of images; move the images, such as '
                             f'{printable(files[classes.index("")])}, into a class folder')
        if class_names is not None:
            if '' in names and len(class_names) > 1:
                raise ValueError(f'data.path={root}: its images lie in no class folders, but the training images have '
                                 f'{len(class_names)} classes; sort them into class folders, or give this folder alone')
            if '' not in names and (unknown := sorted(set(names) - set(class_names))):
                raise ValueError(f'data.path={root}: class {printable(unknown[0])} has no training images')
            numbers = {name: number for number, name in enumerate(class_names)} | {'': 0}
            labels = np.array([numbers[name] for name in names])[labels]
        elif '' in names:
            class_names = (root.name,)
        super().__init__(tuple(names) if class_names is None else class_names, image_size)
        _warn_of_inner_splits(root, files)
        rows = split_rows(labels, split, heldout, seed)
        self.held_back = len(labels) - len(rows)
        # As bytes in one array: a million str objects would be pickled to every worker.
        self._root, self._decoding = root, decoding
        self._files, self.labels = np.array([os.fsencode(files[i]) for i in rows]), labels[rows].astype(np.int32)

    def __len__(self) -> int:
        return len(self._files)

    def name(self, i: int) -> str:
        return os.fsdecode(self._files[i])

    @property
    def root(self) -> pathlib.Path:
        """Names are relative to it."""
        return self._root

    def read(self, i: int) -> tuple[np.ndarray | int | str, ...]:
        try:
            image, notes = decode_image(os.fspath(self._root / self.name(i)), self._decoding)
        except FileNotFoundError:
            raise Unreadable('no such file') from None
        return image, self.labels[i], *notes

    def digest(self) -> str:
        """Of names, labels and file sizes."""
        def size(file: bytes) -> int:
            try:
                return os.stat(os.path.join(os.fsencode(self._root), file)).st_size
            except OSError:
                return -1
        sizes = np.array([size(file) for file in self._files], np.int64)
        return digest([super().digest().encode(), self.labels.tobytes(), sizes.tobytes()])


def _warn_of_inner_splits(root: pathlib.Path, files: Sequence[str]) -> None:
    """Logs a warning where class folders hold train and test folders of their own: they are read as one set."""
    inner = {part for file in files if len(parts := file.split(os.sep)) > 2 and (part := parts[1].lower())}
    if inner & set(TRAIN_FOLDERS) and inner & set(HELDOUT_FOLDERS):
        names = ', '.join(sorted(inner & {*TRAIN_FOLDERS, *HELDOUT_FOLDERS}))
        log.warning('data.path=%s: class folders hold folders called %s, which are read as one set; to tell them '
                    'apart, put the classes below train/ and the like', root, names)


# ---- Layouts -------------------------------------------------------------------------------------------------------

def folder(path: str, split: str, *, layout: str = 'auto', heldout: float = 0.1, seed: int = 0,
           decoding: Decoding = Decoding(), image_size: int = 0) -> FolderImages:
    """Images of one split of the folder `path`.

    With the layout 'splits' they lie in `path`/train, and `path`/val or the like where the data set has its own
    held-out images; without such a folder, a share `heldout` of each class is kept apart. With 'classes' every folder
    of `path` is a class, whatever its name, or `path` holds the images themselves. 'auto' tells them apart, and raises
    where it cannot.

    Raises:
        FileNotFoundError, ValueError: no such folder, no such split, or a layout that 'auto' cannot tell.
    """
    if layout not in LAYOUTS:
        raise ValueError(f'data.layout={layout!r} is not one of {LAYOUTS}')
    root, shape = pathlib.Path(path).expanduser(), dict(decoding=decoding, image_size=image_size)
    if not root.is_dir():
        raise FileNotFoundError(f'data.path={root}: no such folder')
    parts = split_folders(root, layout)
    if not parts:
        return FolderImages(root, **shape, split=split, heldout=heldout, seed=seed)
    train = next((parts[name] for name in TRAIN_FOLDERS if name in parts), None)
    apart = [parts[name] for name in HELDOUT_FOLDERS if name in parts]
    if train is None:
        raise ValueError(f"data.path={root}: has the folder(s) {', '.join(parts)} but no 'train'; point data.path at "
                         "one of them, or set data.layout='classes' if they are classes")
    if not apart:
        return FolderImages(train, **shape, split=split, heldout=heldout, seed=seed)
    choices = {'train': train, 'heldout': apart[0]} | {name: place for name, place in parts.items()}
    if split not in choices and (root / split).is_dir() and not is_junk(split):
        choices[split] = root / split
    if split not in choices:
        raise ValueError(f"data.split={split!r}: {root} has 'train', 'heldout' ({apart[0].name}) and its folders "
                         f'{", ".join(sorted(parts))}')
    if split == 'heldout' and len(apart) > 1:
        log.warning('data.path=%s: held out are the images in %s; left out: %s, read by naming it as the split', root,
                    apart[0].name, ', '.join(place.name for place in apart[1:]))
    classes = None if choices[split] == train else FolderImages(train, **shape).class_names
    return FolderImages(choices[split], **shape, class_names=classes)


def split_folders(root: pathlib.Path, layout: str) -> dict[str, pathlib.Path]:
    """Name of a split, in lower case, -> its folder in `root`; {} where the folders of `root` are classes.

    Raises:
        ValueError: 'auto', and the folders may be either.
    """
    if layout == 'classes':
        return {}
    with os.scandir(root) as entries:
        inside = sorted(entry.name for entry in entries if entry.is_dir() and not is_junk(entry.name))
    known = {*TRAIN_FOLDERS, *HELDOUT_FOLDERS}
    parts = {name.lower(): root / name for name in inside if name.lower() in known}
    others = [name for name in inside if name.lower() not in known and has_images(root / name)]
    if layout == 'splits' and not parts:
        raise ValueError(f"data.layout='splits': {root} has no folder called {' or '.join(TRAIN_FOLDERS)}")
    if parts and (loose := _loose_images(root)):
        others += [f'{loose} image(s) in no folder']
    if layout == 'splits' or not parts or not others:
        if others and parts:
            _warn_of_others(root, others)
        return parts
    names = f'{", ".join(place.name for place in parts.values())} beside {", ".join(map(printable, others[:3]))}'
    if not any(holds_folders(place) for place in parts.values()):
        log.warning("data.path=%s: the folders %s are read as classes; set data.layout='splits' if they are parts of "
                    'the data set', root, names)
        return {}
    if all(holds_folders(place) for place in parts.values()) and parts.keys() & set(TRAIN_FOLDERS) and len(parts) > 1:
        _warn_of_others(root, others)
        return parts
    raise ValueError(f"data.path={root}: holds {names}; set data.layout='splits' to read only the former, as parts of "
                     "the data set, or data.layout='classes' if every folder is a class")


def _warn_of_others(root: pathlib.Path, others: Sequence[str]) -> None:
    log.warning('data.path=%s: left out are the folders beside train: %s', root, ', '.join(map(printable, others)))


def _loose_images(root: pathlib.Path) -> int:
    """How many image files lie in `root` itself."""
    with os.scandir(root) as entries:
        return sum(entry.name.lower().endswith(SUFFIXES) and not is_junk(entry.name) and entry.is_file()
                   for entry in entries)


def holds_folders(place: pathlib.Path) -> bool:
    """Whether there are folders in `place`, which classes then are."""
    with os.scandir(place) as entries:
        return any(entry.is_dir() and not is_junk(entry.name) for entry in entries)


def has_images(place: pathlib.Path) -> bool:
    """Whether an image lies in `place` or below it."""
    return next(_walk(os.fspath(place), '', (_identity(place),), collections.defaultdict(list)), None) is not None
