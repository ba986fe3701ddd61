import pytest

from rlhf_jax.tasks import no_robots, prompts

USER, ANSWER, SYSTEM = ({'role': 'user', 'content': 'Hi?'}, {'role': 'assistant', 'content': 'Hello.'},
                        {'role': 'system', 'content': 'Be kind.'})
ROW = {'messages': [SYSTEM, USER, ANSWER, USER, ANSWER]}


def test_tulu_template():
    assert no_robots.prompt(ROW) == ('<|system|>\nBe kind.\n<|user|>\nHi?\n<|assistant|>\nHello.<|end_of_text|>\n'
                                     '<|user|>\nHi?\n<|assistant|>\n')
    short = no_robots.demonstration({'messages': [USER, ANSWER]}, eos='</s>')
    assert short == '<|user|>\nHi?\n<|assistant|>\nHello.</s>'


def test_llama3_template():
    head = '<|start_header_id|>{}<|end_header_id|>\n\n'.format
    assert no_robots.prompt({'messages': [USER, ANSWER]}, template='llama3') == (
        f"<|begin_of_text|>{head('user')}Hi?<|eot_id|>{head('assistant')}")
    assert no_robots.demonstration({'messages': [USER, {'role': 'assistant', 'content': ' Hello.\n'}]},
                                   template='llama3') == (
        f"<|begin_of_text|>{head('user')}Hi?<|eot_id|>{head('assistant')}Hello.<|eot_id|>")


@pytest.mark.parametrize('template', no_robots.TEMPLATES)
def test_prompt_and_answer_make_the_demonstration(template):
    _, answer = no_robots.split(ROW)
    prompt, whole = no_robots.prompt(ROW, template=template), no_robots.demonstration(ROW, template=template)
    end = {'tulu': no_robots.END, 'llama3': '<|eot_id|>'}[template]
    assert whole == prompt + answer + end and answer == 'Hello.'


def test_preferences_differ_in_the_last_answer():
    chosen, rejected = no_robots.preference([USER], 'Yes.', 'No.')
    prompt = no_robots.prompt({'messages': [USER, ANSWER]})
    assert (chosen, rejected) == (f'{prompt}Yes.<|end_of_text|>', f'{prompt}No.<|end_of_text|>')


def test_long_prompts_fall_out():
    texts = [no_robots.prompt({'messages': [{'role': 'user', 'content': 'x' * n}, ANSWER]}) for n in (1, 600, 2)]
    tokens, kept = prompts.encode(texts, lambda t: t.encode(), max_tokens=no_robots.MAX_PROMPT)
    assert kept.tolist() == [0, 2] and [bytes(t).decode() for t in tokens] == [texts[0], texts[2]]


@pytest.mark.parametrize('messages, message', [
    ([USER], r"must end in a 'user' and an 'assistant' turn, these end in \['user'\]"), ([], 'these end in'),
    ([ANSWER, ANSWER], 'these end in')])
def test_rows_without_an_answer(messages, message):
    for function in (no_robots.prompt, no_robots.demonstration):
        with pytest.raises(ValueError, match=message):
            function({'messages': messages})


@pytest.mark.parametrize('messages, settings, message', [
    ([], {}, 'messages: there is none'), ([USER], {'template': 'x'}, "template='x'"),
    ([{'role': 'bot', 'content': 'x'}], {}, "role 'bot' of message 0"),
    ([USER, {'role': 'assistant'}], {}, "message 1 has no 'content'")])
def test_conversations_that_cannot_be_written(messages, settings, message):
    with pytest.raises(ValueError, match=message):
        no_robots.chat(messages, **settings)
