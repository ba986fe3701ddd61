"""TensorFlow Datasets that lie prepared on disk: where, and what to do where they do not. No TensorFlow, no network."""
import difflib
import os
import re
from typing import Any


def find(name: str, data_dir: str, *, field: str, others: tuple[str, ...] = ()) -> Any:
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
