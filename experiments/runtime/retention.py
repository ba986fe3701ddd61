"""Which checkpoints of a run stay on disk: the newest, one every so many steps, and the best by a metric."""
import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import ml_collections
from orbax.checkpoint import checkpoint_managers

# Metrics whose name has one of these parts, between underscores, are better when lower; of others the highest value is
# the best. Fluency is measured in nats a token.
LOWER_IS_BETTER = ('loss', 'losses', 'perplexity', 'nats', 'nll', 'ce', 'fluency', 'kl', 'fid', 'sfid', 'frechet',
                   'drift', 'median_rank')


@dataclasses.dataclass(frozen=True)
class Retention:
    """The newest `newest` checkpoints stay, those at multiples of `every` steps (0: none of them), and the best one by
    `metric` ('': none)."""
    newest: int = 2
    every: int = 0
    metric: str = ''
    lowest: bool = False

    @classmethod
    def of(cls, config: ml_collections.ConfigDict) -> 'Retention':
        """What `config.keep_checkpoints`, `keep_every` and `keep` say.

        Raises:
            ValueError: a `keep` that is neither empty nor 'best:METRIC', 'best:METRIC:min' or 'best:METRIC:max'.
        """
        metric, lowest = best_by(config.get('keep', ''))
        return cls(config.keep_checkpoints, config.get('keep_every', 0), metric, lowest)

    def options(self) -> dict[str, Any]:
        """Arguments of `orbax.checkpoint.CheckpointManagerOptions`."""
        if not (self.every or self.metric):
            return dict(max_to_keep=self.newest)
        policies: list[Any] = [checkpoint_managers.LatestN(self.newest)]
        if self.every:
            policies.append(checkpoint_managers.EveryNSteps(self.every))
        if not self.metric:
            return dict(preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies))
        policies.append(checkpoint_managers.BestN(get_metric_fn=self.value, reverse=self.lowest, n=1,
                                                  keep_checkpoints_without_metrics=False))
        return dict(preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies), best_fn=self.value,
                    best_mode='min' if self.lowest else 'max')  # without `best_fn` Orbax stores no metrics

    def value(self, measured: Mapping[str, float]) -> float:
        """The metric of a step; one that was saved while another metric was kept the best by is the worst."""
        return measured.get(self.metric, math.inf if self.lowest else -math.inf)


def best_by(keep: str) -> tuple[str, bool]:
    """(metric, whether its lowest value is the best) of a config's `keep`; ('', False) where it is empty.

    Raises:
        ValueError: another form.
    """
    if not keep:
        return '', False
    match = re.fullmatch(r'best:([^:\s]+)(?::(min|max))?', keep)
    if not match:
        raise ValueError(f"keep={keep!r}: write 'best:METRIC', such as best:eval_reward, or 'best:METRIC:min' and "
                         "'best:METRIC:max' to say which is better")
    metric, mode = match.groups()
    name = f'_{re.sub(r"[^0-9A-Za-z]", "_", metric)}_'
    return metric, mode == 'min' if mode else any(f'_{part}_' in name for part in LOWER_IS_BETTER)
