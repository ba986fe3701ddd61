"""Conversations of any kind under the tokenizer's own chat template; rows as those of `no_robots`."""
from experiments.rlhf.data.tasks import no_robots

OPTIONS = no_robots.OPTIONS | dict(template='tokenizer')
make = no_robots.make
