"""The order in which hosts that generate and hosts that train exchange versions and batches."""
import pytest

from experiments.rlhf.policy.hosts import Schedule

STEPS = 9


@pytest.mark.parametrize('bound', [0, 1, 2, 3])
@pytest.mark.parametrize('base, in_flight', [(0, 0), (4, 0), (4, 1), (4, 3), (8, 1)])
def test_batches_return_in_time_and_of_the_version_that_is_due(base, in_flight, bound):
    """Also after a restart with batches in the checkpoint; more of them where S was larger before."""
    learner, generator = (Schedule(base, base + in_flight, STEPS, bound) for _ in range(2))
    made, there = {}, set(range(base, base + in_flight))
    for version in range(base, STEPS):
        due = generator.due(version)
        assert due == learner.due(version)
        for index in due:
            assert made.setdefault(index, version) == max(base, index - bound)
            assert index not in there
            there.add(index)
        assert version in there  # what the learner trains on next
        # A checkpoint of this step needs the batches of versions that are gone.
        assert {i for i in range(version, STEPS) if max(base, i - bound) < version} <= there
        ahead = generator.ahead(version)
        if ahead is not None:
            assert ahead not in made and ahead not in there
            made[ahead] = version
    assert there == set(range(base, STEPS))
    assert not bound or base + in_flight + bound >= STEPS or len(made) > 1
