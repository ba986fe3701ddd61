"""Win rate by a language model that judges, behind any OpenAI-compatible endpoint.

    python -m experiments.evaluate --policy=RUN --temperature=0.7 --out=ours.jsonl
    # against the data's own responses (`reference` in the rows); the key is read from the environment, never recorded
    python -m experiments.judge --responses=ours.jsonl --model=NAME --endpoint=http://127.0.0.1:8000/v1 \\
        --record=judged.jsonl
    # against another policy's responses to the same prompts
    python -m experiments.judge --responses=ours.jsonl --against=theirs.jsonl --model=NAME --endpoint=… \\
        --record=judged.jsonl
    # the same numbers again, without any endpoint
    python -m experiments.judge --responses=ours.jsonl --model=NAME --record=judged.jsonl

Every pair is judged in both orders at temperature 0. Answers are recorded as they come: interrupt it anywhere and run
it again. A tie, and an answer that is neither, count half; how many there were is reported.
"""
import json
import os
import pathlib
from typing import Any

from experiments.rlhf.policy import judge
from experiments.runtime import launch, storage
from experiments.runtime.progress import bar


def main() -> None:
    p = launch.parser(__doc__)
    p.add_argument('--responses', metavar='FILE', required=True, help='as experiments.evaluate --out writes them')
    p.add_argument('--against', metavar='FILE', help="the same of others (default: the `reference` of each row)")
    p.add_argument('--model', required=True, help='name of the judge, as the endpoint knows it')
    p.add_argument('--endpoint', metavar='URL', help='up to /v1; without one, only the record is read')
    p.add_argument('--key', metavar='VARIABLE', default='OPENAI_API_KEY', help='of the environment, with the key')
    p.add_argument('--record', metavar='FILE', required=True, help='questions and answers, a JSON line each')
    p.add_argument('--template', metavar='FILE', help='the question, with {prompt}, {a} and {b}')
    p.add_argument('--num', type=int, help='pairs, the first so many (default: all)')
    p.add_argument('--parallel', type=int, default=4, help='questions at a time')
    p.add_argument('--timeout', type=float, default=60.0, help='seconds an answer may take')
    p.add_argument('--json', metavar='FILE', help='also write the numbers there')
    args, _ = launch.parse(p)
    for name, least in (('parallel', 1), ('num', 1), ('timeout', 1e-3)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise ValueError(f'--{name}={getattr(args, name)} must be at least {least}')
    template = judge.TEMPLATE
    if args.template:
        try:
            template = pathlib.Path(args.template).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f'--template={args.template}: cannot be read ({error}); give a text file') from None
        judge.check_template(template)
    endpoint = args.endpoint and judge.Endpoint(args.endpoint, key=os.environ.get(args.key, ''), timeout=args.timeout)
    pairs = pairs_of(args.responses, args.against)[:args.num]
    for name in ('record', 'json'):
        if getattr(args, name):
            storage.check_writable(storage.resolve(getattr(args, name)).parent, f'--{name}')
    verdicts = judge.judge(pairs, judge.Record(pathlib.Path(args.record)), model=args.model, endpoint=endpoint or None,
                           template=template, parallel=args.parallel, progress=bar('judging', len(pairs)))
    out = {name: round(value, 6) for name, value in judge.summarize(verdicts).items()}
    print(json.dumps(out, indent=1))
    if args.json:
        storage.write_json(args.json, out)


def pairs_of(responses: str, against: str | None) -> list[judge.Pair]:
    """Each response with what it is compared with: the other file's response to the same prompt, in turn where there
    are several, or its row's own `reference`.

    Raises:
        ValueError, OSError: a file that is not there or damaged, or a response without a counterpart.
    """
    ours = read_rows('--responses', responses)
    if against is None:
        for number, row in enumerate(ours, 1):
            if not isinstance(row.get('reference'), str):
                raise ValueError(f'--responses={responses}: line {number} has no reference to win against; give '
                                 '--against')
        return [judge.Pair(row['prompt'], row['completion'], row['reference']) for row in ours]
    theirs: dict[str, list[str]] = {}
    for row in read_rows('--against', against):
        theirs.setdefault(row['prompt'], []).append(row['completion'])
    pairs, used = [], dict.fromkeys(theirs, 0)
    for number, row in enumerate(ours, 1):
        others = theirs.get(row['prompt'])
        if not others:
            raise ValueError(f'--against={against}: has no response to the prompt in line {number} of {responses}')
        pairs.append(judge.Pair(row['prompt'], row['completion'], others[used[row['prompt']] % len(others)]))
        used[row['prompt']] += 1
    return pairs


def read_rows(flag: str, path: str) -> list[dict[str, Any]]:
    """Rows of a file of responses; errors as of `storage.read_json_lines`."""
    return storage.read_json_lines(flag, path, ('prompt', 'completion'), 'experiments.evaluate --out')


if __name__ == '__main__':
    launch.main(main)
