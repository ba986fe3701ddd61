"""Pairs of responses judged by a language model behind an OpenAI-compatible endpoint, recorded so that they can be
replayed.

Every question is asked in both orders, for judges favour a place. Answers are appended to a record under a digest of
the whole question; what is recorded is never asked again, and the record alone gives the same numbers again.
"""
import concurrent.futures
import hashlib
import http.client
import json
import pathlib
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.runtime.statistics import bootstrap_interval

TEMPLATE = """Two assistants were given the same prompt. Decide which response serves its writer better: correct, to \
the point, complete, and no longer than it has to be. The order of the two means nothing.

[Prompt]
{prompt}

[Response A]
{a}

[Response B]
{b}

Answer with one word: A, B, or tie."""
FIELDS = ('{prompt}', '{a}', '{b}')
AGAIN = (429, 500, 502, 503, 504)  # statuses after which the same question may succeed
TRIES = 6
LONGEST_WAIT = 60.0                # seconds between two tries
LOCAL = ('127.0.0.1', 'localhost', '::1')


class Pair(NamedTuple):
    """A prompt and two responses to it."""
    prompt: str
    ours: str
    theirs: str


class Verdict(NamedTuple):
    """Both orders of one pair.

    Attributes:
        scores: 1 where ours was preferred, 0 where theirs, 0.5 for a tie or an answer that is neither; ours first,
            then ours second.
        unclear: answers that are neither.
    """
    scores: tuple[float, float]
    unclear: int


def check_template(template: str) -> None:
    """Raises a ValueError for a template that leaves out the prompt or a response."""
    missing = [field for field in FIELDS if field not in template]
    if missing:
        raise ValueError(f'--template: {missing[0]} is not in it; a template has {", ".join(FIELDS)}')


def question(template: str, prompt: str, a: str, b: str) -> str:
    """The template with its fields filled, whatever braces the texts have."""
    filled = {'{prompt}': prompt, '{a}': a, '{b}': b}
    return re.sub('|'.join(map(re.escape, FIELDS)), lambda match: filled[match[0]], template)


def score_of(answer: str, ours: str) -> float | None:
    """1, 0 or 0.5 for an answer that begins with A, B or tie; `ours` is the letter of ours. None: it is neither, such
    as a word after the article or both letters."""
    answer = answer.lstrip(' \t\r\n*"\'([')
    if re.match(r'(?:an?\s+)?tie\b', answer, re.IGNORECASE):
        return 0.5
    match = re.match(r'(?:response\s+)?([AB])\b(?!\s*(?:and|or|&|/|,)\s*(?:response\s+)?[AB]\b)', answer,
                     re.IGNORECASE)
    if match is None or match[0] == 'a' and re.match(r'\s+\w', answer[1:]):
        return None
    return float(match[1].upper() == ours)


# ---- Record ----------------------------------------------------------------------------------------------------------

class Record:
    """Answers by question, in a file of JSON lines that grows by one with each answer.

    Args:
        path: created on the first answer; a last line that was cut short by a kill is left out.
    """

    def __init__(self, path: pathlib.Path):
        self._path, self._lock, self.answers = path, threading.Lock(), {}
        text = path.read_text(encoding='utf-8', errors='replace') if path.exists() else ''
        self._begin = '' if text.endswith('\n') or not text else '\n'  # ends a line that was cut short
        if text:
            for line in text.split('\n'):
                try:
                    row = json.loads(line)
                    self.answers[row['key']] = str(row['answer'])
                except (ValueError, KeyError, TypeError):
                    continue

    def add(self, request: Mapping[str, Any], answer: str) -> None:
        """Keeps `answer` to `request`, on disk before it returns."""
        line = json.dumps({'key': key_of(request), 'request': request, 'answer': answer}, ensure_ascii=False)
        with self._lock:
            self.answers[key_of(request)] = answer
            with open(self._path, 'a', encoding='utf-8') as file:
                file.write(self._begin + line + '\n')
            self._begin = ''


def key_of(request: Mapping[str, Any]) -> str:
    """Digest of a request: model, settings and the whole question, neither endpoint nor key."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


# ---- Endpoint --------------------------------------------------------------------------------------------------------

class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key elsewhere."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Endpoint:
    """A chat model.

    Args:
        url: up to and without '/chat/completions'.
        key: sent as a bearer token; '': none. It is in no record and no message.
        timeout: seconds an answer may take.

    Raises:
        ValueError: no URL, or one that would send the key unencrypted to another machine.
    """

    def __init__(self, url: str, *, key: str = '', timeout: float = 60.0,
                 sleep: Callable[[float], None] = time.sleep):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ('http', 'https') or not parts.hostname:
            raise ValueError(f'--endpoint={url}: give a URL such as http://127.0.0.1:8000/v1')
        if key and parts.scheme == 'http' and parts.hostname not in LOCAL:
            raise ValueError(f'--endpoint={url}: the key would travel unencrypted; use https')
        self._url, self._timeout, self._sleep = f'{url.rstrip("/")}/chat/completions', timeout, sleep
        self._headers = {'Content-Type': 'application/json'} | ({'Authorization': f'Bearer {key}'} if key else {})
        self._opener = urllib.request.build_opener(_NoRedirects)

    def __call__(self, request: Mapping[str, Any]) -> str:
        """The answer's text. Busy endpoints are asked again, after the time they name or ever longer ones.

        Raises:
            OSError: it could not be reached, refused, or answered something else.
        """
        body = json.dumps(request).encode()
        for attempt in range(TRIES):
            wait = 2.0 ** attempt
            try:
                posted = urllib.request.Request(self._url, body, self._headers)
                with self._opener.open(posted, timeout=self._timeout) as reply:
                    content = json.loads(reply.read())['choices'][0]['message']['content']
                if not isinstance(content, str):
                    raise TypeError('no text')
                return content
            except urllib.error.HTTPError as error:
                reason = f'status {error.code}'
                if error.code not in AGAIN:
                    raise OSError(f'{self._url}: {reason} ({error.read(200).decode(errors="replace")})') from None
                named = error.headers.get('Retry-After', '')
                wait = float(named) if named.isdigit() else wait
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise OSError(f'{self._url}: answered something else than a chat completion ({error!r:.100})') from None
            except (OSError, http.client.HTTPException) as error:  # the latter: an answer that broke off
                reason = str(getattr(error, 'reason', error))
            if attempt + 1 < TRIES:
                self._sleep(min(wait, LONGEST_WAIT))
        raise OSError(f'{self._url}: no answer after {TRIES} tries ({reason}); run the same command to go on')


# ---- Judging ---------------------------------------------------------------------------------------------------------

def requests_of(pairs: Sequence[Pair], model: str, template: str = TEMPLATE) -> list[tuple[dict[str, Any], ...]]:
    """For each pair the two requests: ours as A, then ours as B."""
    def request(prompt: str, a: str, b: str) -> dict[str, Any]:
        return {'model': model, 'temperature': 0, 'max_tokens': 16,
                'messages': [{'role': 'user', 'content': question(template, prompt, a, b)}]}
    return [(request(p.prompt, p.ours, p.theirs), request(p.prompt, p.theirs, p.ours)) for p in pairs]


def judge(pairs: Sequence[Pair], record: Record, *, model: str, endpoint: Callable[[Mapping[str, Any]], str] | None,
          template: str = TEMPLATE, parallel: int = 4,
          progress: Callable[[int], None] | None = None) -> list[Verdict]:
    """Verdicts of all pairs, from the record and, where it has none, from `endpoint`.

    Args:
        endpoint: request -> answer; None: only what is recorded.
        parallel: questions at a time.
        progress: called with how many pairs are done.

    Raises:
        ValueError: `endpoint` is None and the record lacks an answer.
        OSError: as `Endpoint`; what had been answered is recorded.
    """
    asked = requests_of(pairs, model, template)
    open_ones = {key_of(request): request for both in asked for request in both
                 if key_of(request) not in record.answers}
    if open_ones and endpoint is None:
        raise ValueError(f'{len(open_ones)} of {2 * len(pairs)} answers are not in the record; give --endpoint, or the '
                         'model, template and responses that it was made with')
    if open_ones:
        with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
            waiting = {pool.submit(endpoint, request): request for request in open_ones.values()}
            try:
                for done, future in enumerate(concurrent.futures.as_completed(waiting), 1):
                    record.add(waiting[future], future.result())
                    if progress:
                        progress(done * len(pairs) // len(waiting))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    verdicts = []
    for first, second in asked:
        scores = [score_of(record.answers[key_of(r)], letter) for r, letter in ((first, 'A'), (second, 'B'))]
        known = [0.5 if score is None else score for score in scores]
        verdicts.append(Verdict((known[0], known[1]), sum(score is None for score in scores)))
    return verdicts


def summarize(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """`judge_win_rate`: mean over pairs and both orders, a tie counts half, with a bootstrap interval over pairs;
    `judge_wins`, `judge_losses`: pairs in which both orders say so; `judge_first`: how often the first place was
    preferred; `judge_unclear`: share of answers that were neither A, B nor tie."""
    scores = np.array([verdict.scores for verdict in verdicts])
    low, high = bootstrap_interval(scores.mean(1))
    return {'judge_win_rate': float(scores.mean()), 'judge_win_rate_low': low, 'judge_win_rate_high': high,
            'judge_wins': float((scores == 1).all(1).mean()), 'judge_losses': float((scores == 0).all(1).mean()),
            'judge_first': float(np.mean([scores[:, 0], 1 - scores[:, 1]])),
            'judge_unclear': sum(v.unclear for v in verdicts) / (2 * len(verdicts)), 'judge_pairs': len(verdicts)}
