"""TFDS image data sets through `tfds.data_source`: array_record files, no TensorFlow, no network."""
import difflib
import os
import re
from typing import Any

import numpy as np

from experiments.dlc.data.images import ImageSource, decode_image

OTHER_SOURCES = ('digits', 'fake', 'folder', 'npz')
MIN_FILE_BYTES = 2 ** 16  # of an array_record file: it ends in a footer of that size


class TFDSImages(ImageSource):
    """A prepared TFDS data set with features `image` and, if it has classes, `label`."""

    def __init__(self, name: str, data_dir: str, split: str, *, channels: int = 3, image_size: int = 0):
        import tensorflow_datasets as tfds  # heavy, and wanted only here
        folder = find_prepared(name, data_dir)
        builder = tfds.builder_from_directory(str(folder))
        splits = tuple(builder.info.splits)
        if split == 'heldout':
            found = [s for s in ('validation', 'test') if s in splits]
            if not found:
                raise ValueError(f"data.split='heldout': {name} has only {splits}; name a part, as in 'train[90%:]'")
            split = found[0]
        elif re.split(r'\W', split)[0] not in splits:
            raise ValueError(f'data.split={split!r}: {name} has {splits}')
        features = builder.info.features
        if 'image' not in features:
            raise ValueError(f"data.name={name!r}: has features {tuple(features)} but no 'image'")
        super().__init__(tuple(features['label'].names) if 'label' in features else (name,), image_size)
        self._repair = f'prepare it again with: {prepare_command(name, data_dir)}'
        try:
            self._records = builder.as_data_source(split=split, decoders={'image': tfds.decode.SkipDecoding()})
        except NotImplementedError:
            raise ValueError(f'{folder} is not stored as array_record; {self._repair}') from None
        # The files are opened as they are read; ask now rather than hours into a run.
        for file in [] if '://' in str(folder) else builder.info.splits[split].filepaths:
            if not os.path.exists(file) or os.path.getsize(file) < MIN_FILE_BYTES:
                raise OSError(f'{file}: missing or truncated; {self._repair}')
        self._prefix, self._channels = f'{name}/{split}', channels or 3

    def __len__(self) -> int:
        return len(self._records)

    def name(self, i: int) -> str:
        return f'{self._prefix}/{i}'

    def read(self, i: int) -> tuple[np.ndarray, int]:
        try:
            record = self._records[i]
        except RuntimeError as error:  # of a whole file, not of one image
            raise OSError(f'{self.name(i)}: a file is truncated ({first_line(error)}); {self._repair}') from None
        return decode_image(record['image'], self._channels), int(record.get('label', 0))


def find_prepared(name: str, data_dir: str, *, field: str = 'data.name',
                  others: tuple[str, ...] = OTHER_SOURCES) -> Any:
    """Folder of the newest prepared version of TFDS data set `name` (`set` or `set/config`); no network, no TensorFlow.

    Args:
        field: of the config that holds the name.
        others: names it may hold that are no TFDS data sets.

    Raises:
        ValueError: no data set of that name exists, or several of its configs are prepared.
        FileNotFoundError: it exists but has not been prepared.
    """
    from etils import epath
    root = epath.Path(data_dir).expanduser() / name
    prepared = []
    for pattern in ('*/dataset_info.json', '*/*/dataset_info.json'):
        prepared += [file.parent for file in root.glob(pattern) if re.fullmatch(r'\d+\.\d+\.\d+', file.parent.name)]
    if not prepared:
        import tensorflow_datasets as tfds
        known = (*others, *tfds.list_builders(with_community_datasets=False))
        if name.split('/')[0] not in known:
            near = difflib.get_close_matches(name, known, 1, 0.5)
            among = f'one of {others} nor ' if others else ''
            raise ValueError(f'{field}={name!r} is not {among}a TFDS data set'
                             + (f'; did you mean {near[0]!r}?' if near else ''))
        manual = ', after putting ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into its downloads/manual' \
            if name.startswith('imagenet2012') else ''
        raise FileNotFoundError(f'{field}={name!r}: not prepared below {root.parent}; prepare it once with: '
                                f'{prepare_command(name, data_dir)}{manual}; or point data.path at where it is')
    configs = sorted({str(folder.parent.relative_to(root)) for folder in prepared})
    if len(configs) > 1:
        raise ValueError(f'{field}={name!r}: several configs are prepared; name one, as in {name}/{configs[0]}')
    return max(prepared, key=lambda folder: tuple(int(x) for x in folder.name.split('.')))


def prepare_command(name: str, data_dir: str) -> str:
    return (f"pip install -e '.[prepare]' && tfds build {name} --file_format=array_record "
            f'--data_dir={os.path.expanduser(data_dir)}')


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
