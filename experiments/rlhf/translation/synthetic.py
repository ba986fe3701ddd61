"""A parallel corpus without files: short sentences of one grammar in French, English and German.

Word order differs between the three (German inverts after an adverb, adjectives stand elsewhere in French) and articles
agree in gender and case, so that translation is more than a dictionary.
"""
import zlib
from collections.abc import Sequence

import numpy as np

# French, its gender, English, German, its gender
NOUNS = (
    ('chien', 'm', 'dog', 'hund', 'm'), ('chat', 'm', 'cat', 'katze', 'f'), ('cheval', 'm', 'horse', 'pferd', 'n'),
    ('femme', 'f', 'woman', 'frau', 'f'), ('garçon', 'm', 'boy', 'junge', 'm'), ('fille', 'f', 'girl', 'mädchen', 'n'),
    ('vache', 'f', 'cow', 'kuh', 'f'), ('souris', 'f', 'mouse', 'maus', 'f'), ('roi', 'm', 'king', 'könig', 'm'),
    ('docteur', 'm', 'doctor', 'arzt', 'm'), ('mouton', 'm', 'sheep', 'schaf', 'n'),
    ('reine', 'f', 'queen', 'königin', 'f'),
)
VERBS = (('voit', 'sees', 'sieht'), ('cherche', 'seeks', 'sucht'), ('suit', 'follows', 'verfolgt'),
         ('porte', 'carries', 'trägt'), ('peint', 'paints', 'malt'), ('lave', 'washes', 'wäscht'))
# French masculine and feminine, English, German
ADJECTIVES = (('rouge', 'rouge', 'red', 'rot'), ('vert', 'verte', 'green', 'grün'), ('jeune', 'jeune', 'young', 'jung'),
              ('petit', 'petite', 'small', 'klein'), ('grand', 'grande', 'tall', 'groß'))
PLACES = (('dans le jardin', 'in the garden', 'im garten'), ('à la plage', 'at the beach', 'am strand'),
          ('sur le pont', 'on the bridge', 'auf der brücke'), ('à la gare', 'at the station', 'am bahnhof'),
          ('dans la rue', 'in the street', 'auf der straße'))
TIMES = (("aujourd'hui", 'today', 'heute'), ('souvent', 'often', 'oft'), ('ici', 'here', 'hier'))
BEFORE_NOUN = {'petit', 'grand', 'jeune'}

# (definite?, gender) -> article
FRENCH = {(True, 'm'): 'le', (True, 'f'): 'la', (False, 'm'): 'un', (False, 'f'): 'une'}
NOMINATIVE = {(True, 'm'): 'der', (True, 'f'): 'die', (True, 'n'): 'das', (False, 'm'): 'ein', (False, 'f'): 'eine',
              (False, 'n'): 'ein'}
ACCUSATIVE = NOMINATIVE | {(True, 'm'): 'den', (False, 'm'): 'einen'}
# Of an adjective after an article; after 'ein' it depends on the noun's gender.
ENDINGS = {'der': 'e', 'die': 'e', 'das': 'e', 'den': 'en', 'einen': 'en', 'eine': 'e'}


def _noun_phrase(rng: np.random.Generator, articles: dict) -> tuple[str, str, str]:
    fr, fr_gender, en, de, de_gender = NOUNS[rng.integers(len(NOUNS))]
    definite = bool(rng.integers(2))
    fr_words, en_words = [FRENCH[definite, fr_gender], fr], ['the' if definite else 'a', en]
    de_words = [articles[definite, de_gender], de]
    if rng.integers(2):
        masculine, feminine, english, german = ADJECTIVES[rng.integers(len(ADJECTIVES))]
        place = 1 if masculine in BEFORE_NOUN else 2
        fr_words.insert(place, masculine if fr_gender == 'm' else feminine)
        en_words.insert(1, english)
        ending = ENDINGS.get(de_words[0]) or {'m': 'er', 'n': 'es'}[de_gender]
        de_words.insert(1, german + ending)
    return ' '.join(fr_words), ' '.join(en_words), ' '.join(de_words)


def rows(num: int, seed: Sequence[int]) -> list[dict[str, str]]:
    """`num` sentences [{'fr', 'en', 'de'}], lower-cased, tokens separated by spaces; a function of `seed`."""
    rng, sentences = np.random.default_rng(seed), []
    for _ in range(num):
        subject, target = _noun_phrase(rng, NOMINATIVE), _noun_phrase(rng, ACCUSATIVE)
        verb, place = VERBS[rng.integers(len(VERBS))], PLACES[rng.integers(len(PLACES))]
        time = TIMES[rng.integers(len(TIMES))] if rng.integers(2) else None
        fr = [subject[0], verb[0], target[0], place[0], '.']
        en = [subject[1], verb[1], target[1], place[1], '.']
        de = [subject[2], verb[2], target[2], place[2], '.']
        if time:
            fr, en, de = [time[0], *fr], [time[1], *en], [time[2], verb[2], subject[2], target[2], place[2], '.']
        sentences.append({'fr': ' '.join(fr), 'en': ' '.join(en), 'de': ' '.join(de)})
    return sentences


def images(captions: Sequence[str], width: int) -> np.ndarray:
    """Features of an image for each English sentence, float32 [N, width], of length 1: the sum of a random vector for
    each of its words, a function of the word. Nothing was seen; sentences of the same words have the same image."""
    of_words: dict[str, np.ndarray] = {}

    def vector(word: str) -> np.ndarray:
        if word not in of_words:
            of_words[word] = np.random.default_rng(zlib.crc32(word.encode())).normal(size=width)
        return of_words[word]
    out = np.stack([np.sum([vector(word) for word in sorted(caption.split())], axis=0) for caption in captions])
    return (out / np.linalg.norm(out, axis=1, keepdims=True)).astype(np.float32)
