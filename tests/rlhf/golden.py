"""Worked values of the published trainers (EOS 0, PAD 1, three responses of six tokens), shared by the tests."""
import numpy as np

EOS, PAD, LENGTH = 0, 1, 6
TOKENS = np.array([[5, 6, 0, 0, 0, 0], [5, 6, 7, 8, 9, 4], [5, 6, 7, 8, 9, 0]], np.int32)
LENGTHS = np.array([3, 6, 6])
MASK = np.arange(LENGTH) < LENGTHS[:, None]
GARBAGE = 77.0  # stands where a token does not count

LOGPROBS = np.array([[-.5, -1, -.2, GARBAGE, GARBAGE, GARBAGE], [-1] * 6, [-.1, -.2, -.3, -.4, -.5, -.6]], np.float32)
REF_LOGPROBS = np.array([[-.6, -1.2, -.1, -GARBAGE, -GARBAGE, -GARBAGE], [-.9, -1.1, -1.2, -.8, -1, -1], [-.2] * 6],
                        np.float32)

VALUES = np.array([[.1, .2, .3, .4, 0, 0], [0, .1, .2, .3, .4, .5], [.5, .4, .3, .2, .1, 0]], np.float32)
SCORES = np.array([1.2, -1, .7], np.float32)
REWARDS = np.array([[-.005, -.01, .005, 1.2, 0, 0], [.005, -.005, -.01, .01, 0, -1],
                    [-.005, 0, .005, .01, .015, .72]])
ADVANTAGES = np.array([[.961163, .911750, .865, .8, 0, 0],
                       [-.708434, -.856247, -1.001312, -1.148750, -1.325, -1.5],
                       [.124988, .242093, .360097, .479050, .599, .72]])
RETURNS = np.array([[1.061162, 1.111750, 1.165, 1.2, 0, 0],
                    [-.708434, -.756247, -.801312, -.848750, -.925, -1],
                    [.624988, .642093, .660097, .679050, .699, .72]])
WHITENED = np.array([[1.166219, 1.111142, 1.059032, 0, 0, 0],
                     [-.694789, -.859547, -1.021244, -1.185585, -1.382041, -1.577104],
                     [.234181, .364711, .496245, .628835, .762536, .897408]])
