"""TensorFlow Datasets that lie prepared on disk: where, and what to do where they do not. No TensorFlow, no network."""
import difflib
import json
import os
import re
from collections.abc import Iterator
from typing import Any


def find(name: str, data_dir: str, *, field: str, others: tuple[str, ...] = ()) -> Any:
    """Folder of the newest prepared version of TFDS data set `name` (`set` or `set/config`); no network, no TensorFlow.

    Args:
        field: of the config that holds the name.
        others: names it may hold that are no TFDS data sets.

    Raises:
        ValueError: no data set of that name exists, several of its configs are prepared, or it names code to run.
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
    newest = max(prepared, key=lambda folder: tuple(int(x) for x in folder.name.split('.')))
    check_features(newest)
    return newest


def check_features(folder: Any) -> None:
    """Raises a ValueError if the data set in `folder` has features that are not TFDS's own.

    TFDS imports the class that a feature names, from wherever Python finds it: the folder may have come from anybody,
    and the directory that a command is run in is on the path.
    """
    path = folder / 'features.json'
    if not path.exists():
        return
    try:
        features = json.loads(path.read_text())
        for name in _class_names(features):
            if not name.startswith('tensorflow_datasets.'):
                raise ValueError(f'names the class {name!r}, which is not one of TFDS, and opening the data set would '
                                 'run its code; prepare the data set with features of TFDS alone')
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path}: {error}') from None


def _class_names(features: Any) -> Iterator[str]:
    if isinstance(features, list):
        for value in features:
            yield from _class_names(value)
    if isinstance(features, dict):
        for key, value in features.items():
            if key in ('pythonClassName', 'python_class_name', 'type', 'proto_cls') and isinstance(value, str):
                yield value
            yield from _class_names(value)


def prepare_command(name: str, data_dir: str) -> str:
    return (f"pip install -e '.[prepare]' && tfds build {name} --file_format=array_record "
            f'--data_dir={os.path.expanduser(data_dir)}')
