"""TFDS image data sets through `tfds.data_source`: array_record files, no TensorFlow, no network."""
import logging
import os
import re

import numpy as np

from experiments.dlc.data.decode import Decoding, decode_image
from experiments.dlc.data.images import ImageSource
from experiments.runtime import tfds_folders

log = logging.getLogger(__name__)

OTHER_SOURCES = ('digits', 'fake', 'folder', 'npz')
MIN_FILE_BYTES = 2 ** 16  # of an array_record file: it ends in a footer of that size


class TFDSImages(ImageSource):
    """A prepared TFDS data set with features `image` and, if it has classes, `label`."""

    def __init__(self, name: str, data_dir: str, split: str, *, decoding: Decoding = Decoding(),
                 image_size: int = 0):
        import tensorflow_datasets as tfds  # heavy, and wanted only here
        folder = tfds_folders.find(name, data_dir, field='data.name', others=OTHER_SOURCES)
        builder = tfds.builder_from_directory(str(folder))
        splits = tuple(builder.info.splits)
        if split == 'heldout':
            found = [s for s in ('validation', 'test') if s in splits]
            if not found:
                raise ValueError(f"data.split='heldout': {name} has only {splits}; name a part, as in 'train[90%:]'")
            if found[1:]:
                log.warning('data.name=%s: held out are the images of %s; left out: %s, read by naming it as the split',
                            name, found[0], ', '.join(found[1:]))
            split = found[0]
        elif re.split(r'\W', split)[0] not in splits:
            raise ValueError(f'data.split={split!r}: {name} has {splits}')
        features = builder.info.features
        if 'image' not in features:
            raise ValueError(f"data.name={name!r}: has features {tuple(features)} but no 'image'")
        super().__init__(tuple(features['label'].names) if 'label' in features else (name,), image_size)
        self._repair = f'prepare it again with: {tfds_folders.prepare_command(name, data_dir)}'
        try:
            self._records = builder.as_data_source(split=split, decoders={'image': tfds.decode.SkipDecoding()})
        except NotImplementedError:
            raise ValueError(f'{folder} is not stored as array_record; {self._repair}') from None
        # The files are opened as they are read; ask now rather than hours into a run.
        for file in [] if '://' in str(folder) else builder.info.splits[split].filepaths:
            if not os.path.exists(file) or os.path.getsize(file) < MIN_FILE_BYTES:
                raise OSError(f'{file}: missing or truncated; {self._repair}')
        self._prefix, self._decoding = f'{name}/{split}', decoding

    def __len__(self) -> int:
        return len(self._records)

    def name(self, i: int) -> str:
        return f'{self._prefix}/{i}'

    def read(self, i: int) -> tuple[np.ndarray | int | str, ...]:
        try:
            record = self._records[i]
        except RuntimeError as error:  # of a whole file, not of one image
            raise OSError(f'{self.name(i)}: a file is truncated ({first_line(error)}); {self._repair}') from None
        image, notes = decode_image(record['image'], self._decoding)
        return image, int(record.get('label', 0)), *notes


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
