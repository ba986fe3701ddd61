"""Names and texts from data sets, made fit for a terminal."""


def printable(text: str, limit: int = 200) -> str:
    """`text` with control characters and bytes that are no UTF-8 escaped, cut after `limit` characters.

    A file name or a caption may hold escape sequences that a terminal would obey.
    """
    text = text[:limit + 1]
    shown = ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text[:limit])
    return shown if len(text) <= limit else shown + '…'
