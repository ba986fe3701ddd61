"""Lines of text files as people have them: packed, with a byte order mark, cut off, or not UTF-8 at all."""
import gzip
import lzma
import pathlib
import re
import zlib
from collections.abc import Iterator
from typing import Any

OPENERS: dict[str, Any] = {'.gz': gzip.open, '.xz': lzma.open}

_LONGEST_LINE = 2 ** 28  # bytes; a line that is longer comes from a file that unpacks for ever
_LONGEST_FILE = 2 ** 30  # bytes, of one that is read as a whole
_BROKEN = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)  # cut off, or never packed
_BYTE_ORDER_MARK = b'\xef\xbb\xbf'
_SURROGATE = re.compile('[\ud800-\udfff]')


def lines(file: pathlib.Path) -> Iterator[bytes]:
    """Lines of a file, of what is in it for `.gz` and `.xz`, without their ends and without a byte order mark.

    Newlines alone end a line (with a carriage return before it, as Windows writes them): texts hold U+2028, U+0085 and
    other characters at which str.splitlines would cut.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is cut off, packed otherwise than its name says, UTF-16, or has a line without end.
    """
    with OPENERS.get(file.suffix, open)(file, 'rb') as f:
        first = True
        while line := _read(file, f, _LONGEST_LINE, 'a line'):
            if first:
                line, first = _without_mark(file, line), False
            yield line.removesuffix(b'\n').removesuffix(b'\r')


def whole(file: pathlib.Path) -> bytes:
    """What is in a file, without a byte order mark.

    Raises:
        OSError, ValueError: as `lines`.
    """
    with OPENERS.get(file.suffix, open)(file, 'rb') as f:
        return _without_mark(file, _read(file, f, _LONGEST_FILE, 'a file read as a whole'))


def decoded(line: bytes) -> str:
    """UTF-8 as text.

    Raises:
        ValueError: it is not UTF-8, with the place.
    """
    try:
        return line.decode('utf-8')
    except UnicodeDecodeError as error:
        raise ValueError(f'is not UTF-8: byte 0x{line[error.start]:02x} at {error.start}') from None


def half_character(value: Any, name: str = '') -> str | None:
    """What is wrong with the text in a JSON value that holds half of a surrogate pair (`"\\ud83d"`: a cut emoji), which
    no tokenizer and no file takes; None: nothing."""
    if isinstance(value, str):
        match = _SURROGATE.search(value)
        return match and f'field {name!r} holds U+{ord(match[0]):04X}, half of a surrogate pair (a cut emoji?)'
    if isinstance(value, dict):
        pairs = [(inner, str(key)) for key, inner in value.items()]
        pairs += [(key, key) for key in value]
    else:
        pairs = [(inner, name) for inner in value] if isinstance(value, list) else []
    return next((fault for inner, key in pairs if (fault := half_character(inner, key))), None)


def _read(file: pathlib.Path, f: Any, limit: int, what: str) -> bytes:
    try:
        text = f.readline(limit) if what == 'a line' else f.read(limit)
    except _BROKEN as error:
        raise ValueError(f'{file}: is no whole {file.suffix} file ({error})') from None
    if len(text) >= limit:
        raise ValueError(f'{file}: {what} has more than {limit:,} bytes')
    return text


def _without_mark(file: pathlib.Path, text: bytes) -> bytes:
    if text.startswith((b'\xff\xfe', b'\xfe\xff')):
        raise ValueError(f'{file}: is UTF-16; save it as UTF-8')
    return text.removeprefix(_BYTE_ORDER_MARK)
