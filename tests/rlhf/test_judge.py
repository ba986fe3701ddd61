"""Win rates by a judge, against a stub server on this machine."""
import http.server
import json
import sys
import threading

import pytest

from experiments import judge as command
from experiments.rlhf.policy import judge
from experiments.runtime import launch, storage


class Stub(http.server.ThreadingHTTPServer):
    """Answers chat completions by `answer(content)`; keeps headers and bodies of what it was asked."""
    daemon_threads = True

    def __init__(self, answer):
        self.asked, self.answer = [], answer
        super().__init__(('127.0.0.1', 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f'http://127.0.0.1:{self.server_port}/v1'


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        self.server.asked.append((self.path, dict(self.headers), body))
        status, headers, reply = self.server.answer(body['messages'][0]['content'])
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(reply if isinstance(reply, bytes) else json.dumps(reply).encode())

    def log_message(self, *_):
        pass


def says(text):
    return 200, {}, {'choices': [{'message': {'content': text}}]}


def longer(content):
    """A judge that prefers the longer response, and the first of equals."""
    a, b = (content.split(f'[Response {letter}]\n')[1].split('\n\n')[0] for letter in 'AB')
    return says('A' if len(a) >= len(b) else 'B')


@pytest.fixture
def serve():
    servers = []

    def start(answer):
        servers.append(Stub(answer))
        return servers[-1]
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def responses(tmp_path):
    rows = [dict(prompt='p1', completion='longest', reference='short'),
            dict(prompt='p2', completion='s', reference='xy'),
            dict(prompt='p3 {a}', completion='same', reference='also')]
    (tmp_path / 'ours.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return tmp_path / 'ours.jsonl'


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', ['judge', '--model=m', *map(str, arguments)])
    launch.main(command.main)


def test_both_orders_are_judged_recorded_and_replayed(serve, responses, tmp_path, monkeypatch, capsys):
    server, record = serve(longer), tmp_path / 'judged.jsonl'
    monkeypatch.setenv('OPENAI_API_KEY', 'secret-key')
    run(monkeypatch, f'--responses={responses}', f'--endpoint={server.url}', f'--record={record}', '--parallel=2')
    out = json.loads(capsys.readouterr().out)
    # A win, a loss, and a pair whose first place wins in either order: half.
    assert (out['judge_win_rate'], out['judge_wins'], out['judge_losses']) == (0.5, pytest.approx(1 / 3, abs=1e-6),
                                                                               pytest.approx(1 / 3, abs=1e-6))
    assert out['judge_first'] == pytest.approx(4 / 6, abs=1e-6) and out['judge_unclear'] == 0
    assert out['judge_win_rate_low'] == 0 and out['judge_win_rate_high'] == 1
    path, headers, body = server.asked[0]
    assert path == '/v1/chat/completions' and headers['Authorization'] == 'Bearer secret-key'
    assert (body['model'], body['temperature']) == ('m', 0) and len(server.asked) == 6
    assert 'secret-key' not in record.read_text()
    assert any('[Prompt]\np3 {a}\n' in b['messages'][0]['content'] for _, _, b in server.asked)  # is not filled again
    run(monkeypatch, f'--responses={responses}', f'--record={record}', f'--json={tmp_path / "out.json"}')
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / 'out.json').read_text()) == out
    assert len(server.asked) == 6
    with pytest.raises(SystemExit):
        run(monkeypatch, f'--responses={responses}', f'--record={tmp_path / "none.jsonl"}')
    assert '6 of 6 answers are not in the record; give --endpoint' in capsys.readouterr().err


def test_what_was_answered_before_an_error_is_not_asked_again(serve, tmp_path):
    pairs, broken = [judge.Pair(f'p{i}', 'ours', 'x') for i in range(4)], [True]

    def answer(content):
        return (400, {}, b'no such model') if broken[0] and '[Prompt]\np3' in content else longer(content)
    server, path = serve(answer), tmp_path / 'record'
    ask = lambda: judge.judge(pairs, judge.Record(path), model='m', endpoint=judge.Endpoint(server.url), parallel=1)
    with pytest.raises(OSError, match=r'chat/completions: status 400 \(no such model\)'):
        ask()
    kept = len(path.read_text().splitlines())
    assert kept == 6
    with open(path, 'a') as file:
        file.write('{"key": "cut sho')  # a kill in the middle of a line
    broken[0], before = False, len(server.asked)
    verdicts = ask()
    assert [v.scores for v in verdicts] == [(1, 1)] * 4 and len(server.asked) - before == 2
    assert len(judge.Record(path).answers) == 8


def test_busy_endpoints_are_asked_again(serve):
    replies = [(429, {'Retry-After': '7'}, b''), (503, {}, b''), says('tie')]
    server, waited = serve(lambda _: replies.pop(0)), []
    assert judge.Endpoint(server.url, sleep=waited.append)({'messages': [{'content': ''}]}) == 'tie'
    assert waited == [7, 2]
    replies, waited = [(200, {'Content-Length': '500'}, b'{"cho'), says('tie')], []  # an answer that breaks off
    assert judge.Endpoint(server.url, sleep=waited.append)({'messages': [{'content': ''}]}) == 'tie'
    assert waited == [1]
    server, waited = serve(lambda _: (500, {}, b'')), []
    with pytest.raises(OSError, match='no answer after 6 tries .status 500.; run the same command to go on'):
        judge.Endpoint(server.url, sleep=waited.append)({'messages': [{'content': ''}]})
    assert waited == [1, 2, 4, 8, 16]


@pytest.mark.parametrize('reply, message', [
    ((200, {}, b'<html>'), 'answered something else than a chat completion'),
    ((200, {}, {'choices': []}), 'answered something else than a chat completion'),
    ((200, {}, {'choices': [{'message': {'content': None}}]}), 'answered something else'),
    ((302, {'Location': 'http://127.0.0.1:9/'}, b''), 'status 302'),  # the key is not taken elsewhere
])
def test_other_answers_are_errors(serve, reply, message):
    server = serve(lambda _: reply)
    with pytest.raises(OSError, match=message):
        judge.Endpoint(server.url, key='k')({'messages': [{'content': ''}]})
    assert len(server.asked) == 1


@pytest.mark.parametrize('answer, score', [
    ('A', 1), ('B', 0), (' b.', 0), ('**A**', 1), ('Response A is better', 1), ('Tie', 0.5), ('tie.', 0.5),
    ('A tie.', 0.5), ('a tie', 0.5), ('A and B are equal', None), ('B/A', None), ('a good question', None), ('a', 1),
    ('Both are good', None), ('As I see it', None), ('', None), ('(B)', 0)])
def test_answers(answer, score):
    assert judge.score_of(answer, 'A') == score
    assert judge.score_of(answer, 'B') == (None if score is None else 1 - score)


def test_unclear_answers_count_half_and_are_reported():
    verdicts = judge.judge([judge.Pair('p', 'a', 'b')], type('Record', (), dict(answers={}, add=add))(), model='m',
                           endpoint=lambda request: 'hm' if '[Response A]\na' in str(
                               request['messages'][0]['content']) else 'B')
    assert verdicts == [judge.Verdict((0.5, 1.0), 1)]
    assert judge.summarize(verdicts)['judge_unclear'] == 0.5


def add(record, request, answer):
    record.answers[judge.key_of(request)] = answer


def test_another_policys_responses_to_the_same_prompts(responses, tmp_path):
    rows = [dict(prompt=p, completion=c) for p, c in (('p2', 'x'), ('p1', 'y'), ('p1', 'z'), ('p3 {a}', 'w'))]
    (tmp_path / 'theirs.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    assert [p.theirs for p in command.pairs_of(str(responses), str(tmp_path / 'theirs.jsonl'))] == ['y', 'x', 'w']
    twice = tmp_path / 'twice.jsonl'
    twice.write_text(responses.read_text() * 2)
    assert [p.theirs for p in command.pairs_of(str(twice), str(tmp_path / 'theirs.jsonl'))] == ['y', 'x', 'w', 'z', 'x',
                                                                                                'w']


@pytest.mark.parametrize('arguments, message', [
    (['--endpoint=127.0.0.1:80'], '--endpoint=127.0.0.1:80: give a URL'),
    (['--endpoint=http://example.org/v1'], 'the key would travel unencrypted; use https'),
    (['--parallel=0'], '--parallel=0 must be at least 1'),
    (['--timeout=0'], '--timeout=0.0 must be at least'),
    (['--template={at}/bare'], '--template: {prompt} is not in it'),
    (['--responses={at}/bare'], 'line 1 is no JSON object; write the file with experiments.evaluate --out'),
    (['--responses={at}/empty'], 'holds no row'),
    (['--responses={at}/none'], '/none: cannot be read (No such file or directory); write the file with'),
    (['--against={at}/none'], '--against='),
    (['--template={at}/none'], '--template='),
    (['--responses={at}/alone'], 'line 1 has no reference to win against; give --against'),
    (['--against={at}/alone'], 'has no response to the prompt in line 1'),
    (['--record={at}/bare/x'], '--record'),
])
def test_bad_input_is_one_line(arguments, message, responses, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('OPENAI_API_KEY', 'k')
    (tmp_path / 'bare').write_text('{a} {b}\n')
    (tmp_path / 'empty').write_text('')
    (tmp_path / 'alone').write_text(json.dumps(dict(prompt='q', completion='c')) + '\n')
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, f'--responses={responses}', f'--record={tmp_path / "judged.jsonl"}',
            *(argument.format(at=tmp_path) if '{at}' in argument else argument for argument in arguments))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count('\n') == 1


def test_a_line_ends_where_json_ends_it(tmp_path):
    rows = [{'prompt': 'a\u2028b', 'completion': 'c\x85d'}, {'prompt': 'e', 'completion': ''}]
    storage.write_json_lines(tmp_path / 'rows.jsonl', rows)
    assert command.read_rows('--responses', str(tmp_path / 'rows.jsonl')) == rows
